"""The probe "half-spaces": where a network's units switch, and whether what switches together belongs together."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from corollary.base.errors import NothingMeasured
from corollary.evidence import Coverage, Figure, Finding, Measurement, Need, Subject, probe
from corollary.geometry.affine import sample_size
from corollary.geometry.alignment import KORNBLITH_2019
from corollary.geometry.codes import ActivationCodes, activation_codes
from corollary.geometry.dlgn import DLGN, YADAV
from corollary.geometry.dlgn_reading import gated_part, path_inequalities, strongest_path
from corollary.geometry.half_space_drawings import alignment_figure, normals_figure
from corollary.geometry.half_spaces import (
    LayerNormals,
    code_kernels,
    half_space_normals,
    named_units,
    overlap_alignment,
    target_kernel,
)
from corollary.geometry.path_kernel import (
    active_paths,
    feature_alignment,
    layer_gates,
    normal_clusters,
    unit_normals,
)
from corollary.geometry.patterns import smooth_nodes, switching_nodes, unit_nodes
from corollary.graph import Graph, Node

MOST_SAMPLES = 500
TRIAL = 8
PRODUCTS_PER_SECOND = 1e10
"""Multiplications of a matrix product that one busy core does in a second."""
MOST_PANELS = 6
MOST_NORMALS = 240
"""Of a layer: more points are not told apart in a panel."""
POINTS = 4
"""Samples at which the normals of deeper layers are taken."""
MOST_ENTRIES = 2**26
"""Numbers of all normals together (512 MiB)."""


@probe(
    "half-spaces",
    room="geometry",
    title="Half-spaces and their paths",
    question="Where do the units switch, do they gather on few half-spaces, and do samples of one kind share them?",
    needs=Need.ACTIVATIONS,
    data="inputs",
    sources=(YADAV, KORNBLITH_2019),
)
def half_spaces(subject: Subject) -> Finding:
    """Half-spaces, paths and overlap kernels: exact for a DLGN; of ReLU-like units exact in front of the first switch.

    Raises: NothingMeasured, if the network has no gates of either kind.
    """
    x, y = subject.sample(MOST_SAMPLES)
    gated = gated_part(subject.module, x)
    return _of_dlgn(subject, *gated, y) if gated else _of_units(subject)


def _targets(subject: Subject, y: Tensor | None) -> Tensor | None:
    """The kernel of the targets, or None where there are too few or all are equal."""
    if y is None or len(y) < 4 or bool((y == y[:1]).all()):
        return None
    return target_kernel(y.cpu(), classes=subject.task == "classification" and y.ndim == 1)


# --------------------------------------------------------------------------------------------------------- a DLGN


def _of_dlgn(subject: Subject, name: str, model: DLGN, x: Tensor, y: Tensor | None) -> Finding:
    clusters = normal_clusters(model)
    shares = clusters.shares.tolist()
    layers = tuple(
        LayerNormals(f"layer {i + 1}", normals.double(), True, torch.zeros(len(normals)).long(), len(normals))
        for i, normals in enumerate(unit_normals(model))
    )
    cosines = feature_alignment(model, clusters.directions).diagonal(dim1=0, dim2=2).mean(0).tolist()
    measurements = [*_of_clusters(cosines, shares), *_of_gates(model, x, None if name else y, subject.task)]
    part = f"{name!r}, the part of the network that is a DLGN" if name else "the network"
    notes = [
        f"Exact: each of the {model.depth} x {model.width} gates of {part} is a half-space of its inputs, at any depth."
    ]
    notes.append("Overlap kernels take the gates as trained, between 0 and 1; paths and half-spaces take hard ones.")
    notes += _path_in_words(model, x, None if name else subject.data and subject.data.feature_names)
    how = (
        "All are exact: a DLGN's gates are half-spaces of its input at any depth. Over each panel also: mean |cosine| "
        "with the layer's leading direction, and the share of normals within 0.1 of it."
    )
    within = {
        layer.name: f"mean |cosine| {cosine:.2f}, {100 * share:.0f} % within 0.1"
        for layer, cosine, share in zip(layers, cosines, shares, strict=True)
    }
    shown = _spread(layers)
    figures = [normals_figure(shown, (), within, how + _of_how_many(shown, layers))]
    kernels = {
        layer.name: (gates.double() @ gates.double().T).cpu() / model.width
        for layer, gates in zip(layers, layer_gates(model, x), strict=True)
    }
    found, extra = _alignments(kernels, x.cpu(), _targets(subject, y), Coverage(model.depth, model.depth))
    return Finding((*measurements, *extra), (*figures, *found), tuple(notes))


def _of_clusters(cosines: Sequence[float], shares: Sequence[float]) -> list[Measurement]:
    return [
        Measurement(
            "alignment of the last layer's half-spaces",
            cosines[-1],
            "Mean |cosine| between the last layer's normals and the leading one of their directions: 1 if all gates "
            f"cut along one feature; from the first layer to the last: {_listed(cosines)}.",
            coverage=Coverage(len(shares), len(shares), "layers of gates"),
            headline=True,
        ),
        Measurement(
            "half-spaces gathered in the last layer",
            shares[-1],
            "Share of the last layer's half-spaces whose normals lie within 0.1 of the leading direction, up to sign; "
            f"from the first layer to the last: {_listed(shares)}. Gates that learn a feature gather on it.",
            coverage=Coverage(len(shares), len(shares), "layers of gates"),
        ),
    ]


@torch.no_grad()
def _of_gates(model: DLGN, x: Tensor, y: Tensor | None, task: str) -> list[Measurement]:
    soft, hard = model(x), model(x, hard=True)
    open_paths = active_paths(model, x, log=True) / math.log(10)
    return [
        _change(soft, hard) if task == "regression" else _agreement(soft, hard, y if task != "unlabelled" else None),
        Measurement(
            "open paths",
            float(open_paths.median()),
            f"Common logarithm of the number of paths (of {model.width}^{model.depth}) that are open at the median "
            "sample: the resources that an input is given.",
            unit="(log10)",
        ),
    ]


def _agreement(soft: Tensor, hard: Tensor, labels: Tensor | None) -> Measurement:
    decided = [(out[:, 0] > 0).long() if out.shape[1] == 1 else out.argmax(1) for out in (soft, hard)]
    right = ""
    if labels is not None and labels.shape == decided[0].shape:
        scores = [float((found == labels).double().mean()) for found in decided]
        right = f" Accuracy is {scores[0]:.3f} with soft gates and {scores[1]:.3f} with hard ones."
    return Measurement(
        "hard gates decide alike",
        float((decided[0] == decided[1]).double().mean()),
        f"Share of {len(soft):,} samples that keep their class when each soft gate becomes a half-space: how far what "
        f"is said here of half-spaces holds for the network as trained.{right}",
    )


def _change(soft: Tensor, hard: Tensor) -> Measurement:
    return Measurement(
        "change by hard gates",
        float((hard - soft).square().mean().sqrt() / soft.std(0).square().mean().sqrt()),
        f"Root mean square change of the outputs at {len(soft):,} samples when each soft gate becomes a half-space, in "
        "standard deviations of the outputs: how far what is said of half-spaces holds for the network as trained.",
    )


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _path_in_words(model: DLGN, x: Tensor, names: Sequence[str] | None) -> list[str]:
    path = strongest_path(model, x)
    if path is None:
        return ["No path with a value is open at any sample: with hard gates the output is its bias."]
    lines = path_inequalities(model, path.units, names)
    region = "; ".join(f"{line} (layer {i + 1}, unit {path.units[i]})" for i, line in enumerate(lines))
    whose = f" for which output {path.output} is the largest" if model.d_out > 1 else ""
    effect = "raises" if float(path.values.median()) > 0 else "lowers"
    return [
        f"The strongest open path of {len(path.rows)} of the {path.samples} samples{whose}, more than any other is, "
        f"{effect} output {path.output} by {abs(float(path.values.median())):.3g} (median). It is open where {region}. "
        "Normals have length 1, so that both sides are distances."
    ]


# ------------------------------------------------------------------------------------------------ ReLU-like units


def _of_units(subject: Subject) -> Finding:
    graph = subject.program if isinstance(subject.program, Graph) else None
    if graph is not None and not unit_nodes(graph):
        raise NothingMeasured(
            "this network has no ReLU-like units and no DLGN in it. (A DLGN saved as a program has lost its gates: "
            "inspect it as package.module:factory with --weights.)"
        )
    source = graph or subject.module
    x, y = subject.sample(_affordable(subject, source))
    codes = activation_codes(source, x)
    coverage = _coverage(graph, codes)
    notes = [f"{codes.width:,} gates (layers: {len(codes.layers)}) at {len(x):,} samples; ties count as shut."]
    figures: list[Figure] = []
    if graph is None:
        notes.append("The network's program was not captured: normals are not known, nor what else in it switches.")
    elif not x.is_floating_point():
        notes.append("Inputs are not real numbers, so that half-spaces among them have no normals.")
    else:
        figure, words = _normals(subject, graph, codes, x, y)
        figures += figure
        notes += words
    found, measurements = _alignments(code_kernels(codes), x.cpu(), _targets(subject, y), coverage)
    if not measurements:
        notes.append("Without targets that differ there is nothing to align the gates with.")
        measurements = [
            Measurement("gates", codes.width, "Bits of the activation code, one for each kink.", coverage=coverage)
        ]  # fmt: skip
    return Finding(tuple(measurements), (*figures, *found), tuple(notes))


def _affordable(subject: Subject, source: Graph | torch.nn.Module) -> int:
    """Samples whose codes and overlap kernels fit in a third of the budget."""
    x, _ = subject.sample(TRIAL)
    activation_codes(source, x)  # the first run of a network sets things up
    start = time.perf_counter()
    bits = activation_codes(source, x).width
    each = (time.perf_counter() - start) / len(x)
    seconds = subject.budget.remaining() / 3
    return int(max(TRIAL, min(MOST_SAMPLES, seconds / each, (seconds * PRODUCTS_PER_SECOND / max(1, bits)) ** 0.5)))


def _coverage(graph: Graph | None, codes: ActivationCodes) -> Coverage:
    """Which of the nodes that are not affine have gates."""
    if graph is None:
        return Coverage(len(codes.layers), len(codes.layers), "layers of ReLU-like units seen")
    units = unit_nodes(graph)
    other = [node for node in switching_nodes(graph) if node not in units]
    skipped = {node.layer or node.name: f"{type(node.op).__name__} has no gates, its pieces are many" for node in other}
    smooth = smooth_nodes(graph)
    skipped |= {node.layer or node.name: f"{type(node.op).__name__} is smooth" for node in smooth}
    return Coverage(len(units), len(units) + len(other) + len(smooth), "layers that are not affine", skipped)


def _normals(
    subject: Subject, graph: Graph, codes: ActivationCodes, x: Tensor, y: Tensor | None
) -> tuple[list[Figure], list[str]]:
    """The picture of the normals, of as many layers as there are panels, and what to say of it."""
    layers = named_units(graph, codes)
    shown = {name: layers[name] for name in _spread(tuple(layers))}
    rows, points = _points(subject, x, y)
    most = min(MOST_NORMALS, _most_rows(subject, graph, x, shown))
    if not most:
        return [], ["The half-spaces' normals are not shown: the budget allows none."]
    generator = subject.seeds("units drawn")
    found, skipped = half_space_normals(graph, x[rows], shown, most=most, generator=generator)
    words = [f"No normals of {name}: {reason}." for name, reason in skipped.items()]
    if not found:
        return [], words
    exact = [layer.name for layer in found if layer.exact]
    how = (
        f"Exact, the same for all inputs: {', '.join(exact) or 'none, since a switch stands before every layer'}. Of "
        f"the deeper layers each point is a unit's normal in the linear region of one of {len(rows)} samples, and "
        "holds there only."
    )
    if len(exact) == len(found):
        how = "All are exact: they are the same for all inputs."
    drawn = {
        layer.name: f"{len(layer.normals):,} of {layer.units:,} units"
        if layer.exact
        else f"{(len(layer.normals) + layer.unmoved) // len(rows):,} of {layer.units:,} units"
        for layer in found
    }
    if smooth := smooth_nodes(graph):
        words.append(f"{smooth[0].op} is smooth: of layers behind it the normals are those of the tangent map.")
    if unmoved := {layer.name: layer.unmoved for layer in found if layer.unmoved}:
        counts = ", ".join(f"{count} of {name}" for name, count in unmoved.items())
        words.append(f"Without a normal, since no input moves them there (all before them is shut): {counts}.")
    return [normals_figure(found, points, drawn, how + _of_how_many(tuple(shown), tuple(layers)))], words


def _points(subject: Subject, x: Tensor, y: Tensor | None) -> tuple[list[int], list[str]]:
    """A few samples, of different classes where there are so many, and what to call them."""
    order = torch.randperm(len(x), generator=subject.seeds("points")).tolist()
    if subject.task != "classification" or y is None or y.ndim != 1:
        return order[:POINTS], [f"sample {i + 1}" for i in range(len(order[:POINTS]))]
    first = {int(y[row]): row for row in reversed(order)}
    labels = sorted(first)[:POINTS]
    return [first[label] for label in labels], [f"class {label}" for label in labels]


def _most_rows(subject: Subject, graph: Graph, x: Tensor, layers: Mapping[str, Node]) -> int:
    """Normals of each layer that half of what is left of the budget and the memory allow."""
    deepest = {name: node for name, node in layers.items() if name == list(layers)[-1]}
    half_space_normals(graph, x[:1], deepest, most=TRIAL)  # the first run sets things up
    start = time.perf_counter()
    half_space_normals(graph, x[:1], deepest, most=TRIAL)
    each = (time.perf_counter() - start) / TRIAL
    allowed = 0.5 * subject.budget.remaining() / (each * len(layers))
    return int(min(allowed, MOST_ENTRIES / (sample_size(graph.inputs[0]) * len(layers))))


# ---------------------------------------------------------------------------------------------------- for both kinds


def _alignments(
    kernels: Mapping[str, Tensor], x: Tensor, targets: Tensor | None, coverage: Coverage
) -> tuple[list[Figure], list[Measurement]]:
    if targets is None:
        return [], []
    found = overlap_alignment(kernels, x, targets)
    constant = {
        name: "all samples share its gates" for name, a in zip(found.layers, found.alone, strict=True) if a != a
    }
    coverage = Coverage(coverage.measured - len(constant), coverage.of, coverage.unit, {**coverage.skipped, **constant})
    defined = [(a, name) for a, name in zip(found.alone, found.layers, strict=True) if math.isfinite(a)]
    measurements = [
        Measurement(
            "alignment of the gates with the targets",
            _number(found.through[-1]),
            "How far the share of paths, through all layers, that are open at both of two samples is the likeness of "
            f"their targets: 1 if only samples of one kind share paths; of the inputs themselves {found.inputs:.3f}.",
            coverage=coverage,
        )
    ]
    if defined:
        best, where = max(defined)
        measurements.append(
            Measurement(
                "alignment of the best layer of gates",
                best,
                f"The same of one layer alone, {where!r}, the highest of all; of the first {found.alone[0]:.3f}, of "
                f"the last {found.alone[-1]:.3f}.",
                coverage=coverage,
            )
        )
    return [alignment_figure(found, len(x))] if defined else [], measurements


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else "not defined: all samples share their paths"


def _spread(layers: Sequence[Any]) -> list[Any]:
    """As many layers as there are panels, the first and the last among them."""
    count = min(MOST_PANELS, len(layers))
    steps = max(1, count - 1)
    return [layers[i * (len(layers) - 1) // steps] for i in range(count)]


def _of_how_many(shown: Sequence[Any], layers: Sequence[Any]) -> str:
    return f" {len(shown)} of {len(layers)} layers are shown." if len(shown) < len(layers) else ""
