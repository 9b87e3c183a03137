"""The probe "regime": how to train with other batch sizes, and how far the weights went from their start."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from corollary.base.errors import BadInput, NothingMeasured
from corollary.dynamics.ghost_batch_norm import GHOSTS, HOFFER_2017
from corollary.dynamics.large_batch import LargeBatchPlan, scale_learning_rate
from corollary.dynamics.weight_diffusion import DiffusionFit, Distances, fit_diffusion, weight_distance
from corollary.evidence import PALETTE, Figure, Finding, Measurement, Need, Range, Subject, Training, probe

RATIOS = (2, 4, 8, 16)
LARGEST_SHARE = 0.5
"""Batches of more than this share of the training set are not proposed."""


@probe(
    "regime",
    room="dynamics",
    title="Batch size, learning rate and epochs",
    question="How would it have to be trained with larger batches, and had its weights stopped wandering?",
    needs=Need.WEIGHTS,
    sources=(HOFFER_2017,),
)
def regime(subject: Subject) -> Finding:
    """Plans for larger batches from the settings it was trained with; the law of the distance from its record."""
    measurements: list[Measurement] = []
    figures: list[Figure] = []
    notes: list[str] = []
    _plans(subject, measurements, figures, notes)
    _wandering(subject, measurements, figures, notes)
    if not measurements:
        raise NothingMeasured(
            "plans for other batches need the settings of training (--batch-size, --learning-rate, --epochs), and the "
            "wandering of the weights a record with the column distance (--record FILE)"
        )
    return Finding(tuple(measurements), tuple(figures), tuple(notes))


def _plans(subject: Subject, measurements: list[Measurement], figures: list[Figure], notes: list[str]) -> None:
    training = subject.training
    batch, rate = training.batch_size, training.learning_rate
    if batch is None or rate is None:
        notes.append(
            "Plans for other batches need the batch size and the learning rate (--batch-size, --learning-rate)."
        )
        return
    samples = None if subject.data is None else len(subject.data.train.x)
    batches = [batch * ratio for ratio in RATIOS if samples is None or batch * ratio <= LARGEST_SHARE * samples]
    if not batches:
        notes.append(f"The batch of {batch} is a large share of the training set: no larger one is proposed.")
        return
    plans = [LargeBatchPlan(batch, rate, training.epochs or 1, larger) for larger in batches]
    largest = plans[-1]
    measurements.append(
        Measurement(
            f"learning rate for batches of {largest.batch}",
            largest.learning_rate,
            f"The learning rate {rate:g} of batches of {batch}, times the root of the ratio {largest.ratio:g}, which "
            "keeps the covariance of an update.",
        )
    )
    if training.epochs is not None:
        measurements.append(
            Measurement(
                f"epochs for batches of {largest.batch}",
                largest.epochs,
                f"With which there are as many updates as in the {training.epochs} epochs with batches of {batch}: at "
                "equal epochs larger batches generalise worse because they make fewer updates.",
            )
        )
    norms = [part for part in subject.module.modules() if type(part) in GHOSTS]
    if norms:
        notes.append(
            f"Its {len(norms)} batch normalisations should keep taking their statistics over {batch} samples: "
            f"corollary.dynamics.ghostify(net, virtual_batch={batch}) replaces them, state and all."
        )
    figures.append(_plan_figure(training, [batch, *batches], rate))


def _plan_figure(training: Training, batches: list[int], rate: float) -> Figure:
    known = batches[0]
    columns: dict[str, Any] = {
        "batch": batches,
        "sqrt": [scale_learning_rate(rate, batch, known) for batch in batches],
        "linear": [scale_learning_rate(rate, batch, known, "linear") for batch in batches],
        "epochs": [LargeBatchPlan(known, rate, training.epochs or 1, batch).epochs for batch in batches],
    }
    epochs = "" if training.epochs is None else " Beside each batch: the epochs that make as many updates."
    return Figure(
        "large-batch-plan",
        "Learning rates for larger batches",
        f"From the learning rate {rate:g} at batches of {known}: by the root of the ratio, which keeps the noise of an "
        f"update, and in proportion, which keeps its mean over an epoch.{epochs}",
        columns,
        _draw_plan if training.epochs is not None else _draw_rates,
    )


def _draw_rates(axes: Any, data: Mapping[str, Any]) -> None:
    axes.plot(data["batch"], data["sqrt"], "o-", color=PALETTE[0], label="by the root")
    axes.plot(data["batch"], data["linear"], "s--", color=PALETTE[1], label="in proportion")
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="learning rate")
    axes.set_xticks(data["batch"], [str(batch) for batch in data["batch"]])
    axes.minorticks_off()
    axes.legend()


def _draw_plan(axes: Any, data: Mapping[str, Any]) -> None:
    _draw_rates(axes, data)
    for batch, rate, epochs in zip(data["batch"], data["sqrt"], data["epochs"], strict=True):
        axes.annotate(
            f"{epochs} epochs",
            (batch, rate),
            textcoords="offset points",
            xytext=(0, -14),
            ha="center",
            fontsize="small",
        )
    axes.margins(0.12)


def _wandering(subject: Subject, measurements: list[Measurement], figures: list[Figure], notes: list[str]) -> None:
    if subject.record is None:
        notes.append("How the weights wandered is read from a record with the column distance (--record FILE).")
        return
    try:
        path = weight_distance(subject.record)
        fit = fit_diffusion(*path)
    except BadInput as error:
        notes.append(f"Not measured, the law of the distance: {error}.")
        return
    measurements.append(
        Measurement(
            "distance from the start",
            float(path.distance[-1]),
            f"Euclidean distance of all trained parameters from their initial values after {path.updates[-1]:.0f} "
            "updates.",
        )
    )
    measurements.append(
        Measurement(
            "logarithmic law of the distance",
            fit.r2_log,
            "Share of the variance of the distance that c0 + c1 log t explains from update 5 on; "
            f"c1 is {fit.slope:.3g}, and the root of t explains {fit.r2_root:.3f}. Ultra-slow diffusion means that "
            "weights keep moving, ever "
            "slower: ten times the updates add as much distance each time.",
            unit="R²",
            reference=Range(0.97, 1.0, "at a constant learning rate, early in training"),
        )
    )
    figures.append(_distance_figure(path, fit))


def _distance_figure(path: Distances, fit: DiffusionFit) -> Figure:
    return Figure(
        "distance-from-start",
        "How far the weights went",
        "Distance of the weights from their start over updates, with the fitted logarithm.",
        {"updates": path.updates, "distance": path.distance, "logarithm": fit.at(path.updates)},
        _draw_distance,
    )


def _draw_distance(axes: Any, data: Mapping[str, Any]) -> None:
    axes.plot(data["updates"], data["distance"], "o", color=PALETTE[0], markersize=3, label="measured")
    late = np.asarray(data["updates"]) >= 5
    axes.plot(data["updates"][late], data["logarithm"][late], color=PALETTE[1], label="logarithm")
    axes.set(xscale="log", xlabel="updates", ylabel="distance from the start")
    axes.legend()
