"""The probe "interval-tightness": how loose interval bounds are, in which layers, and what they prove."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corollary.base.errors import CorollaryError, NothingMeasured
from corollary.evidence import PALETTE, Coverage, Figure, Finding, Measurement, Need, Range, Subject, probe
from corollary.verify.bounded_graph import BoundedGraph
from corollary.verify.certified_training import GOWAL_2018
from corollary.verify.ibp_initialisation import MAO_2024
from corollary.verify.interval_margins import IntervalNetwork, box_around, ibp_certified, label_rows
from corollary.verify.sets import Box
from corollary.verify.tightness import LayerTightness, propagation_tightness, tightness_by_layer

MOST = 500
UNITS = 64
FEW = 8
"""Samples that a part is timed on, and that are bounded together."""
SMALL = 0.01
"""The radius of the boxes over the range of the data."""


@dataclass(frozen=True)
class _Question:
    """What is asked: samples with the rows whose bounds count, and the boxes around them."""

    network: IntervalNetwork
    x: Tensor
    labels: Tensor | None
    eps: float
    data_range: tuple[float, float]
    own_answers: bool


@dataclass(frozen=True)
class _Tightness:
    """Tightness of each sample and row, and layer by layer."""

    values: Tensor
    layers: list[LayerTightness]


@probe(
    "interval-tightness",
    room="verify",
    title="Tightness of interval bounds",
    question="How loose do the cheapest certified bounds get in this network, in which layers, and what do they prove?",
    needs=Need.PROGRAM,
    data="inputs",
    sources=(MAO_2024, GOWAL_2018),
)
def interval_tightness(subject: Subject) -> Finding:
    """Local tightness on samples and layer by layer, and the accuracy that interval and linear bounds certify."""
    asked = _question(subject)
    notes: list[str] = []
    found = _attempt("tightness", notes, lambda: _tightness(subject, asked, share=0.4))
    proved = {
        name: _attempt(name, notes, lambda certify=certify: _certified(subject, asked, certify))
        for name, certify in (("intervals", _by_intervals), ("linear bounds (CROWN)", _by_crown(subject)))
        if asked.labels is not None
    }
    measurements = [] if found is None else _of_tightness(found, len(asked.x))
    measurements += [_of_certified(name, hits, asked) for name, hits in proved.items() if hits is not None]
    if not measurements:
        raise NothingMeasured("interval bounds of this network could not be measured.\n" + "\n".join(notes))
    notes.append(
        f"Boxes have half width {asked.eps:.3g}, {SMALL:.0%} of the range of the data, {asked.data_range[0]:g} to "
        f"{asked.data_range[1]:g}, and are cut to it."
    )
    if asked.labels is not None:
        elided = asked.network.last.is_weighted
        how = "multiplied into the last layer" if elided else "taken of the outputs, as the network has no last layer"
        notes.append(f"Bounds are of the margins of the label, {how}.")
    if asked.own_answers:
        notes.append("The data has no labels: the network's own answers stand in for them.")
    return Finding(tuple(measurements), () if found is None else (_figure(found),), tuple(notes))


def _question(subject: Subject) -> _Question:
    x, y = subject.sample(MOST)
    if not x.is_floating_point():
        raise NothingMeasured(f"boxes are drawn around real inputs; here they are {x.dtype}")
    assert subject.data is not None  # the probe asks for inputs
    everything = subject.data.train.x
    low, high = (float(min(everything.min(), x.min())), float(max(everything.max(), x.max())))
    if not high > low:
        raise NothingMeasured(f"all inputs are {low:g}: there is no range to draw boxes in")
    network = IntervalNetwork(subject.graph)
    labels = None
    if subject.task != "regression" and len(network.output.shape) == 2 and network.classes > 1:
        labels = y if subject.task == "classification" and y is not None else _answers(subject, x)
        if bool((labels >= network.classes).any()):
            raise NothingMeasured(f"labels run to {int(labels.max())}; the network has {network.classes} outputs")
    return _Question(network, x, labels, SMALL * (high - low), (low, high), subject.task == "unlabelled")


def _answers(subject: Subject, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([subject.module(part).argmax(1) for part in x.split(256)])


def _attempt(what: str, notes: list[str], measure: Callable[[], Any]) -> Any:
    """What was measured, or None with a note that says why it could not be."""
    try:
        return measure()
    except CorollaryError as error:
        notes.append(f"Not measured, {what}: {str(error).splitlines()[0]}")
        return None


def _tightness(subject: Subject, asked: _Question, share: float) -> _Tightness:
    """On as many samples as a share of the budget allows."""

    def measured(count: int) -> _Tightness:
        x, labels = asked.x[:count], None if asked.labels is None else asked.labels[:count]
        options: dict[str, Any] = {"data_range": asked.data_range}
        values = propagation_tightness(asked.network, x, asked.eps, labels, **options)
        generator = subject.seeds("units of a layer")
        return _Tightness(
            values, tightness_by_layer(asked.network, x, asked.eps, units=UNITS, generator=generator, **options)
        )

    measured(1)  # the first pass pays for what is loaded
    start = time.perf_counter()
    few = measured(min(FEW, len(asked.x)))
    cost = (time.perf_counter() - start) / len(few.values)
    count = min(len(asked.x), int(share * subject.budget.remaining() / cost))
    return few if count <= len(few.values) else measured(count)


Certify = Callable[[_Question, slice], Tensor]


def _certified(subject: Subject, asked: _Question, certify: Certify) -> Tensor:
    """Which samples are certified, as far as half of the remaining budget reaches."""
    limit = time.perf_counter() + subject.budget.remaining() / 2
    found = []
    for start in range(0, len(asked.x), FEW):
        found.append(certify(asked, slice(start, start + FEW)))
        if time.perf_counter() > limit:
            break
    return torch.cat(found)


def _by_intervals(asked: _Question, part: slice) -> Tensor:
    assert asked.labels is not None  # else nothing is certified
    return ibp_certified(asked.network, asked.x[part], asked.labels[part], asked.eps, data_range=asked.data_range)


def _by_crown(subject: Subject) -> Certify:
    bounded: list[BoundedGraph] = []  # prepared at the first call, where an error is noted

    def certify(asked: _Question, part: slice) -> Tensor:
        assert asked.labels is not None  # else nothing is certified
        if not bounded:
            bounded.append(BoundedGraph(subject.graph))
        box = Box(*box_around(asked.x[part], asked.eps, asked.data_range))
        labels = asked.labels[part]
        others = torch.arange(asked.network.classes, device=labels.device) != labels[:, None]
        rows = label_rows(labels, asked.network.classes)[others].reshape(len(labels), -1, asked.network.classes)
        with torch.no_grad():
            lower, _ = bounded[0].bounds(box, rows.to(asked.x), method="crown")
        return (lower > 0).all(1)

    return certify


def _of_tightness(found: _Tightness, samples: int) -> list[Measurement]:
    by_sample = found.values.double().nanmean(1)
    known = by_sample[~by_sample.isnan()]
    undefined = int(found.values.isnan().sum())
    skipped = {f"{undefined} margins": "no unit on the way to them is active"} if undefined else {}
    measurements = [
        Measurement(
            "tightness",
            float(known.mean()) if len(known) else math.nan,
            "Width of the smallest box around the outputs over the width of the box that intervals give, for small "
            "boxes around samples: at 1 the cheapest bounds are exact, near 0 they prove nothing.",
            error=float(known.std() / math.sqrt(len(known))) if len(known) > 1 else None,
            error_kind=f"standard error over {len(known)} samples",
            reference=Range(text="small networks on digits: 0.1 after standard, 0.8 after interval training"),
            coverage=Coverage(len(found.values), samples, "samples", skipped),
            headline=True,
        )
    ]
    if len(found.layers) > 1:
        values = np.array([layer.tightness for layer in found.layers])
        ratios = values[1:] / values[:-1]
        if np.isfinite(ratios).any():
            place = int(np.nanargmin(ratios))
            measurements.append(
                Measurement(
                    "layer that loosens most",
                    f"{found.layers[place + 1].name}: by {1 / ratios[place]:.3g} times",
                    "The layer with which the tightness of the network up to it falls most, against the layer before.",
                )
            )
    return measurements


def _of_certified(name: str, hits: Tensor, asked: _Question) -> Measurement:
    share = float(hits.double().mean())
    cheap = "Costs two passes." if name == "intervals" else "Tighter than intervals, at many times the cost."
    return Measurement(
        f"certified by {name}",
        share,
        f"Share of samples proved to keep their class in the whole box of half width {asked.eps:.3g}. {cheap}",
        error=math.sqrt(share * (1 - share) / len(hits)),
        error_kind=f"standard error over {len(hits)} samples",
        coverage=Coverage(len(hits), len(asked.x), "samples"),
    )


def _figure(found: _Tightness) -> Figure:
    by_sample = found.values.double().nanmean(1)
    return Figure(
        "interval-tightness",
        "Tightness of interval bounds",
        "Left: mean tightness of the network up to and with each layer, over its units; where it falls, the layer "
        "mixes values that intervals take for independent. Right: the samples by the mean tightness of their bounds.",
        {
            "layer": [layer.name for layer in found.layers],
            "layer_tightness": [layer.tightness for layer in found.layers],
            "units": [layer.units for layer in found.layers],
            "units_of": [layer.of for layer in found.layers],
            "sample_tightness": by_sample[~by_sample.isnan()].cpu().numpy(),
        },
        _draw,
        size=(8.6, 3.6),
        panels=(1, 2),
    )


def _draw(axes: Any, data: Mapping[str, Any]) -> None:
    left, right = axes
    places = np.arange(len(data["layer"]))
    left.plot(places, data["layer_tightness"], "o-", color=PALETTE[0])
    left.set(xlabel="up to layer", ylabel="tightness", yscale="log")
    left.set_xticks(places, data["layer"], rotation=0 if len(places) < 7 else 60)
    right.hist(data["sample_tightness"], bins=20, color=PALETTE[1])
    right.set(xlabel="tightness", ylabel="samples")
