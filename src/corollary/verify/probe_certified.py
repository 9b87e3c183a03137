"""The probe "certified": what linear bounds prove of the network's answers, and where the bounds widen."""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corollary.base.errors import NothingMeasured
from corollary.evidence import PALETTE, Coverage, Figure, Finding, Measurement, Need, Source, Subject, probe
from corollary.graph import Graph
from corollary.graph.ops import Elementwise
from corollary.verify.accuracy import CertifiedAccuracy, certified_accuracy
from corollary.verify.classifier import predictions
from corollary.verify.prepared import prepare
from corollary.verify.sets import Box
from corollary.verify.sweep import sweep

ZHANG_2018 = Source(
    key="zhang2018efficient",
    authors=("Huan Zhang", "Tsui-Wei Weng", "Pin-Yu Chen", "Cho-Jui Hsieh", "Luca Daniel"),
    title="Efficient neural network robustness certification with general activation functions",
    year=2018,
    arxiv="1811.00866",
)
SHARES = (0.001, 0.003, 0.01, 0.03, 0.1)
"""Radii, as shares of the range of the inputs."""
MIDDLE = 2
"""Of them, the one whose figures are given in words."""
MOST = 500
TIMED = 4
"""Samples bounded first, to see how many more the budget allows."""
SHARE_OF_BUDGET = 0.5


@probe(
    "certified",
    room="verify",
    title="Certified accuracy",
    question="Which answers can no small perturbation change, provably, and which does an attack change?",
    needs=Need.PROGRAM,
    data="inputs",
    sources=(ZHANG_2018,),
)
def certified(subject: Subject) -> Finding:
    """Certified accuracy and accuracy under attack at a few radii; unstable neurons and mean gaps by layer."""
    x, y = subject.sample(MOST)
    if subject.task == "regression" or not x.is_floating_point():
        raise NothingMeasured(
            "certified accuracy is that of a classifier with floating inputs; "
            f"here the task is {subject.task} and the inputs are {x.dtype}"
        )
    labels = y if subject.task == "classification" and y is not None else predictions(subject.module, x)
    spread = float(x.max() - x.min())
    if not spread > 0:
        raise NothingMeasured("all inputs are equal: there is no scale for the size of a perturbation")
    radii = [share * spread for share in SHARES]
    count = _affordable(subject, subject.graph, x, labels, radii)
    coverage = Coverage(count, len(x), "samples")
    found = certified_accuracy(subject.graph, (x[:count], labels[:count]), radii, clip=None)
    layers = gaps_by_layer(subject.graph, x[: min(count, 64)], radii[MIDDLE])
    notes = [
        "Perturbations are measured in their largest entry (L-inf), in the units of the inputs, and may leave the "
        "range of the data.",
        "Certified by linear bounds (CROWN) in double precision; branch and bound (corollary certify) proves more.",
    ]
    if subject.task != "classification":
        notes.append("There are no labels: an answer counts as right where it is the one without a perturbation.")
    return Finding(
        (*_of_accuracy(found, coverage), *_of_layers(layers)),
        (replace(found.figure(), name="certified-accuracy"), _gap_figure(layers, radii[MIDDLE])),
        tuple(notes),
    )


def _affordable(subject: Subject, graph: Graph, x: Tensor, y: Tensor, radii: list[float]) -> int:
    """How many samples half of what is left of the budget allows for, by the time that a few take."""
    few = min(TIMED, len(x))
    start = time.monotonic()
    certified_accuracy(graph, (x[:few], y[:few]), radii[MIDDLE : MIDDLE + 1], clip=None)
    each = (time.monotonic() - start) * len(radii) / few
    allowed = SHARE_OF_BUDGET * subject.budget.remaining() / max(each, 1e-9)
    return max(few, min(len(x), int(min(allowed, len(x)))))


