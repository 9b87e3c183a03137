"""The probe "learning-rate-window": the rates at which this network is stable, catapults or flies apart."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corollary.base.errors import BadInput, NothingMeasured
from corollary.dynamics.catapult_record import Catapults, find_catapults
from corollary.dynamics.quadratic_models import LEWKOWYCZ_2020, MELTZER_2023
from corollary.evidence import PALETTE, Coverage, Figure, Finding, Measurement, Need, Range, Subject, probe
from corollary.linalg import eigenpairs, ggn

MOST = 1000
FEW = 64
"""Samples that the time of a product is measured on."""
PRODUCTS = 40
"""Products that a top eigenvalue takes, about."""
BATCHES = 5
"""Batches of the user's own size whose windows stand beside that of all samples."""
TOLERANCE = 1e-3


@dataclass(frozen=True)
class _Curvature:
    """The top eigenvalue over all measured samples, with its residual, and over batches of the size trained with."""

    top: float
    residual: float
    samples: int
    batch_size: int | None
    of_batches: np.ndarray


@probe(
    "learning-rate-window",
    room="dynamics",
    title="Learning-rate window",
    question="Up to which learning rate are these weights stable, and up to which would training survive a catapult?",
    needs=Need.GRADIENTS,
    data="targets",
    sources=(MELTZER_2023, LEWKOWYCZ_2020),
)
def learning_rate_window(subject: Subject) -> Finding:
    """2 and 4 over the top eigenvalue of the Gauss-Newton matrix, beside the rate used, and catapults on the record."""
    found = _curvature(subject)
    if not found.top > 0:
        raise NothingMeasured(
            f"the top eigenvalue of the Gauss-Newton matrix is {found.top:g}: the loss does not react to the weights"
        )
    measurements = [_of_top(subject, found), *_of_window(subject, found)]
    notes = [_which(subject), *_of_rule(subject)]
    catapults = _catapults(subject, notes)
    if catapults is not None:
        measurements.append(_of_record(catapults))
    figures = [_figure(subject, found)]
    if catapults is not None and len(catapults):
        figures.append(catapults.figure())
    return Finding(tuple(measurements), tuple(figures), tuple(notes))


def _curvature(subject: Subject) -> _Curvature:
    x, y = subject.sample(MOST, "train")
    assert y is not None  # the probe asks for targets
    budget = subject.budget.remaining()
    start = time.perf_counter()
    few = _top(subject, x[:FEW], y[:FEW])
    cost = (time.perf_counter() - start) / min(FEW, len(x))
    count = min(len(x), int(0.6 * budget / cost))
    top, residual = few if count <= FEW else _top(subject, x[:count], y[:count])
    size = subject.training.batch_size
    if size is None or size >= count or BATCHES * size * cost > subject.budget.remaining():
        return _Curvature(top, residual, max(count, min(FEW, len(x))), None, np.empty(0))
    starts = range(0, min(BATCHES * size, count - size + 1), size)
    tops = [_top(subject, x[i : i + size], y[i : i + size])[0] for i in starts]
    return _Curvature(top, residual, max(count, min(FEW, len(x))), size, np.array(tops))


def _top(subject: Subject, x: Tensor, y: Tensor) -> tuple[float, float]:
    operator = ggn(subject.module, subject.loss, (x, y))
    generator: torch.Generator = subject.seeds("start of Lanczos")
    pairs = eigenpairs(operator, 1, tolerance=TOLERANCE, steps=PRODUCTS, generator=generator)
    return float(pairs.values[0]), float(pairs.residuals[0])


def _of_top(subject: Subject, found: _Curvature) -> Measurement:
    assert subject.data is not None  # the probe asks for targets
    return Measurement(
        "top eigenvalue",
        found.top,
        "The largest curvature of the loss that comes from the network's tangent kernel: 2 over it is the largest "
        "learning rate at which full-batch gradient descent stays near these weights.",
        error=found.residual,
        error_kind="residual of the eigenvalue",
        coverage=Coverage(found.samples, len(subject.data.train.x), "training samples"),
    )


def _of_window(subject: Subject, found: _Curvature) -> list[Measurement]:
    lower, upper = 2 / found.top, 4 / found.top
    measurements = [
        Measurement(
            "catapult window, lower end",
            lower,
            "Below this learning rate full-batch gradient descent settles where it is (the lazy phase).",
        ),
        Measurement(
            "catapult window, upper end",
            upper,
            "Up to here quadratic models and two-layer networks provably survive: the loss first grows, then training "
            "lands where it is flatter. ReLU networks may survive somewhat larger rates.",
        ),
    ]
    rate, momentum = subject.training.learning_rate, subject.training.momentum
    if rate is not None and subject.training.optimizer == "sgd":
        edge = 2 * (1 + momentum)
        measurements.append(
            Measurement(
                "learning rate times top eigenvalue",
                rate * found.top,
                "Where the rate that was used stands: below the stable limit training settles in this minimum, above "
                "it full batches would have left it.",
                reference=Range(high=edge, text=f"stable at momentum {momentum:g}" if momentum else "stable"),
                headline=True,
            )
        )
        if len(found.of_batches):
            measurements.append(
                Measurement(
                    f"the same, batches of {found.batch_size}",
                    float(rate * found.of_batches.mean()),
                    "The same number for single batches of the size trained with, whose curvature is larger than that "
                    "of all samples together: above the limit, single steps overshoot.",
                    error=float(rate * found.of_batches.std(ddof=1)) if len(found.of_batches) > 1 else None,
                    error_kind=f"standard deviation over {len(found.of_batches)} batches",
                    reference=Range(high=edge, text="single batches stable"),
                )
            )
    return measurements


