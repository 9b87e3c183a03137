"""Certified training: networks trained on bounds of their loss over boxes of inputs, on any network that is captured.

Interval training minimises the cross-entropy of the upper bounds of $o_j - o_y$ over the box of radius $\\epsilon$.
SABR bounds a smaller box, of radius $\\lambda\\epsilon$, around a point that an attack finds in the large one.
Adversarial training (PGD) takes the loss at that point, and standard training at the input. The radius rises from 0
while the network learns: trained on large boxes from the start, it collapses to a constant.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from corollary.base.errors import BadInput
from corollary.base.network import Batch
from corollary.engine import Fit, fit
from corollary.evidence import Source
from corollary.graph import Node, forward
from corollary.graph.ops import BatchNorm, Op, Stored
from corollary.verify.attacks import pgd
from corollary.verify.interval_margins import DataRange, IntervalNetwork, box_around

GOWAL_2018 = Source(
    key="gowal2018effectiveness",
    authors=(
        "Sven Gowal", "Krishnamurthy Dvijotham", "Robert Stanforth", "Rudy Bunel", "Chongli Qin", "Jonathan Uesato",
        "Relja Arandjelovic", "Timothy Mann", "Pushmeet Kohli",
    ),
    title="On the effectiveness of interval bound propagation for training verifiably robust models",
    year=2018,
    arxiv="1810.12715",
)  # fmt: skip
MUELLER_2023 = Source(
    key="mueller2023sabr",
    authors=("Mark Niklas Mueller", "Franziska Eckert", "Marc Fischer", "Martin Vechev"),
    title="Certified training: small boxes are all you need",
    year=2023,
    arxiv="2210.04871",
    venue="ICLR",
)

Method: TypeAlias = Literal["ibp", "sabr", "pgd", "standard"]
METHODS: tuple[Method, ...] = ("ibp", "sabr", "pgd", "standard")
SMOOTH_SHARE = 0.25
SMOOTH_POWER = 4


@final
@dataclass(frozen=True)
class WarmUp:
    """How the radius rises from 0 before epoch `start` to its full size at epoch `stop`.

    Args:
        start, stop: epochs, counted from 0; whole or not.
        kind: "linear"; or "smooth", in the first quarter as the fourth power of the time, then linear, with no break in
            slope.

    Raises: BadInput, if stop comes before start.
    """

    start: float | int = 0
    stop: float | int = 0
    kind: Literal["linear", "smooth"] = "smooth"

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop or self.kind not in ("linear", "smooth"):
            raise BadInput(f"a warm-up is 'linear' or 'smooth' and goes from a start >= 0 to a later stop, got {self}")

    def __call__(self, epoch: float | int) -> float:
        """The share of the full radius at a time in epochs."""
        if epoch >= self.stop:
            return 1.0
        share = max(0.0, (epoch - self.start) / (self.stop - self.start)) if self.stop > self.start else 0.0
        if self.kind == "linear":
            return share
        # a s^p up to m, then the tangent there; a makes the end 1.
        m, p = SMOOTH_SHARE, SMOOTH_POWER
        factor = 1 / (m**p + p * m ** (p - 1) * (1 - m))
        return factor * (share**p if share <= m else m**p + p * m ** (p - 1) * (share - m))


@final
class CertifiedObjective(nn.Module):
    """A network with the outputs that a method trains on; their cross-entropy with the labels is the loss.

    In evaluation mode the network's own outputs. In training mode, for "ibp" and "sabr", upper bounds of $o_j - o_y$, 0
    at j = y; for "pgd" and "standard", outputs at the attacked or the clean input. Bounds are those of the network in
    evaluation mode, without dropout; batch normalisation takes the statistics of the clean batch for all of a box.

    Args: as for `CertifiedTrainer`.
    """

    step: Tensor

    def __init__(self, trainer: "CertifiedTrainer", example: Tensor, steps_per_epoch: int):
        super().__init__()
        self.net = trainer.model
        self.trainer = replace(trainer, model=nn.Identity())  # the copy that is trained is `net`
        self.steps_per_epoch = steps_per_epoch
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.intervals: IntervalNetwork | None = None
        if trainer.method in ("ibp", "sabr"):
            self.intervals = IntervalNetwork(self.net, example)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Outputs (batch, class) for inputs (batch, *input) and labels (batch,)."""
        if not self.training:
            return self.net(x)
        eps = self.trainer.eps * self.trainer.warm_up(int(self.step) / self.steps_per_epoch)
        self.step += 1
        method = self.trainer.method
        if method == "standard":
            return self.net(x)
        if method == "pgd":
            return self.net(self._attacked(x, y, eps))
        if method == "ibp":
            return self._bounds(x, x, y, eps)
        small = self.trainer.small_box * eps
        return self._bounds(x, self._attacked(x, y, eps - small), y, small)

    def _attacked(self, x: Tensor, y: Tensor, radius: float) -> Tensor:
        if radius == 0:
            return x
        steps = self.trainer.attack_steps
        length = self.trainer.attack_reach * radius / steps
        return pgd(self.net, x, y, radius, steps=steps, step=length, clip=self.trainer.data_range)

    def _bounds(self, clean: Tensor, center: Tensor, y: Tensor, radius: float) -> Tensor:
        assert self.intervals is not None  # made for the methods that bound
        overrides = self._batch_statistics(clean)
        lower, upper = box_around(center, radius, self.trainer.data_range)
        return -self.intervals.margins(lower, upper, y, overrides=overrides)

    def _batch_statistics(self, x: Tensor) -> dict[str, Tensor]:
        """Means and variances of the clean batch for every batch normalisation; the running ones take note of them."""
        assert self.intervals is not None
        network = self.intervals
        if not any(isinstance(node.op, BatchNorm) for node in network.graph):
            return {}
        with torch.no_grad():
            self.net(x)
        found: dict[str, Tensor] = {}

        def apply(node: Node, op: Op, values: tuple[Any, ...]) -> Any:
            if isinstance(op, BatchNorm):
                names = [source.op.name for source in node.inputs[1:3] if isinstance(source.op, Stored)]
                axes = tuple(axis for axis in range(values[0].ndim) if axis != 1)
                variance, mean = torch.var_mean(values[0], axes, correction=0)
                found.update(zip(names, (mean, variance), strict=True))
                return op(values[0], mean, variance, *values[3:])
            return op(*values)

        forward(network.graph, [x], network.stored(), apply, batch=len(x))
        return found


