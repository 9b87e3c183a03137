"""The probe "oscillation": whether samples jumped around their targets while the network trained."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from corollary.base.errors import BadInput, NothingMeasured
from corollary.dynamics.feature_noise import LU_2023
from corollary.dynamics.residuals import ResidualDrift, loss_reversals, residual_drift
from corollary.engine import TrainingRecord
from corollary.evidence import PALETTE, Coverage, Figure, Finding, Measurement, Need, Range, Subject, probe

LOSSES = "per_sample_loss"
DELTA = 0.1
"""An output this far from its label, or farther, counts as oscillating."""
SETTLED = 0.25
"""The first part of the measurements, in which every network is off its labels."""
PERSISTENT = 0.8
"""A sample whose loss turns at this share of its measurements, or more, oscillates; independent noise gives 2/3."""


@probe(
    "oscillation",
    room="dynamics",
    title="Oscillation in training",
    question="Did outputs jump around their targets while the network trained, as they do above the edge of stability?",
    needs=Need.WEIGHTS,
    sources=(LU_2023,),
)
def oscillation(subject: Subject) -> Finding:
    """Sign changes and sums of residuals where the record has outputs, else turns of the losses of single samples."""
    record = subject.record
    if record is None:
        raise NothingMeasured(
            "oscillation is read from a training record with a column 'per_sample_loss' or 'output' [samples]: give "
            "inspect one with --record FILE"
        )
    losses = LOSSES in record and record[LOSSES].ndim == 2
    if "residual" in record or ("output" in record and not (losses and record["output"].ndim == 3)):
        return _of_residuals(_drift(subject, record))
    if not losses:
        raise NothingMeasured(
            "the training record has no losses or outputs of single samples, only "
            f"{', '.join(record.columns) or 'nothing'}. Log 'per_sample_loss' or 'output' [samples] while training."
        )
    return _of_losses(record)


def _drift(subject: Subject, record: TrainingRecord) -> ResidualDrift:
    targets: Tensor | None = None if subject.data is None else subject.data.train.y
    if targets is not None and subject.task == "classification" and record["output"].ndim == 2:
        targets = 2 * targets - 1  # class numbers 0 and 1 of one output a sample
    try:
        return residual_drift(record) if "residual" in record else residual_drift(record, targets)
    except BadInput as error:
        raise NothingMeasured(f"the outputs on record cannot be compared with their targets: {error}") from error


def _of_residuals(drift: ResidualDrift) -> Finding:
    late = drift.residuals[int(SETTLED * len(drift.steps)) :]
    known = np.isfinite(late)
    off = float((np.abs(late[known]) > DELTA).mean()) if known.any() else np.nan
    changes = drift.sign_changes[np.isfinite(drift.sign_changes)]
    total = drift.cumulative[-1]
    coverage = Coverage(len(changes), len(drift.sign_changes), "samples")
    measurements = (
        Measurement(
            "oscillating share",
            off,
            f"How often an output was more than {DELTA:g} off its label after the first quarter of training: near zero "
            "where training settled, large where it kept oscillating.",
            coverage=coverage,
            headline=True,
        ),
        Measurement(
            "sign changes",
            float(changes.mean()) if len(changes) else np.nan,
            "How often the residual of a sample was on the other side of zero at the next measurement.",
            error=float(changes.std()) if len(changes) else None,
            error_kind="standard deviation over samples",
            reference=Range(text="0: outputs approach labels from one side; 1/2: noise; 1: period two"),
        ),
        Measurement(
            "residuals summed up",
            float(total.mean()),
            "The sum of 1 - y f over the measurements, mean over samples. Positive while outputs oscillate, it is what "
            "makes weak features grow.",
            error=float(total.std()),
            error_kind="standard deviation over samples",
        ),
    )
    return Finding(measurements, (_residual_figure(drift),), (_spacing(drift.steps),))


def _of_losses(record: TrainingRecord) -> Finding:
    try:
        turns = loss_reversals(record)
    except BadInput as error:
        raise NothingMeasured(f"too little on record to see an oscillation: {error}") from error
    steps, losses = record.measured(LOSSES)
    known = turns[np.isfinite(turns)]
    coverage = Coverage(len(known), len(turns), "samples", _without_change(len(turns) - len(known)))
    measurements = (
        Measurement(
            "turns of a sample's loss",
            float(known.mean()) if len(known) else np.nan,
            "How often the loss of a sample, having risen, falls at the next measurement, or the other way round.",
            error=float(known.std()) if len(known) else None,
            error_kind="standard deviation over samples",
            reference=Range(text="0: steady; 2/3: independent noise; 1: period two, as above the edge of stability"),
            coverage=coverage,
            headline=True,
        ),
        Measurement(
            "oscillating samples",
            float((known >= PERSISTENT).mean()) if len(known) else np.nan,
            f"The share of samples whose loss turns at {PERSISTENT:.0%} of its measurements or more.",
            coverage=coverage,
        ),
    )
    notes = (
        _spacing(steps),
        "With outputs on record (a column 'output') the residuals' signs and sums would be shown.",
    )
    return Finding(measurements, (_loss_figure(steps, losses, known),), notes)


def _without_change(count: int) -> dict[str, str]:
    return {f"{count} samples": "their loss never changed twice"} if count else {}


def _spacing(steps: np.ndarray) -> str:
    gaps = np.diff(steps)
    return (
        f"{len(steps)} measurements, {int(np.median(gaps)) if len(gaps) else 0} steps apart in the middle: faster "
        "oscillations look like noise."
    )


def _residual_figure(drift: ResidualDrift) -> Figure:
    low, middle, high = np.nanquantile(drift.cumulative, (0.1, 0.5, 0.9), axis=1)
    return Figure(
        "residual-drift",
        "Residuals: their sums and their sign changes",
        "Left: the sum of 1 - y f over the measurements so far, median over samples and 10th to 90th percentile. "
        "Right: samples by the share of neighbouring measurements between which their residual changed sign.",
        {"step": drift.steps, "low": low, "median": middle, "high": high, "sign_changes": drift.sign_changes},
        _draw_residuals,
        size=(8.4, 3.4),
        panels=(1, 2),
    )


def _loss_figure(steps: np.ndarray, losses: np.ndarray, turns: np.ndarray) -> Figure:
    low, middle, high = np.nanquantile(losses, (0.1, 0.5, 0.9), axis=1)
    return Figure(
        "loss-turns",
        "Losses of single samples: how they move and how often they turn",
        "Left: loss over the steps, median over samples and 10th to 90th percentile. Right: samples by the share of "
        "neighbouring changes of their loss that go opposite ways; independent noise gives 2/3.",
        {"step": steps, "low": low, "median": middle, "high": high, "turns": turns},
        _draw_losses,
        size=(8.4, 3.4),
        panels=(1, 2),
    )


def _draw_residuals(panels: Any, data: Mapping[str, Any]) -> None:
    _band(panels[0], data)
    panels[0].set(ylabel="sum of residuals")
    _histogram(panels[1], data["sign_changes"], "sign changes, share of measurements")


def _draw_losses(panels: Any, data: Mapping[str, Any]) -> None:
    _band(panels[0], data)
    panels[0].set(ylabel="loss of a sample", yscale="log")
    _histogram(panels[1], data["turns"], "turns, share of measurements")
    panels[1].axvline(2 / 3, color=PALETTE[6], lw=1, ls="--", label="independent noise")
    panels[1].legend()


def _band(axes: Any, data: Mapping[str, Any]) -> None:
    axes.fill_between(
        data["step"], data["low"], data["high"], color=PALETTE[0], alpha=0.2, lw=0, label="80 % of samples"
    )
    axes.plot(data["step"], data["median"], color=PALETTE[0], label="median")
    axes.set(xlabel="step")
    axes.legend()


def _histogram(axes: Any, values: Any, label: str) -> None:
    known = np.asarray(values)[np.isfinite(values)]
    axes.hist(known, bins=np.linspace(0, 1, 26), color=PALETTE[2])
    axes.set(xlabel=label, ylabel="samples")