def gaps_by_layer(graph: Graph, x: Tensor, radius: float) -> dict[str, list[Any]]:
    """For each node that a nonlinear op reads: the mean width of its bounds, and the share of unstable entries.

    Over boxes of this radius around each sample, by linear bounds. An entry is unstable where a kink of what reads it
    lies inside its bounds; NaN where nothing that reads it has one.
    """
    network = prepare(graph, dtype=torch.float64)
    center = x.to(network.dtype)
    known = sweep(network, [Box(center - radius, center + radius)]).known
    table: dict[str, list[Any]] = {"layer": [], "gap": [], "unstable": []}
    for node in network.graph:
        if node not in network.bounded:
            continue
        lower, upper = known.flat(node)
        readers = [reader for reader in network.nonlinear if node in reader.inputs]
        kinks = {k for r in readers if isinstance(r.op, Elementwise) for k in r.op.kinks}
        inside = torch.zeros_like(lower, dtype=torch.bool)
        for kink in kinks:
            inside |= (lower < kink) & (upper > kink)
        gaps = (upper - lower)[(upper - lower).isfinite()]
        table["layer"].append(node.layer or node.name)
        table["gap"].append(float(gaps.mean()) if len(gaps) else math.inf)
        table["unstable"].append(float(inside.double().mean()) if kinks else math.nan)
    return table


def _of_accuracy(found: CertifiedAccuracy, coverage: Coverage) -> list[Measurement]:
    radius = found.radii[MIDDLE]
    lower, upper = float(found.lower[MIDDLE]), float(found.upper[MIDDLE])
    holding = [r for r, share in zip(found.radii, found.lower.tolist(), strict=True) if share >= 0.5 * found.clean]
    return [
        Measurement(
            "certified accuracy",
            lower,
            f"Share of the samples whose right answer provably no perturbation up to {radius:.3g} (one percent of the "
            "range of the inputs) changes.",
            coverage=coverage,
            headline=True,
        ),
        Measurement(
            "accuracy under attack",
            upper,
            f"Share of the samples whose right answer projected gradient did not change within {radius:.3g}; the "
            "accuracy under the worst perturbation lies between this and the certified one.",
            coverage=coverage,
        ),
        Measurement(
            "undecided",
            upper - lower,
            f"Share of the samples at {radius:.3g} that linear bounds cannot prove and the attack cannot change.",
            coverage=coverage,
        ),
        Measurement(
            "radius with half of the answers certified",
            max(holding) if holding else 0.0,
            "The largest of the radii tried at which at least half of the right answers are certified.",
            unit="input units",
            coverage=coverage,
        ),
    ]


def _of_layers(layers: dict[str, list[Any]]) -> list[Measurement]:
    shares = [share for share in layers["unstable"] if not math.isnan(share)]
    if not shares:
        return []
    return [
        Measurement(
            "unstable neurons",
            float(np.mean(shares)),
            "Share of the neurons with a kink inside their bounds at one percent of the range of the inputs, a mean "
            "over layers; stable ones are exactly linear to the bounds.",
        )
    ]


def _gap_figure(layers: dict[str, list[Any]], radius: float) -> Figure:
    return Figure(
        "pre-activation-gaps",
        "Where the bounds widen",
        f"Mean width of the bounds of what nonlinear ops read, layer by layer, for perturbations up to {radius:.3g}; "
        "and the share of neurons whose kink lies inside their bounds.",
        layers,
        _draw_gaps,
    )


def _draw_gaps(axes: Any, data: Mapping[str, Any]) -> None:
    places = np.arange(len(data["layer"]))
    gaps = np.asarray(data["gap"], dtype=float)
    axes.plot(places, np.where(np.isfinite(gaps), gaps, np.nan), "o-", color=PALETTE[0], label="mean width of bounds")
    axes.set(xlabel="layer", ylabel="mean width of bounds", yscale="log" if (gaps > 0).all() else "linear")
    shown = places[:: max(1, len(places) // 12)]
    axes.set_xticks(shown, [str(data["layer"][i]) for i in shown], rotation=30, ha="right")
    axes.legend(loc="upper left")
    shares = np.asarray(data["unstable"], dtype=float)
    if np.isfinite(shares).any():
        beside = axes.twinx()
        beside.plot(places, shares, "s--", color=PALETTE[1], label="unstable share")
        beside.set(ylabel="unstable share", ylim=(0, 1))
        beside.legend(loc="upper right")