@final
@dataclass(frozen=True)
class CertifiedTrainer:
    r"""Training of a classifier so that its predictions can be certified in boxes of radius `eps`.

    Args:
        model: any module that can be captured (for "pgd" and "standard": any), with outputs (batch, class). It is
            copied, never written to.
        method: "ibp", "sabr", "pgd" or "standard".
        eps: the largest radius, in the units of the inputs.
        data_range: least and greatest value of an input, or None.
        warm_up: how the radius rises.
        small_box: $\lambda$ of SABR, the bounded box over the whole one.
        attack_steps: gradient steps of the attack in SABR and PGD, which starts at the input.
        attack_reach: length of all its steps together over the radius.

    Raises: BadInput, for a method, radius or share that there is none of.
    Source: Gowal et al. 2018, arXiv 1810.12715; Mueller et al. 2023, arXiv 2210.04871; Madry et al. 2018, arXiv
        1706.06083.
    """

    model: nn.Module
    method: Method = "ibp"
    _: KW_ONLY
    eps: float | int
    data_range: DataRange = (0, 1)
    warm_up: WarmUp = WarmUp()  # frozen
    small_box: float | int = 0.3
    attack_steps: int = 5
    attack_reach: float | int = 2.5

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise BadInput(f"the method of training is one of {', '.join(METHODS)}; got {self.method!r}")
        if not self.eps >= 0:
            raise BadInput(f"eps is the radius of a box and must be 0 or more, got {self.eps}")
        if not 0 < self.small_box <= 1:
            raise BadInput(f"small_box is a share of the box, above 0 and at most 1; got {self.small_box}")
        if self.attack_steps < 1 or not self.attack_reach > 0:
            raise BadInput(f"an attack makes 1 step or more, got {self.attack_steps} of reach {self.attack_reach}")

    def objective(self, example: Float[Tensor, "batch *input"], steps_per_epoch: int = 1) -> CertifiedObjective:
        """The module whose cross-entropy is minimised, for a training loop of your own; it holds `model` itself."""
        return CertifiedObjective(self, example, steps_per_epoch)

    def fit(
        self,
        data: Batch | Sequence[Batch] | Iterable[Batch],
        *,
        epochs: int,
        batch_size: int | None = None,
        learning_rate: float = 5e-4,
        milestones: Sequence[int] = (),
        decay: float = 0.2,
        gradient_clip: float | None = 10.0,
        seed: int = 0,
        validation: tuple[Tensor, Int[Tensor, "batch"]] | None = None,
        checkpoint: Path | str | None = None,
        seconds: float | None = None,
    ) -> Fit:
        """Train with Adam; the radius follows the warm-up, the learning rate falls by `decay` at each milestone.

        Args:
            data: `(x, y)` tensors, or a re-iterable of such batches with a length.
            epochs, batch_size, seed, gradient_clip, checkpoint, seconds: as for `corollary.engine.fit`.
            milestones: epochs.
            validation: `(x, y)`, for the clean accuracy while training (`test_accuracy`).
        Returns: the trained copy in evaluation mode, with its record. There, `accuracy` is that of what the method
            trains on, on the batch: for "ibp" the share certified at the present radius.
        Raises: CannotCapture; NoRule; BadInput, as `corollary.engine.fit`.
        """
        source = _WithLabels(data)
        objective = self.objective(source.example(), source.steps(batch_size))
        done = fit(
            objective,
            cast(Any, source.labelled()),
            loss=F.cross_entropy,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=learning_rate),
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            schedule=_milestones(milestones, decay) if milestones else None,
            gradient_clip=gradient_clip,
            validation=None if validation is None else ((validation[0], validation[1]), validation[1]),
            checkpoint=checkpoint,
            seconds=seconds,
        )
        best = None if done.best is None else cast(CertifiedObjective, done.best).net
        return replace(done, module=cast(CertifiedObjective, done.module).net, best=best)


def _milestones(milestones: Sequence[int], decay: float) -> Any:
    def schedule(optimizer: Optimizer) -> MultiStepLR:
        return MultiStepLR(optimizer, list(milestones), decay)

    return schedule


@final
class _WithLabels:
    """Batches whose inputs are (x, y): the bounds of a margin need the label."""

    def __init__(self, data: Any):
        self.data = data
        self.tensors = isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor)

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Batch]:
        for x, y in self.data:
            yield (x, y), y

    def labelled(self) -> Any:
        """The data as `fit` takes it."""
        return (tuple(self.data), self.data[1]) if self.tensors else self

    def example(self) -> Tensor:
        """Two inputs."""
        x = self.data[0] if self.tensors else next(iter(self.data))[0]
        if not isinstance(x, Tensor) or len(x) == 0:
            raise BadInput("certified training takes inputs in one tensor (batch, *input), of one sample or more")
        return x[:2]

    def steps(self, batch_size: int | None) -> int:
        """Steps of an epoch."""
        if not self.tensors:
            return len(self.data)
        return -(-len(self.data[1]) // (batch_size or len(self.data[1])))
