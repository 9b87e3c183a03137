"""Training with larger batches as well as with small ones: the learning rate, the number of epochs, ghost batches."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import Batch, Loss
from corollary.base.seeds import Seeds
from corollary.dynamics.ghost_batch_norm import GHOSTS, ghostify
from corollary.engine import cross_entropy, population, sgd

Rule: TypeAlias = Literal["sqrt", "linear"]
Change = TypeVar("Change")
CLIP = 5.0
"""Gradient norm to which large-batch runs are clipped, in the authors' code."""
SETTINGS = ("small", "large", "scaled rate", "ghost batches", "adapted regime")


def scale_learning_rate(learning_rate: float, batch: int, reference_batch: int, rule: Rule = "sqrt") -> float:
    r"""$\sqrt{R}\,\eta$ or $R\,\eta$ for $R$ = `batch` / `reference_batch`.

    The root keeps the covariance of an update, $\propto \eta^2 / B$; the linear rule keeps its mean over an epoch.
    Source: Hoffer, Hubara and Soudry 2017, arXiv 1705.08741, equation 7; linear: Goyal et al. 2017, arXiv 1706.02677.
    """
    if batch < 1 or reference_batch < 1:
        raise BadInput(f"batches hold at least 1 sample, got {batch} and {reference_batch}")
    if not learning_rate > 0:
        raise BadInput(f"the learning rate must be above 0, got {learning_rate}")
    ratio = batch / reference_batch
    return learning_rate * (ratio if rule == "linear" else math.sqrt(ratio))


def adapt_regime(schedule: Mapping[int, Change], ratio: float) -> dict[int, Change]:
    """A schedule by epoch for batches `ratio` times as large: each epoch times ceil(ratio), so that updates agree.

    Source: Hoffer, Hubara and Soudry 2017, arXiv 1705.08741, section 4.4.
    """
    if not ratio >= 1:
        raise BadInput(f"a regime is adapted to larger batches: the ratio is at least 1, got {ratio}")
    return {epoch * math.ceil(ratio): change for epoch, change in schedule.items()}


@dataclass(frozen=True)
class LargeBatchPlan:
    """How to train with `batch` samples a step where `base_batch` is known to work.

    Args:
        base_batch, base_learning_rate, base_epochs: of the known regime.
        batch: at least as large.
        rule: of the learning rate.
    Raises: BadInput, for numbers below 1, or a smaller batch.
    """

    base_batch: int
    base_learning_rate: float
    base_epochs: int
    batch: int
    rule: Rule = "sqrt"

    def __post_init__(self) -> None:
        if min(self.base_batch, self.base_epochs) < 1 or self.batch < self.base_batch:
            raise BadInput(
                f"a plan goes from a batch of {self.base_batch} and {self.base_epochs} epochs to a larger batch, "
                f"got {self.batch}"
            )

    @property
    def ratio(self) -> float:
        """How many times as large the batch is."""
        return self.batch / self.base_batch

    @property
    def learning_rate(self) -> float:
        """For every phase of the schedule."""
        return scale_learning_rate(self.base_learning_rate, self.batch, self.base_batch, self.rule)

    @property
    def epochs(self) -> int:
        """With which the number of updates is the known regime's, or a little above it."""
        return self.base_epochs * math.ceil(self.ratio)

    @property
    def virtual_batch(self) -> int:
        """Samples whose statistics are taken together."""
        return self.base_batch

    @property
    def gradient_clip(self) -> float:
        """Largest gradient norm."""
        return CLIP


def generalisation_gap(
    make_model: Callable[[], nn.Module],
    data: Batch,
    small: int,
    large: int,
    epochs: int,
    seeds: Sequence[int],
    *,
    train_samples: int,
    learning_rate: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    drops: Sequence[float] = (0.5, 0.75),
    loss: Loss = cross_entropy,
    settings: Sequence[str] = SETTINGS,
) -> dict[str, list]:
    """Test accuracy of five ways to train: small batches, large ones, and large ones mended step by step.

    Each seed draws its own split of the data; the settings share split, initial weights and batch order of a seed.

    Args:
        make_model: a network with batch normalisation (for "ghost batches" and after).
        data: all samples, `(inputs, classes)`.
        epochs: of small batches, and of large ones but for the adapted regime.
        train_samples: how many of them each seed trains on; it is tested on the others.
        drops: shares of the epochs after which the learning rate falls tenfold.
        settings: which of `SETTINGS` to run.
    Returns: columns setting, seed, accuracy, updates; one row a network.
    Raises: BadInput, if the batches are not small < large <= `train_samples` < all.
    Source: Hoffer, Hubara and Soudry 2017, arXiv 1705.08741, table 1.
    """
    inputs, targets = data
    if not isinstance(inputs, Tensor):
        raise BadInput("the generalisation gap is measured on inputs that are one tensor")
    if not 1 <= small < large <= train_samples < len(inputs):
        raise BadInput(
            f"wanted small < large <= train_samples < all samples, got {small}, {large}, {train_samples}, {len(inputs)}"
        )
    splits = [torch.randperm(len(inputs), generator=Seeds(seed)("split")) for seed in seeds]
    plan = LargeBatchPlan(small, learning_rate, epochs, large)
    columns: dict[str, list] = {"setting": [], "seed": [], "accuracy": [], "updates": []}
    for setting in settings:
        stage = SETTINGS.index(setting)
        batch = large if stage else small
        length = plan.epochs if stage == 4 else epochs
        updates = length * math.ceil(train_samples / batch)
        falls = [round(share * updates) for share in drops]
        ghosts = stage >= 3 and any(type(part) in GHOSTS for part in make_model().modules())
        trained = population(
            (lambda: ghostify(make_model(), plan.virtual_batch)) if ghosts else make_model,
            data,
            seeds=list(seeds),
            subsets=[order[:train_samples] for order in splits],
            optimizer=sgd(momentum),
            learning_rate=plan.learning_rate if stage >= 2 else learning_rate,
            weight_decay=weight_decay,
            schedule=lambda step, falls=falls: 0.1 ** sum(step >= fall for fall in falls),
            gradient_clip=plan.gradient_clip,
            batch_size=batch,
            epochs=length,
            loss=loss,
            record_every=lambda step: step == 0,
        )
        rest = torch.stack([order[train_samples:] for order in splits])
        scores = trained.final.evaluate((inputs[rest], targets[rest]), loss, own=True)
        columns["setting"] += [setting] * len(seeds)
        columns["seed"] += list(seeds)
        columns["accuracy"] += scores["accuracy"].tolist()
        columns["updates"] += [updates] * len(seeds)
    return columns
