"""Losses of single samples over steps, and in them the two groups whose losses move most and against each other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.base.network import Batch, map_inputs
from corollary.engine import TrainingRecord
from corollary.evidence import Source

ROSENFELD_2024 = Source(
    "rosenfeld2024outliers",
    ("Elan Rosenfeld", "Andrej Risteski"),
    "Outliers with Opposing Signals Have an Outsized Effect on Neural Network Optimization",
    2024,
    arxiv="2311.04163",
    venue="ICLR",
)
SMALLEST_GROUP = 5
TOP_SHARE = 0.02
"""Share of the samples whose part in all changes of loss is the concentration."""
LOSSES, INDICES = "per_sample_loss", "sample_index"
"""Columns of a record: losses of single samples, and which samples they are where that changes."""

Losses = TrainingRecord | Tensor | np.ndarray | Sequence[Tensor] | Sequence[np.ndarray]
"""A record with the column `per_sample_loss`, a matrix [step, sample], or one row of losses a step."""
Indices = Tensor | np.ndarray | Sequence[Tensor] | Sequence[np.ndarray]


class OpposingGroups(NamedTuple):
    """Samples by index: `rising` are those whose loss rose most from `step` to `step` + 1, `falling` fell most."""

    rising: Int[Tensor, "k"]
    falling: Int[Tensor, "k"]
    step: int


@final
@dataclass(frozen=True)
class GroupReading:
    """What the losses alone say of opposing groups.

    Args:
        events: the steps at which groups were read: those at which the mean loss rose, else the one of largest change.
        at_rises: whether they are rises of the mean loss.
        groups: of the event at which the mean loss rose most.
        alternation: share of consecutive steps between which a loss of the groups turns from rising to falling or
            back; the mean over groups and events.
        alternation_of_all: the same over all samples.
        concentration: share of all changes of loss, in absolute value, that the top 2 % of the samples make.
        persistence: Jaccard overlap of both groups together between one event and the next; NaN for a single event.
    """

    events: tuple[int, ...]
    at_rises: bool
    groups: OpposingGroups
    alternation: float
    alternation_of_all: float
    concentration: float
    persistence: float


@final
@dataclass(frozen=True)
class LossHistory:
    """Losses of the same samples over steps.

    Args:
        steps: ascending, [step].
        losses: column i is sample i throughout, NaN where it was not measured, [step, sample].
    Raises: BadInput, for fewer than 3 steps or 10 samples, or where fewer than two pairs of steps are consecutive: a
        change over several steps hides an alternation.
    """

    steps: Int[Tensor, "step"]
    losses: Float[Tensor, "step sample"]

    def __post_init__(self) -> None:
        steps, samples = self.losses.shape
        if steps < 3:
            raise BadInput(f"opposing groups are read from 3 or more recorded steps, got {steps}")
        group_size(samples)
        if int((self.steps.diff() == 1).sum()) < 2:
            raise BadInput(
                "a loss alternates from one step to the next, but fewer than two pairs of the recorded steps "
                f"{_shortened(self.steps)} are consecutive: record every step, if only for a while"
            )

    @classmethod
    def of(cls, source: Losses, *, sample_index: Indices | None = None) -> "LossHistory":
        """The history in a record (column `per_sample_loss`, and `sample_index` if there is one), matrix or rows.

        Args:
            source: see `Losses`. Without indices, entry i of each row must be the loss of the same sample i.
            sample_index: for losses of changing samples (mini-batches): the index of the sample of each entry.
        Raises: BadInput, for rows of changing length or with missing entries and no indices, losses that are infinite,
            or a record without the column.
        """
        if isinstance(source, TrainingRecord):
            numbers, losses = source.measured(LOSSES)
            steps = torch.as_tensor(numbers)
            if sample_index is None and INDICES in source:
                present = np.isin(source.steps, numbers)
                sample_index = source[INDICES][present]
        else:
            losses, steps = source, torch.arange(len(source))
        rows = [torch.as_tensor(row) for row in losses]
        if any(row.ndim != 1 for row in rows):
            raise BadInput(f"losses of single samples are [step, sample]; a row has shape {list(rows[0].shape)}")
        if sample_index is None:
            _refuse_changing(rows)
            matrix = torch.stack(rows) if rows else torch.zeros(0, 0)
        else:
            matrix = _aligned(rows, [torch.as_tensor(row).long() for row in sample_index])
        if bool(matrix.isinf().any()):
            raise BadInput("losses of single samples are infinite: leave out the steps from where training diverged")
        return cls(steps, matrix)

    @property
    def changes(self) -> Float[Tensor, "pair sample"]:
        """Change of each loss from one recorded step to the next."""
        return self.losses.diff(dim=0)

    @property
    def adjacent(self) -> Bool[Tensor, "pair"]:
        """For each change, whether it is that of one step."""
        return self.steps.diff() == 1

    def groups(self, step: int | None = None, *, fraction: float = 0.01) -> OpposingGroups:
        """The samples with the largest and the most negative change from `step` to the next step.

        Args:
            step: by default the one at which the mean loss rose most; where it never rose, the one of largest change.
            fraction: of the samples in each group, at least 5 samples.
        Raises: BadInput, if `step` and the one after it were not both recorded.
        """
        if step is None:
            pair = self._main_pair(self._events(len(self.changes))[0])
        else:
            found = ((self.steps[:-1] == step) & self.adjacent).nonzero().flatten()
            if not len(found):
                raise BadInput(
                    f"the change at step {step} needs the losses at steps {step} and {step + 1}; recorded are "
                    f"{_shortened(self.steps)}"
                )
            pair = int(found[0])
        rising, falling = extremes(self.changes[pair : pair + 1], group_size(self.losses.shape[1], fraction))
        return OpposingGroups(rising[0], falling[0], int(self.steps[pair]))

    def read(self, *, fraction: float = 0.01, window: int = 60) -> GroupReading:
        """All that the losses of the last `window` steps say of opposing groups."""
        if window < 2:
            raise BadInput(f"alternation is read from a window of 2 or more steps, got {window}")
        pairs, at_rises = self._events(window)
        changes = self.changes
        rising, falling = extremes(changes[pairs], group_size(self.losses.shape[1], fraction))
        both = torch.cat([rising, falling], dim=1)
        first = max(0, len(changes) - window)
        turns = turning_share(changes[first:], self.adjacent[first:])
        return GroupReading(
            events=tuple(self.steps[pairs].tolist()),
            at_rises=at_rises,
            groups=self.groups(int(self.steps[self._main_pair(pairs)]), fraction=fraction),
            alternation=float(turns[both].nanmean()),
            alternation_of_all=float(turns.nanmean()),
            concentration=float(_concentration(changes[pairs]).mean()),
            persistence=_persistence(both, changes.shape[1]),
        )

    def _events(self, window: int) -> tuple[Int[Tensor, "event"], bool]:
        """Pairs of the last `window` at which the mean loss rose, or else the one of largest change; and which."""
        pairs = self.adjacent.nonzero().flatten()
        pairs = pairs[pairs >= len(self.adjacent) - window]
        if not len(pairs):
            raise BadInput(f"no two of the last {window} recorded steps are consecutive: {_shortened(self.steps)}")
        rises = pairs[self.changes[pairs].nanmean(dim=1) > 0]
        if len(rises):
            return rises, True
        return pairs[self.changes[pairs].abs().nansum(dim=1).argmax()][None], False

    def _main_pair(self, pairs: Int[Tensor, "event"]) -> int:
        return int(pairs[self.changes[pairs].nanmean(dim=1).argmax()])


def find_opposing_groups(
    per_sample_loss: Losses,
    step: int | None = None,
    *,
    fraction: float = 0.01,
    sample_index: Indices | None = None,
) -> OpposingGroups:
    r"""The samples whose losses rise and fall most at one step, $\Delta_i = \ell_i(t+1) - \ell_i(t)$, in any record.

    Args:
        per_sample_loss: a record with that column, or losses [step, sample]; see `LossHistory.of`.
        step: t; by default the one at which the mean loss rose most, or where it never rose the one of largest
            total change.
        fraction: of the samples in each group, at least 5 samples.
        sample_index: which samples the losses are of, where that changes from step to step.
    Raises: BadInput, for fewer than 3 recorded steps, or changing samples without their indices.
    Source: Rosenfeld and Risteski 2024, arXiv:2311.04163, section 2.
    """
    return LossHistory.of(per_sample_loss, sample_index=sample_index).groups(step, fraction=fraction)


def group_size(samples: int, fraction: float = 0.01) -> int:
    """Samples in each group: `fraction` of all, at least 5, at most half.

    Raises: BadInput, for a fraction outside (0, 0.5], or fewer than 10 samples.
    """
    if not 0 < fraction <= 0.5:
        raise BadInput(f"each group takes a fraction of the samples above 0 and at most 0.5, got {fraction}")
    if samples < 2 * SMALLEST_GROUP:
        raise BadInput(f"two groups of {SMALLEST_GROUP} need {2 * SMALLEST_GROUP} samples, got {samples}")
    return min(max(SMALLEST_GROUP, round(fraction * samples)), samples // 2)


def extremes(
    changes: Float[Tensor, "pair sample"], k: int
) -> tuple[Int[Tensor, "pair size"], Int[Tensor, "pair size"]]:
    """Indices of the k largest and the k most negative changes of each row, the most extreme first; NaN is neither."""
    measured = int((~changes.isnan()).sum(dim=1).min())
    if measured < 2 * k:
        raise BadInput(f"two groups of {k} need {2 * k} samples measured at both steps, got {measured}")
    rising = changes.nan_to_num(nan=-math.inf).topk(k, dim=1).indices
    falling = (-changes).nan_to_num(nan=-math.inf).topk(k, dim=1).indices
    return rising, falling


def turning_share(changes: Float[Tensor, "pair sample"], adjacent: Bool[Tensor, "pair"]) -> Float[Tensor, "sample"]:
    """For each sample the share of consecutive changes that differ in sign, over pairs of `adjacent` changes."""
    products = (changes[1:].sign() * changes[:-1].sign())[adjacent[1:] & adjacent[:-1]]
    return torch.where(products.isnan(), torch.nan, (products < 0).to(changes.dtype)).nanmean(dim=0)


def plant_opposing(
    x: Float[Tensor, "n *sample"],
    y: Int[Tensor, "n"],
    classes: tuple[int, int],
    direction: Float[Tensor, "..."],
    amplitude: int | float,
    count: int,
    seed: int,
) -> tuple[Float[Tensor, "n *sample"], Bool[Tensor, "n"]]:
    """Inputs in which `count` samples of each of two classes carry one and the same large feature.

    Args:
        classes: the two labels; what the feature says for one, it says against the other.
        direction: the feature, scaled to unit length before `amplitude` times it is added.
    Returns: a copy of the inputs, and which samples were changed, [n].
    Raises: BadInput, if the classes are the same or too small, or `direction` is zero or of another shape.
    """
    if direction.shape != x.shape[1:] or not bool(direction.any()):
        raise BadInput(f"the direction must be a nonzero {list(x.shape[1:])}, got one of {list(direction.shape)}")
    if classes[0] == classes[1]:
        raise BadInput(f"opposing signals need two different classes, got {classes[0]} twice")
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(x), dtype=torch.bool)
    for label in classes:
        members = (y == label).nonzero().flatten().cpu()
        if not 1 <= count <= len(members):
            raise BadInput(f"class {label} has {len(members)} samples to plant in: give 1 to as many, got {count}")
        mask[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    mask = mask.to(x.device)
    feature = amplitude * direction / direction.norm()
    return torch.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x + feature, x), mask


def without_groups(data: Batch, groups: OpposingGroups) -> Batch:
    """The data without the samples of both groups, in its old order: train on it to see what they did."""
    inputs, targets = data
    kept = torch.ones(len(targets), dtype=torch.bool)
    kept[torch.cat([groups.rising, groups.falling])] = False
    return map_inputs(lambda tensor: tensor[kept.to(tensor.device)], inputs), targets[kept.to(targets.device)]


def _concentration(changes: Float[Tensor, "pair sample"]) -> Float[Tensor, "pair"]:
    sizes = changes.abs().nan_to_num(nan=0.0)
    top = max(1, math.ceil(TOP_SHARE * sizes.shape[1]))
    total = sizes.sum(dim=1)
    return sizes.topk(top, dim=1).values.sum(dim=1) / torch.where(total > 0, total, 1)


def _persistence(both: Int[Tensor, "event size"], samples: int) -> float:
    member = torch.zeros(len(both), samples, dtype=torch.bool).scatter_(1, both.cpu(), True)
    if len(member) < 2:
        return math.nan
    shared = (member[1:] & member[:-1]).sum(dim=1)
    return float((shared / (member[1:] | member[:-1]).sum(dim=1)).mean())


def _refuse_changing(rows: Sequence[Tensor]) -> None:
    lengths = {len(row) for row in rows}
    missing = any(bool(row.isnan().any()) for row in rows)
    if len(lengths) > 1 or missing:
        what = f"hold {min(lengths)} to {max(lengths)} losses" if len(lengths) > 1 else "have missing entries"
        raise BadInput(
            f"the rows of single losses {what}, so the samples change from step to step: say which they are "
            f"(sample_index=, or the record's column {INDICES!r}), or record a fixed set of samples"
        )


def _aligned(rows: Sequence[Tensor], indices: Sequence[Tensor]) -> Float[Tensor, "step sample"]:
    lengths, expected = [len(row) for row in rows], [len(row) for row in indices]
    if lengths != expected:
        raise BadInput("sample_index must have one index for each loss, but their lengths differ")
    if not rows:
        return torch.zeros(0, 0)
    columns, step = torch.cat(list(indices)), torch.repeat_interleave(torch.tensor(lengths))
    if bool((columns < 0).any()):
        raise BadInput(f"indices of samples are 0 or more, got {int(columns.min())}")
    matrix = torch.full((len(rows), int(columns.max()) + 1), torch.nan, dtype=rows[0].dtype)
    matrix[step, columns] = torch.cat(list(rows))
    return matrix


def _shortened(steps: Tensor) -> str:
    numbers = [str(int(step)) for step in steps]
    return ", ".join(numbers) if len(numbers) <= 6 else ", ".join([*numbers[:3], "...", *numbers[-2:]])
