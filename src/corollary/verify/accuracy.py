"""Certified accuracy: the share of samples whose class no perturbation up to a radius can change."""

import html
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import Batch, batches, refuse_non_finite
from corollary.base.progress import track
from corollary.base.seeds import Seeds
from corollary.data import Dataset
from corollary.evidence import Figure
from corollary.graph import Graph, GraphModule, capture
from corollary.verify.attacks import pgd
from corollary.verify.bounded_graph import BoundedGraph
from corollary.verify.certify import certify
from corollary.verify.classifier import Classifier, attackable, logits_of, margin
from corollary.verify.falsify import falsify
from corollary.verify.layout import sample_size
from corollary.verify.search import Margin
from corollary.verify.sets import Ball, Box, Region
from corollary.verify.specification import Specification
from corollary.verify.verdict import CertifyConfig

AccuracyMethod: TypeAlias = Literal["interval", "crown", "alpha-crown", "complete"]
TOGETHER = 64
"""Samples that are bounded together; bounds of more at once are no faster on a processor."""
ATTACKED_BEFORE = (0.1, 0.5)
"""Seconds, as in `CertifyConfig.attack`, that branch and bound attacks samples which withstood another attack."""
PRECISION = torch.float64
"""Of all bounds here: their rounding then stays far below any margin between classes that counts."""


@final
@dataclass(frozen=True, eq=False)
class CertifiedAccuracy:
    """Which samples keep their class within which radius. The accuracy under the worst perturbation lies in between.

    Attributes:
        radii: ascending.
        correct: the samples that the network classifies as their label, unperturbed.
        certified: (radius, sample), proved: no perturbation of that size changes the class.
        withstood: (radius, sample), correct, and no perturbation of that size was found that changes the class.
        norm: of perturbations.
        clip: the range that perturbed inputs keep to, None where they may leave it.
        method: of the proof.
        seconds: what it took.
    """

    radii: tuple[float, ...]
    correct: Bool[Tensor, "sample"]
    certified: Bool[Tensor, "radius sample"]
    withstood: Bool[Tensor, "radius sample"]
    norm: float
    clip: tuple[float, float] | None
    method: AccuracyMethod
    seconds: float

    @property
    def clean(self) -> float:
        """Share of the samples that are classified as their label."""
        return _share(self.correct)

    @property
    def lower(self) -> Float[Tensor, "radius"]:
        """Certified accuracy at each radius: a lower bound of the accuracy under the worst perturbation."""
        return self.certified.double().mean(1)

    @property
    def upper(self) -> Float[Tensor, "radius"]:
        """Accuracy under the perturbations that were found: an upper bound of it."""
        return self.withstood.double().mean(1)

    def table(self) -> dict[str, list[float]]:
        """Columns radius, clean, attacked (an upper bound), certified (a lower bound), undecided."""
        upper, lower = self.upper.tolist(), self.lower.tolist()
        return {
            "radius": list(self.radii),
            "clean": [self.clean] * len(self.radii),
            "attacked": upper,
            "certified": lower,
            "undecided": [high - low for high, low in zip(upper, lower, strict=True)],
        }

    def figure(self) -> Figure:
        """Certified accuracy and accuracy under attack against the radius."""
        return Figure(
            name="certified-accuracy",
            title="Certified accuracy",
            caption=(
                f"Share of {len(self.correct)} samples. The accuracy under the worst perturbation, measured in the "
                f"{'infinity' if math.isinf(self.norm) else f'{self.norm:g}'} norm, lies in the band: what is below it "
                f"is proved ({self.method}), and for what is above it a perturbation was found."
            ),
            data=self.table(),
            draw=_draw,
        )

    def _repr_html_(self) -> str:
        table = self.table()
        head = "".join(f"<th>{html.escape(name)}</th>" for name in table)
        rows = "".join(
            f"<tr><td>{radius:g}</td>" + "".join(f"<td>{share:.1%}</td>" for share in shares) + "</tr>"
            for radius, *shares in zip(*table.values(), strict=True)
        )
        return f"<table><tr>{head}</tr>{rows}</table>{self.figure()._repr_html_()}"


