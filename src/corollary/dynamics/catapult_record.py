"""Catapults in the record of a training run: where the loss rose, returned, and left the curvature smaller."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from corollary.base.errors import BadInput
from corollary.engine import TrainingRecord
from corollary.evidence import PALETTE, Figure

LOSSES = ("train_loss", "loss")
CURVATURES = ("sharpness", "lambda_ntk")


@final
@dataclass(frozen=True)
class Catapult:
    """One rise of the loss above a low and its return below it.

    Attributes:
        start: the step of the low; `peak` of the highest loss; `end` of the first loss below the low.
        growth: the highest loss over the low.
        curvature_before, curvature_after: at the last measurement up to the low, and the first from the end on; NaN
            where the record holds none.
    """

    start: int
    peak: int
    end: int
    growth: float
    curvature_before: float
    curvature_after: float

    @property
    def flattened(self) -> bool | None:
        """Whether the curvature is smaller afterwards; None where it was not measured."""
        if np.isnan(self.curvature_before) or np.isnan(self.curvature_after):
            return None
        return self.curvature_after < self.curvature_before


@final
@dataclass(frozen=True)
class Catapults:
    """All catapults of a run.

    Attributes:
        found: in order of time.
        steps, losses: what was searched, `[measurements]`.
        loss: the name of its column. curvature: the name of that column, or "" where there was none.
        unreturned: how far the loss stands above its lowest at the end, 1 if it ended there.
    """

    found: tuple[Catapult, ...]
    steps: np.ndarray
    losses: np.ndarray
    loss: str
    curvature: str
    unreturned: float

    def __len__(self) -> int:
        return len(self.found)

    def figure(self) -> Figure:
        """The loss over the steps, catapults shaded."""
        return Figure(
            "catapults",
            "Catapults in the loss",
            f"The column {self.loss!r} of the training record; shaded, from its low to its return below it, where it "
            "rose by more than the factor asked for.",
            {
                "step": self.steps,
                "loss": self.losses,
                "start": [found.start for found in self.found],
                "end": [found.end for found in self.found],
            },
            _draw,
        )


def find_catapults(
    record: TrainingRecord, *, growth: int | float = 2.0, loss: str | None = None, curvature: str | None = None
) -> Catapults:
    """Where the loss of a run rose to `growth` times its lowest so far, and then fell below that.

    A catapult of the theory is one of the loss over the whole training set; in the losses of mini-batches, noise looks
    the same, and only a smaller curvature afterwards tells them apart.

    Args:
        record: of one network (`record.member(i)` of a population).
        growth: the least rise, above 1.
        loss: a column; by default `train_loss`, else `loss`.
        curvature: a column; by default `sharpness` or `lambda_ntk`, if there is one.
    Raises: BadInput, for a column that is missing, empty or of several networks, or a growth not above 1.
    """
    if not growth > 1:
        raise BadInput(f"a rise is a factor above 1, got growth={growth}")
    name = _column(record, loss, LOSSES)
    if not name:
        raise BadInput(f"the record has none of {', '.join(LOSSES)}: name its column of losses with loss=...")
    steps, values = _numbers(record, name)
    curved = _column(record, curvature, CURVATURES)
    if len(values) == 0 or not (values >= 0).all():
        raise BadInput(
            f"the column {name!r} is searched for rises by a factor: it needs losses of 0 or more, got "
            f"{len(values)} values down to {values.min(initial=0):g}"
        )
    lows = np.flatnonzero(values <= np.minimum.accumulate(values))
    # The highest loss from each low up to the next one, the low itself included.
    tops = np.array([start + int(values[start:end].argmax()) for start, end in _pairs(lows)], dtype=int)
    starts, ends = lows[:-1], lows[1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        rise = values[tops] / values[starts]
    found = []
    for index in np.flatnonzero(rise >= growth):
        before, after = _around(record, curved, int(steps[starts[index]]), int(steps[ends[index]]))
        found.append(
            Catapult(
                int(steps[starts[index]]),
                int(steps[tops[index]]),
                int(steps[ends[index]]),
                float(rise[index]),
                before,
                after,
            )
        )
    lowest = float(values.min())
    unreturned = float(values[-1]) / lowest if lowest > 0 else 1.0 if values[-1] == 0 else float("inf")
    return Catapults(tuple(found), steps, values, name, curved, unreturned)


def _pairs(lows: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(lows[:-1].tolist(), lows[1:].tolist(), strict=True))


def _column(record: TrainingRecord, wanted: str | None, usual: Sequence[str]) -> str:
    """The column asked for, else the first usual one that is there, else ""."""
    return wanted if wanted is not None else next((name for name in usual if name in record), "")


def _numbers(record: TrainingRecord, name: str) -> tuple[np.ndarray, np.ndarray]:
    steps, values = record.measured(name)
    if values.ndim != 1:
        raise BadInput(
            f"the column {name!r} holds values of shape {values.shape[1:]}: catapults are searched for one network at "
            "a time. Give record.member(i) of a population's record."
        )
    return steps, values


def _around(record: TrainingRecord, name: str, start: int, end: int) -> tuple[float, float]:
    if not name:
        return float("nan"), float("nan")
    steps, values = _numbers(record, name)
    before, after = values[steps <= start], values[steps >= end]
    return float(before[-1]) if len(before) else float("nan"), float(after[0]) if len(after) else float("nan")


def _draw(axes: Any, data: Any) -> None:
    axes.plot(data["step"], data["loss"], color=PALETTE[0])
    for index, (start, end) in enumerate(zip(data["start"], data["end"], strict=True)):
        axes.axvspan(start, end, color=PALETTE[4], alpha=0.3, lw=0, label="catapult" if index == 0 else None)
    if (np.asarray(data["loss"]) > 0).any():
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="training loss")
    if len(data["start"]):
        axes.legend()