def _which(subject: Subject) -> str:
    if subject.task == "classification":
        return (
            "The eigenvalue is that of the Gauss-Newton matrix of the network's own loss. For cross-entropy it shrinks "
            "as the training samples are fitted, so that the window of a trained classifier is wide; the theory's "
            "upper end is proved for the square loss only."
        )
    return (
        "The eigenvalue is that of the Gauss-Newton matrix of the network's own loss: for a square loss the top "
        "eigenvalue of the tangent kernel, times the loss's own factor."
    )


def _of_rule(subject: Subject) -> list[str]:
    training = subject.training
    if training.learning_rate is None:
        return ["With --learning-rate the rate that was used is set beside the window."]
    if training.optimizer != "sgd":
        return [
            f"The window is one of gradient descent; {training.optimizer} rescales every step, so that its rate "
            f"{training.learning_rate:g} cannot be compared with it."
        ]
    if training.momentum:
        return [
            f"The window is one of plain gradient descent. With momentum {training.momentum:g} the stable limit is "
            f"{2 * (1 + training.momentum):g} over the eigenvalue instead of 2; there is no theorem on the upper end."
        ]
    return []


def _catapults(subject: Subject, notes: list[str]) -> Catapults | None:
    """Those on the record, if there is one with a loss to search."""
    if subject.record is None:
        notes.append("With --record FILE the training record is searched for catapults.")
        return None
    try:
        found = find_catapults(subject.record)
    except BadInput as error:
        notes.append(f"Not searched for catapults: {error}")
        return None
    if found.loss == "loss":
        notes.append(
            "The record holds losses of batches only: a rise of such a loss may be noise, not a catapult. Record the "
            "loss over the training set as train_loss."
        )
    return found


def _of_record(found: Catapults) -> Measurement:
    largest = max(found.found, key=lambda one: one.growth, default=None)
    detail = "" if largest is None else f" The largest grew {largest.growth:.3g} times from step {largest.start} on."
    flattened = [one.flattened for one in found.found if one.flattened is not None]
    if flattened:
        detail += f" {sum(flattened)} of {len(flattened)} ended at a smaller curvature."
    elif found.found:
        detail += " No curvature is on record ('sharpness'), by which a catapult differs from the noise of batches."
    return Measurement(
        "catapults on record",
        len(found),
        f"How often the {'training' if found.loss == 'train_loss' else 'batch'} loss at least doubled and then fell "
        f"below where it had been.{detail}",
        coverage=Coverage(len(found.steps), len(found.steps), "measurements of the loss"),
    )


def _figure(subject: Subject, found: _Curvature) -> Figure:
    names, tops = [f"{found.samples:,} samples"], [found.top]
    if len(found.of_batches):
        names.append(f"batches of {found.batch_size}")
        tops.append(float(found.of_batches.mean()))
    rate = subject.training.learning_rate if subject.training.optimizer == "sgd" else None
    return Figure(
        "learning-rate-window",
        "Phases of the learning rate at these weights",
        "By the top eigenvalue over the samples named at the left: rates at which gradient descent stays (lazy), grows "
        "and lands somewhere flatter (catapult), and beyond the range in which survival is proved.",
        {
            "samples": names,
            "lower": [2 / top for top in tops],
            "upper": [4 / top for top in tops],
            "rate": [np.nan if rate is None else rate] * len(tops),
        },
        _draw,
        size=(6.4, 1.6 + 0.5 * len(tops)),
    )


def _draw(axes: Any, data: Mapping[str, Any]) -> None:
    lower, upper = np.asarray(data["lower"]), np.asarray(data["upper"])
    rate = float(data["rate"][0])
    shown = np.concatenate([lower, upper, [] if np.isnan(rate) else [rate]])
    left, right = shown.min() / 3, shown.max() * 3
    height = np.arange(len(lower))[::-1]
    for start, end, color, label in (
        (np.full_like(lower, left), lower, PALETTE[0], "lazy"),
        (lower, upper, PALETTE[4], "catapult"),
        (upper, np.full_like(upper, right), PALETTE[1], "beyond"),
    ):
        axes.barh(height, end - start, left=start, color=color, alpha=0.75, height=0.6, label=label)
    if not np.isnan(rate):
        axes.axvline(rate, color=PALETTE[6], lw=2, label="rate used")
    axes.set(xscale="log", xlim=(left, right), xlabel="learning rate", yticks=height)
    axes.set_yticklabels(data["samples"])
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