def certified_accuracy(
    model: nn.Module | Graph,
    data: Dataset | Batch | Iterable[Batch],
    radii: Sequence[float | int],
    *,
    norm: float | int = math.inf,
    clip: tuple[float | int, float | int] | None = (0, 1),
    method: AccuracyMethod = "crown",
    attack: bool = True,
    timeout_per_sample: float | int = 30.0,
    iterations: int = 20,
    seed: int = 0,
) -> CertifiedAccuracy:
    r"""Bounds of the accuracy under the worst perturbation $\|\delta\|_p \le r$ of every sample, for each radius.

    A sample counts as certified at a radius if linear or interval bounds (or for "complete" branch and bound) prove
    $\min_{\|\delta\| \le r} f_y(x+\delta) - f_j(x+\delta) > 0$ for all other classes j. One that an attack changes at
    some radius, or that fails to be certified at it, is not tried again at larger ones.

    Args:
        model: from inputs (batch, *input) to logits (batch, class); evaluated in evaluation mode, never written to.
        data: (x, y) with integer labels, batches of such, or a data set (its test part where it has one).
        norm: p, in [1, inf].
        clip: the range that inputs have. Boxes (p infinite) are cut to it; balls are certified whole, which also proves
            the part inside, and only violations inside count.
        method: "interval", "crown", "alpha-crown" (with `iterations` steps) bound all samples together; "complete"
            decides each by itself, within `timeout_per_sample` seconds at each radius.
        attack: look for perturbations by projected gradients first. Without it only "complete" lowers the upper bound.
        seed: of all random draws.
    Raises: BadInput, for inputs outside of `clip`, labels that are no classes, or radii that are negative or none;
        CannotCapture; NoRule, where bounds do not understand an op.
    Source: Wong and Kolter 2018, arXiv 1711.00851; bounds by Zhang et al. 2018, arXiv 1811.00866.
    """
    start = time.monotonic()
    x, y = _samples(data)
    grid = _checked(x, y, radii, norm, clip)
    graph = model if isinstance(model, Graph) else capture(model, x[:2])
    network = GraphModule(model) if isinstance(model, Graph) else model
    task = _Task(network, graph, x, y, float(norm), clip and (float(clip[0]), float(clip[1])), seed)
    correct = task.correct()
    certifier: _Complete | _Bounds
    if method == "complete":
        certifier = _Complete(task, float(timeout_per_sample), ATTACKED_BEFORE if attack else CertifyConfig.attack)
    else:
        certifier = _Bounds(task, BoundedGraph(graph, dtype=PRECISION), method, iterations)
    withstood, certified = correct.clone(), correct.clone()
    tables: list[tuple[Tensor, Tensor]] = []
    for radius in track(grid, "radii certified"):
        if attack and radius > 0:
            _drop(withstood, task.changed(radius, _where(withstood)))
        proved, broken = certifier.run(radius, _where(certified & withstood))
        _drop(withstood, broken)
        certified = torch.zeros_like(correct)
        certified[proved] = True
        tables.append((certified.cpu(), withstood.cpu().clone()))
    return CertifiedAccuracy(
        tuple(grid),
        correct.cpu(),
        torch.stack([row for row, _ in tables]),
        torch.stack([row for _, row in tables]),
        task.norm,
        task.clip,
        method,
        time.monotonic() - start,
    )


@final
@dataclass(frozen=True, eq=False)
class _Task:
    network: Classifier
    graph: Graph
    x: Tensor
    y: Tensor
    norm: float
    clip: tuple[float, float] | None
    seed: int

    @property
    def classes(self) -> int:
        return sample_size(self.graph.outputs[0])

    def correct(self) -> Bool[Tensor, "sample"]:
        """The label's logit is above all others: equal ones count as wrong, as they do in a proof."""
        with attackable(self.network), torch.no_grad():
            logits = torch.cat([logits_of(self.network, part) for part in self.x.split(4096)])
        if int(self.y.max()) >= logits.shape[1]:
            raise BadInput(f"the labels go up to {int(self.y.max())}, and the network has {logits.shape[1]} classes")
        return margin(logits, self.y) < 0

    def region(self, radius: float, samples: Tensor) -> Region:
        ball = Ball(self.x[samples].to(PRECISION), radius, self.norm)
        if not math.isinf(self.norm):
            return ball
        box = ball.box()
        if self.clip is None:
            return box
        return Box(box.lower.clamp(min=self.clip[0]), box.upper.clamp(max=self.clip[1]))

    def specification(self, radius: float, sample: int) -> Specification:
        clip = self.clip if math.isinf(self.norm) else None
        x = self.x[sample : sample + 1].cpu().to(PRECISION)
        return Specification.robustness(x, radius, int(self.y[sample]), self.classes, clip=clip, norm=self.norm)

    def changed(self, radius: float, samples: Tensor) -> Tensor:
        """The samples for which a perturbation was found that changes the class."""
        generator = Seeds(self.seed)(f"attack at {radius!r}")
        if self.norm not in (2.0, math.inf):
            found = [i for i in samples.tolist() if self._falsified(radius, i, generator)]
            return samples.new_tensor(found)
        hit = [samples[:0]]
        for part in samples.split(1024) if len(samples) else ():
            x, y = self.x[part], self.y[part]
            moved = pgd(
                self.network, x, y, radius, restarts=4, loss="margin", norm=self.norm, clip=self.clip,
                generator=generator, stop_early=True,
            )  # fmt: skip
            with attackable(self.network), torch.no_grad():
                hit.append(part[margin(logits_of(self.network, moved), y) >= 0])
        return torch.cat(hit)

    def _falsified(self, radius: float, sample: int, generator: torch.Generator) -> bool:
        found = falsify(self.network, self.specification(radius, sample), generator=generator, restarts=2, steps=40)
        return found is not None and self.in_range(found.x)

    def in_range(self, x: Tensor) -> bool:
        """Whether a violation lies in the range that inputs have."""
        return self.clip is None or bool(((x >= self.clip[0]) & (x <= self.clip[1])).all())


