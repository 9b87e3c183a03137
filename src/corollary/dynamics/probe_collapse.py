"""The probe "collapse": class means and features at the end of training, the rank of the layers, scale and margins."""

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corollary.base.errors import CorollaryError, NothingMeasured
from corollary.base.network import call
from corollary.dynamics.collapse import PAPYAN_2020, NeuralCollapse, neural_collapse
from corollary.dynamics.ranks import GALANTI_2022, RankProfile, rank_profile, weight_names
from corollary.dynamics.rho import XU_2023, RhoModel
from corollary.evidence import PALETTE, Coverage, Figure, Finding, Measurement, Need, Range, Subject, probe
from corollary.graph import Graph

SAMPLES = 5000
TRIED = 64
"""Samples on which the time of a pass is measured."""
DECOMPOSED_PER_SECOND = 1e10
"""Operations of a singular value decomposition that one busy core does in a second."""


@probe(
    "collapse",
    room="dynamics",
    title="Neural collapse, rank and margins",
    question="How far did training go: have features collapsed to class means, and layers to a low rank?",
    needs=Need.WEIGHTS,
    sources=(XU_2023, PAPYAN_2020, GALANTI_2022),
)
def collapse(subject: Subject) -> Finding:
    """NC1 to NC4 on training samples, singular spectra of all layers, and margins where the network is homogeneous."""
    notes: list[str] = []
    profile = _ranks(subject, notes)
    data = _samples(subject, notes)
    collapsed = data and _attempt("neural collapse", notes, lambda: neural_collapse(subject.graph, data))
    scaled = data and _attempt("scale and margins", notes, lambda: _margins(subject, *data))
    measurements = [
        *([] if collapsed is None else _of_collapse(collapsed, subject)),
        *([] if profile is None else _of_ranks(profile)),
        *([] if scaled is None else _of_margins(*scaled)),
    ]
    if not measurements:
        raise NothingMeasured("neither rank nor collapse of this network could be measured.\n" + "\n".join(notes))
    figures = [made.figure() for made in (profile, collapsed) if made is not None]
    if scaled is not None:
        figures.append(_margin_figure(scaled[1]))
    return Finding(tuple(measurements), tuple(figures), tuple(notes))


def _attempt(what: str, notes: list[str], measure: Any) -> Any:
    """What was measured, or None with a note that says why it could not be."""
    try:
        return measure()
    except CorollaryError as error:
        notes.append(f"Not measured, {what}: {error}")
        return None


# ------------------------------------------------------------------------------------------------ what can be afforded


def _ranks(subject: Subject, notes: list[str]) -> RankProfile | None:
    """Ranks of as many layers as a third of the budget allows, the cheapest first."""
    net = subject.program if isinstance(subject.program, Graph) else subject.module
    left = subject.budget.remaining() / 3
    sides = weight_names(net)
    affordable = []
    for name, cost in sorted(((name, _seconds(*shape)) for name, shape in sides.items()), key=lambda pair: pair[1]):
        left -= cost
        if left > 0:
            affordable.append(name)
    if len(affordable) < len(sides):
        notes.append(
            f"Ranks: {len(affordable)} of {len(sides)} weights were decomposed; the larger ones would take longer than "
            "the time given."
        )
    if not affordable:
        notes.append("No rank was measured: no weight matrix could be decomposed in the time given.")
        return None
    # An operator of e entries, square at worst, takes about 8 e^1.5 operations; all of them share what is left.
    share = max(left, 0.0) / len(affordable)
    largest = int((share * DECOMPOSED_PER_SECOND / 8) ** (2 / 3))
    return _attempt("ranks", notes, lambda: rank_profile(net, layers=affordable, largest_operator=min(largest, 2**21)))


def _seconds(rows: int, columns: int) -> float:
    return 8.0 * min(rows, columns) ** 2 * max(rows, columns) / DECOMPOSED_PER_SECOND


def _samples(subject: Subject, notes: list[str]) -> tuple[Tensor, Tensor] | None:
    """Training samples, as many as can be run through the network in a third of the budget."""
    if subject.task != "classification" or subject.data is None:
        notes.append("Neural collapse and margins are of classifiers on labelled data, which is not what was given.")
        return None
    x, y = subject.sample(SAMPLES, "train")
    assert y is not None  # classification has labels
    with torch.no_grad():
        call(subject.module, x[:TRIED])  # the first pass sets things up
        start = time.perf_counter()
        call(subject.module, x[:TRIED])
    each = (time.perf_counter() - start) / min(TRIED, len(x))
    count = min(len(x), max(TRIED, int(subject.budget.remaining() / 6 / each)))
    total = len(subject.data.train.x)
    notes.append(f"Features and margins: {count} of {total} training samples, in evaluation mode.")
    return x[:count], y[:count]


# ---------------------------------------------------------------------------------------------------- what is reported


