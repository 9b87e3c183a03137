"""The probe "grokking": how linear the function is on the data, and how long generalising took after fitting."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corollary.base.errors import CorollaryError, NothingMeasured
from corollary.dynamics.grokking import XU_2024, AffineShare, affine_share, grokking_delay, odd_fraction, outputs_of
from corollary.engine import TrainingRecord
from corollary.evidence import PALETTE, Coverage, Figure, Finding, Measurement, Need, Range, Source, Subject, probe

NAKKIRAN_2019 = Source(
    key="nakkiran2019sgd",
    authors=(
        "Preetum Nakkiran",
        "Gal Kaplun",
        "Dimitris Kalimeris",
        "Tristan Yang",
        "Benjamin Edelman",
        "Fred Zhang",
        "Boaz Barak",
    ),
    title="SGD on neural networks learns functions of increasing complexity",
    year=2019,
    arxiv="1905.11604",
)
MOST = 10_000
"""Samples that an affine map is fitted to."""
MOST_INPUTS = 2_000
SHOWN = 2_000
"""Points in the figure."""


@probe(
    "grokking",
    room="dynamics",
    title="Linear share and grokking",
    question="How much of what the network computes is linear, and did it generalise long after it had fitted?",
    needs=Need.FORWARD,
    data="inputs",
    sources=(XU_2024, NAKKIRAN_2019),
)
def grokking(subject: Subject) -> Finding:
    """The delay of a training record, the affine share on the data, and the odd fraction where it means something."""
    measurements: list[Measurement] = []
    figures: list[Figure] = []
    notes: list[str] = []
    if subject.record is None:
        notes.append("How long generalising took after fitting is read from a training record: give one (--record).")
    else:
        _of_record(subject.record, measurements, figures, notes)
    try:
        share, coverage = _affine(subject)
    except CorollaryError as error:
        notes.append(f"Not measured, affine share: {str(error).splitlines()[0]}.")
    else:
        measurements.append(_of_share(subject, share, coverage, headline=not any(m.headline for m in measurements)))
        figures.append(_scatter(share, subject))
    _of_odd_part(subject, measurements, notes)
    if not measurements:
        raise NothingMeasured("nothing is known of how linear the network is.\n" + "\n".join(notes))
    return Finding(tuple(measurements), tuple(figures), tuple(notes))


# --------------------------------------------------------------------------------------------------------- the record


def _of_record(
    record: TrainingRecord, measurements: list[Measurement], figures: list[Figure], notes: list[str]
) -> None:
    try:
        found = grokking_delay(record)
    except CorollaryError as error:
        notes.append(f"Not measured, grokking delay: {str(error).splitlines()[0]}.")
        return
    train = "train_accuracy" if "train_accuracy" in record.columns else "accuracy"
    if train == "accuracy":
        notes.append("The record has the accuracy of single training batches only, which may reach 1 by chance.")
    best = {name: float(np.nanmax(record.measured(name)[1])) for name in (train, "test_accuracy")}
    figures.append(_curves(record, train))
    if math.isnan(found.delay):
        notes.append(
            f"No grokking delay: the training accuracy reached {best[train]:.3f} (1 counts as fitted), the test "
            f"accuracy {best['test_accuracy']:.3f} (0.95 counts as generalised)."
        )
        return
    measurements.append(
        Measurement(
            "grokking delay",
            found.delay,
            f"Steps from the first training accuracy of 1, at step {found.fit:.0f}, to the first test accuracy of "
            f"0.95, at step {found.generalise:.0f}; below 0 the network generalised before it had fitted.",
            unit="steps",
            reference=Range(text="far above 0 only where training began by memorising"),
            headline=train == "train_accuracy",
        )
    )


def _curves(record: TrainingRecord, train: str) -> Figure:
    columns = {"step": record.steps, "training": record[train], "test": record["test_accuracy"]}
    return Figure(
        "grokking-delay",
        "Fitting and generalising",
        "Accuracy on training and on test data over the steps of the record; the gap between the rises is the delay.",
        columns,
        _draw_curves,
    )


def _draw_curves(axes: Any, data: Mapping[str, Any]) -> None:
    for i, name in enumerate(("training", "test")):
        present = ~np.isnan(data[name])
        axes.plot(data["step"][present] + 1, data[name][present], color=PALETTE[i], label=name)
    axes.set(xscale="log", xlabel="step + 1", ylabel="accuracy", ylim=(0, 1.03))
    axes.legend(loc="lower right")


# ------------------------------------------------------------------------------------------------------- affine share


def _affine(subject: Subject) -> tuple[AffineShare, Coverage]:
    """Fitted on training samples and judged on test samples, or on two halves where there is no test part."""
    assert subject.data is not None  # the probe asks for inputs
    x = _samples(subject, "train")
    if subject.data.test is None:
        order = torch.randperm(len(x), generator=subject.seeds("halves")).to(x.device)
        fit, held_out = x[order[: len(x) // 2]], x[order[len(x) // 2 :]]
    else:
        fit, held_out = x, _samples(subject, "test")
    if (inputs := fit[0].numel()) > MOST_INPUTS:
        raise NothingMeasured(f"an affine map is fitted for at most {MOST_INPUTS:,} inputs, here they are {inputs:,}")
    share = affine_share(fit, _centred(subject, fit), held_out, _centred(subject, held_out))
    whole = len(subject.data.train.x) + (0 if subject.data.test is None else len(subject.data.test.x))
    return share, Coverage(len(fit) + len(held_out), whole, "samples")


def _samples(subject: Subject, split: Any) -> Tensor:
    x, _ = subject.sample(MOST, split)
    if not x.is_floating_point():
        raise NothingMeasured(f"linear in what: the inputs are {x.dtype}, not real numbers")
    return x


def _centred(subject: Subject, x: Tensor) -> Tensor:
    """Outputs; of a classifier without what all logits share, which decides nothing."""
    outputs = outputs_of(subject.module, x)
    classes = subject.task != "regression" and outputs.ndim == 2 and outputs.shape[1] > 1
    return outputs - outputs.mean(1, keepdim=True) if classes else outputs


def _of_share(subject: Subject, share: AffineShare, coverage: Coverage, headline: bool) -> Measurement:
    what = "logits" if subject.task == "classification" else "outputs"
    agree = ""
    if share.outputs.shape[1] > 1 and subject.task != "regression":
        same = (share.outputs.argmax(1) == share.fitted.argmax(1)).double().mean()
        agree = f" The affine map answers like the network on {same:.1%} of the samples."
    return Measurement(
        "affine share of the function",
        share.r2,
        f"Share of the variance of the {what} over held-out samples that one affine map of the inputs explains: at 1 "
        f"the network does nothing on this data that a linear model could not.{agree}",
        reference=Range(text="near 1 early in training, lower once features are learned"),
        coverage=coverage,
        headline=headline,
    )


def _scatter(share: AffineShare, subject: Subject) -> Figure:
    values, fitted = share.outputs.flatten().numpy(), share.fitted.flatten().numpy()
    if len(values) > SHOWN:
        chosen = torch.randperm(len(values), generator=subject.seeds("shown"))[:SHOWN].numpy()
        values, fitted = values[chosen], fitted[chosen]
    return Figure(
        "linear-share",
        "The network against the best affine map",
        f"Outputs on held-out samples against those of the affine map ({len(values):,} of {share.outputs.numel():,}); "
        "on the line the network is linear.",
        {"affine": fitted, "network": values},
        _draw_scatter,
        size=(4.6, 4.2),
    )


def _draw_scatter(axes: Any, data: Mapping[str, Any]) -> None:
    ends = [min(data["affine"].min(), data["network"].min()), max(data["affine"].max(), data["network"].max())]
    axes.plot(ends, ends, color=PALETTE[6], linewidth=1, label="equal")
    axes.plot(data["affine"], data["network"], ".", color=PALETTE[0], alpha=0.3, markersize=3, rasterized=True)
    axes.set(xlabel="affine map", ylabel="network")
    axes.legend(loc="upper left")


# ----------------------------------------------------------------------------------------------------------- odd part


def _of_odd_part(subject: Subject, measurements: list[Measurement], notes: list[str]) -> None:
    """The odd part of a network without biases, and whether it is the linear part, as pairs of samples tell."""
    x, _ = subject.sample(1000)
    if not x.is_floating_point():
        return
    f, doubled = outputs_of(subject.module, x), outputs_of(subject.module, 2 * x)
    if not _close(doubled, 2 * f) or not bool(f.any()):
        notes.append(
            "The odd fraction is for networks without biases, whose outputs double with their inputs; these do not."
        )
        return
    partner = x.roll(1, 0)
    odd, other, joint = (
        outputs_of(subject.module, point) - outputs_of(subject.module, -point) for point in (x, partner, x + partner)
    )
    linear = _close(joint, odd + other)
    measurements.append(
        Measurement(
            "odd fraction of the function",
            odd_fraction(subject.module, x),
            "Share of the squared outputs that changes sign when the input does. "
            + (
                "On pairs of samples that part adds up, so it is linear: the rest is what the ReLUs do."
                if linear
                else "That part does not add up on pairs of samples, so it is not linear alone."
            ),
            reference=Range(text="1 after a first step from small weights, lower once features are learned"),
            coverage=Coverage(len(x), _available(subject), "samples"),
        )
    )


def _available(subject: Subject) -> int:
    assert subject.data is not None  # the probe asks for inputs
    return len((subject.data.test or subject.data.train).x)


def _close(found: Tensor, wanted: Tensor) -> bool:
    """Equal up to the rounding of a deep network: a thousand units in the last place of the largest value."""
    return float((found - wanted).abs().max()) <= 1e3 * torch.finfo(found.dtype).eps * float(wanted.abs().max())