@final
@dataclass(frozen=True, eq=False)
class _Bounds:
    """Proofs by bounds of the margins, for many samples at once."""

    task: _Task
    bounded: BoundedGraph
    method: Literal["interval", "crown", "alpha-crown"]
    iterations: int

    def run(self, radius: float, samples: Tensor) -> tuple[Tensor, Tensor]:
        """The samples proved, and those violated: none, by this method."""
        proved = [samples[:0]]
        for part in samples.split(TOGETHER) if len(samples) else ():
            rows = _margin_rows(self.task.y[part], self.task.classes)
            region = self.task.region(radius, part)
            lower, upper = self.bounded.bounds(region, rows, method=self.method, iterations=self.iterations)
            rounding = Margin.for_dtype(PRECISION)
            size = torch.maximum(lower.abs(), upper.abs())
            proved.append(part[(lower > rounding.absolute + rounding.relative * size).all(1)])
        return torch.cat(proved), samples[:0]


@final
@dataclass(frozen=True, eq=False)
class _Complete:
    """Proofs and violations by branch and bound, one sample at a time."""

    task: _Task
    timeout: float
    attack: tuple[float, float]

    def run(self, radius: float, samples: Tensor) -> tuple[Tensor, Tensor]:
        """The samples proved, and those violated."""
        config = CertifyConfig(seed=self.task.seed, attack=self.attack)
        verdicts = {
            i: certify(self.task.graph, self.task.specification(radius, i), timeout=self.timeout, config=config)
            for i in track(samples.tolist(), f"samples at radius {radius:g}")
        }
        broken = [
            i
            for i, verdict in verdicts.items()
            if verdict.counterexample is not None and self.task.in_range(verdict.counterexample.x)
        ]
        proved = [i for i, verdict in verdicts.items() if verdict.status == "unsat"]
        return samples.new_tensor(proved), samples.new_tensor(broken)


def _margin_rows(y: Int[Tensor, "sample"], classes: int) -> Float[Tensor, "sample other class"]:
    """Rows that give the label's output minus each other's."""
    unit = torch.eye(classes, dtype=PRECISION, device=y.device)
    others = torch.stack([unit.index_select(0, _others(int(label), classes, y.device)) for label in range(classes)])
    return (unit[:, None] - others)[y]


def _others(label: int, classes: int, device: torch.device) -> Tensor:
    return torch.tensor([k for k in range(classes) if k != label], device=device)


def _samples(data: Dataset | Batch | Iterable[Batch]) -> tuple[Tensor, Tensor]:
    if isinstance(data, Dataset):
        part = data.test or data.train
        if part.y is None:
            raise BadInput(f"certified accuracy needs labels, and the data set {data.name!r} has none")
        return part.x, part.y
    pairs = list(batches(data))
    if not all(isinstance(x, Tensor) for x, _ in pairs):
        raise BadInput("certified accuracy is of networks with one input: give (x, y) as tensors")
    return torch.cat([x for x, _ in pairs if isinstance(x, Tensor)]), torch.cat([y for _, y in pairs])


def _checked(
    x: Tensor, y: Tensor, radii: Sequence[float | int], norm: float | int, clip: tuple[float | int, float | int] | None
) -> list[float]:
    """The radii in ascending order."""
    if len(x) == 0 or y.shape != x.shape[:1] or y.is_floating_point() or int(y.min()) < 0:
        raise BadInput(
            f"wanted samples (n, *input) with integer labels (n,) from 0, got {tuple(x.shape)} and {y.dtype} "
            f"{tuple(y.shape)}"
        )
    refuse_non_finite(x, "the inputs")
    grid = sorted({float(radius) for radius in radii})
    if not grid or not all(0 <= radius < math.inf for radius in grid):
        raise BadInput(f"wanted one or more radii of at least 0, got {list(radii)}")
    if not norm >= 1:
        raise BadInput(f"the norm of a perturbation is at least 1, got {norm:g}")
    if clip is not None and not (clip[0] <= float(x.min()) and float(x.max()) <= clip[1]):
        raise BadInput(
            f"inputs range from {float(x.min()):g} to {float(x.max()):g}, outside of clip={clip}: give the range that "
            "your data has, or clip=None"
        )
    return grid


def _drop(mask: Tensor, samples: Tensor) -> None:
    mask[samples] = False


def _where(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, 0]


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())


def _draw(axes: Any, data: Any) -> None:
    axes.fill_between(data["radius"], data["certified"], data["attacked"], alpha=0.15, linewidth=0)
    axes.plot(data["radius"], data["attacked"], marker="o", label="under attack (upper bound)")
    axes.plot(data["radius"], data["certified"], marker="o", label="certified (lower bound)")
    axes.set_xlabel("radius of the perturbation")
    axes.set_ylabel("accuracy")
    axes.set_ylim(-0.02, 1.02)
    axes.legend()