def _margins(subject: Subject, x: Tensor, y: Tensor) -> tuple[RhoModel, Tensor]:
    model = RhoModel(subject.module)
    single = model.normalised(x[:2]).shape[1] == 1
    return model, model.margins(x, 2 * y - 1 if single else y)


def _of_collapse(found: NeuralCollapse, subject: Subject) -> list[Measurement]:
    assert subject.data is not None  # collapse was measured on it
    skipped = {} if found.nc3 is not None else {"NC3": "the last layer does not have one row of weights a class"}
    coverage = Coverage(found.samples, len(subject.data.train.x), "training samples", skipped)
    count = len(found.classes)
    measured = [
        Measurement(
            "within-class variability (NC1)",
            found.nc1,
            f"Variance of the last features (the input of {found.layer!r}) within classes over that between class "
            "means, on average over directions: 0 once every sample of a class has the same features.",
            reference=Range(text="small networks on digits: about 0.01 after fitting to the end, above 1 untrained"),
            coverage=coverage,
            headline=True,
        ),
        Measurement(
            "angle of class means (NC2)",
            found.nc2_angle,
            f"Mean distance of the cosine between two class means from {-1 / (count - 1):.3f}, that of {count} "
            "directions as far apart as can be.",
        ),
        Measurement(
            "norms of class means (NC2)",
            found.nc2_norm,
            "Standard deviation over mean of the distances of class means from their mean: 0 once all are equal.",
        ),
    ]
    if found.nc3 is not None:
        measured.append(
            Measurement(
                "last layer against class means (NC3)",
                found.nc3,
                "Squared distance between the last layer's weights and the class means, both of norm 1: 0 where they "
                "are the same up to scale, 2 where they have nothing in common.",
            )
        )
    if found.nc4 is not None:
        measured.append(
            Measurement(
                "disagreement with the nearest class mean (NC4)",
                found.nc4,
                "Share of training samples that the network puts into another class than that of the nearest class "
                "mean.",
            )
        )
    return measured


def _of_ranks(profile: RankProfile) -> list[Measurement]:
    table = profile.table()
    own = [i for i, form in enumerate(table["form"]) if form != "operator"]
    shares = np.array([table["participation"][i] / max(1, table["possible"][i]) for i in own])
    lowest = own[int(shares.argmin())]
    coverage = Coverage(len(own), len(own) + len(profile.skipped), "weights and operators", dict(profile.skipped))
    return [
        Measurement(
            "lowest participation of a layer",
            table["participation"][lowest],
            f"Effective number of singular values of {table['layer'][lowest]!r}, (sum)^2 / sum of squares, the lowest "
            "of all layers in relation to its size: low after long training with weight decay.",
            unit=f"of {table['possible'][lowest]}",
            coverage=coverage,
        ),
        Measurement(
            "lowest stable rank of a layer",
            min(table["stable"][i] for i in own),
            "Squared Frobenius over squared spectral norm of the weights, the lowest of all layers: near 1, one "
            "direction outweighs all others.",
        ),
        Measurement(
            "layers without full rank",
            sum(table["numerical"][i] < table["possible"][i] for i in own),
            f"Layers with singular values below {profile.rtol:g} of the largest: they could be cut at little cost.",
            unit=f"of {len(own)}",
        ),
    ]


def _of_margins(model: RhoModel, margins: Tensor) -> list[Measurement]:
    rho, median = float(model.rho.detach()), float(margins.median())
    return [
        Measurement(
            "product of norms",
            rho,
            "Product of the Frobenius norms of all layers (of the kernels, for convolutions): the scale of a network "
            "whose output grows in proportion to the weights of each layer.",
        ),
        Measurement(
            "median normalised margin",
            median,
            "By how much the right class leads once every layer has norm 1, at the median training sample: the larger, "
            "the smaller the norms that fit the data.",
            coverage=Coverage(len(margins), len(margins), "training samples"),
        ),
        Measurement(
            "complexity, one over margin",
            1 / (median * math.sqrt(len(margins))) if median > 0 else math.inf,
            "One over the median normalised margin and the root of the number of samples: what norm-based bounds on "
            "the test error grow with; a measure to compare networks by, not a bound.",
        ),
    ]


def _margin_figure(margins: Tensor) -> Figure:
    return Figure(
        "normalised-margins",
        "Normalised margins",
        "Training samples by their margin once every layer has norm 1; left of the line, they are misclassified. Under "
        "the square loss with decay the margins become nearly equal.",
        {"margin": margins.cpu().double().numpy()},
        _draw_margins,
        size=(5.0, 3.4),
    )


def _draw_margins(axes: Any, data: Mapping[str, Any]) -> None:
    axes.hist(data["margin"], bins=40, color=PALETTE[0])
    axes.axvline(0, color=PALETTE[1], lw=1, ls="--")
    axes.set(xlabel="normalised margin", ylabel="training samples")
