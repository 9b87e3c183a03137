"""The probe "slice map": the linear regions and the decision boundary on a plane through three samples."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from corollary.base.errors import BadInput, CannotCapture, NoRule
from corollary.evidence import Budget, Figure, Finding, Measurement, Need, Source, Subject, probe
from corollary.geometry.affine import as_graph
from corollary.geometry.patterns import pattern, samples_first
from corollary.geometry.probe_glance import predict
from corollary.geometry.region_bounds import slice_upper
from corollary.geometry.regions import scores_graph, slice_regions
from corollary.geometry.slice_samples import SampledSlice, draw_samples, sample_slice
from corollary.geometry.slices import Plane, SliceRegions, draw_slice
from corollary.graph import Graph, evaluate
from corollary.graph.ops import Sigmoid

MONTUFAR_2014 = Source(
    key="montufar2014number",
    authors=("Guido Montúfar", "Razvan Pascanu", "Kyunghyun Cho", "Yoshua Bengio"),
    title="On the number of linear regions of deep neural networks",
    year=2014,
    arxiv="1402.1869",
)
HUMAYUN_2023 = Source(
    key="humayun2023splinecam",
    authors=("Ahmed Imtiaz Humayun", "Randall Balestriero", "Guha Balakrishnan", "Richard Baraniuk"),
    title="SplineCam: exact visualization and characterization of deep network geometry and decision boundaries",
    year=2023,
    arxiv="2302.12828",
)
SAMPLES = 2000
FIRST = 1 / 256
"""Share of the box's width with which the search for what can be afforded starts, unless too many units switch."""
SMALLEST = 2.0**-26
MOST_REGIONS = 50_000
"""More are not seen in a picture of this size."""
GRID = 160


@probe(
    "slice-map",
    room="geometry",
    title="Linear regions on a plane through the data",
    question="Into how many linear regions is a plane through three samples cut, and where do its classes meet?",
    needs=Need.FORWARD,
    data="inputs",
    sources=(HUMAYUN_2023, MONTUFAR_2014),
)
def slice_map(subject: Subject) -> Finding:
    """All linear regions on the plane, exactly; for a network that has none, a map of its classes by evaluation."""
    x, labels = _three_samples(subject)
    plane = Plane.through(*x)
    try:
        graph = _on_cpu(scores_graph(subject.graph))
    except (CannotCapture, NoRule) as reason:
        return _sampled(subject, plane, labels, str(reason))
    found, share = _affordable(graph, plane, subject.budget)
    measurements = _measurements(found, plane, graph)
    classes = _has_classes(subject, found.coefficients.shape[2])
    if share == 1:
        if classes:
            measurements += _class_shares(found.class_areas() / found.areas.sum(), labels, subject, "")
        return Finding(tuple(measurements), (_figure(found, plane, labels, boundary=classes),))
    why = "more would not be seen in a picture" if found.count > MOST_REGIONS / 8 else "the budget allows no more"
    whole = _samples_of_graph(subject, graph, plane)
    if classes:
        measurements += _class_shares(whole.class_shares(), labels, subject, _by_evaluation(whole))
    notes = (
        f"Exact is the middle of the box around the three samples, {share:.2g} of its width: {why}. Of the rest only "
        f"the outputs at {whole.side**2:,} points are known.",
    )
    return Finding(tuple(measurements), (_part_figure(found, whole, plane, labels, subject, classes),), notes)


def _on_cpu(graph: Graph) -> Graph:
    """A copy of the network whose tensors lie in main memory."""
    return replace(graph, tensors={name: tensor.detach().cpu() for name, tensor in graph.tensors.items()})


def _has_classes(subject: Subject, outputs: int) -> bool:
    return subject.task != "regression" and (outputs > 1 or subject.task == "classification")


def _three_samples(subject: Subject) -> tuple[Tensor, tuple[str, str, str]]:
    """Three samples, of three classes where there are so many, and what to call them."""
    x, y = subject.sample(SAMPLES)
    x = x.cpu()  # planes and polygons are of little use to a GPU
    if not x.is_floating_point() or len(x) < 3 or x[0].numel() < 2:
        raise BadInput(
            f"a plane goes through three samples of at least two real numbers each; got {len(x)} samples of "
            f"{x[0].numel() if len(x) else 0} numbers of type {x.dtype}"
        )
    order = torch.randperm(len(x), generator=subject.seeds("slice"))
    if subject.task != "classification" or y is None or y.ndim != 1:
        return x[order[:3]], ("sample 1", "sample 2", "sample 3")
    of_class = dict(zip(y[order].tolist()[::-1], order.tolist()[::-1], strict=True))  # the first of each class stays
    rows = [of_class[label] for label in sorted(of_class)]
    picked = torch.randperm(len(rows), generator=subject.seeds("slice classes"))[:3].sort().values.tolist()
    chosen = [rows[i] for i in picked]
    chosen += [row for row in order.tolist() if row not in chosen][: 3 - len(chosen)]
    names = [_class_name(subject, int(y[row])) for row in chosen]
    return x[chosen], (names[0], names[1], names[2])


def _class_name(subject: Subject, label: int) -> str:
    classes = subject.data.classes if subject.data else None
    return classes[label] if classes and label < len(classes) else str(label)


def _affordable(graph: Graph, plane: Plane, budget: Budget) -> tuple[SliceRegions, float]:
    """The regions on as large a box as the budget allows, and its share of the width of the whole box."""
    box = plane.box()
    allowed = Budget(0.6 * budget.remaining())  # the rest is for the samples of the whole plane and the picture
    share = _first_share(graph, plane, allowed.seconds / 8)
    while True:
        start = time.perf_counter()
        found = slice_regions(graph, plane, polygon=box.mean(0) + share * (box - box.mean(0)))
        seconds = time.perf_counter() - start
        # Regions grow with the area; half as much again for boxes whose middle has fewer than its rim.
        wider = next((w for w in (4.0, 2.0, 1.4) if 1.5 * w**2 * seconds < allowed.remaining()), None)
        if share == 1 or wider is None or found.count > MOST_REGIONS / 8:
            return found, share
        share = min(1.0, wider * share)


def _first_share(graph: Graph, plane: Plane, seconds: float) -> float:
    """The first share of the box's width whose regions should be found in so many seconds.

    L lines cut a box into at most 1 + L + L^2 / 2 cells, each of which is carried through the network as three points.
    L is the number of units that do not agree at the corners.
    """
    box, share = plane.box(), FIRST
    graph = as_graph(graph, plane.points(box), dtype=torch.float64)
    while share > SMALLEST:
        start = time.perf_counter()
        sides = pattern(graph, plane.points(box.mean(0) + share * (box - box.mean(0))))
        each = (time.perf_counter() - start) / len(box)
        rows = [samples_first(node, piece, len(box)) for node, piece in sides.items()]
        lines = sum(int((row != row[:1]).any(0).sum()) for row in rows)
        if 3 * each * (1 + lines + lines**2 / 2) <= max(seconds, 0.1):
            break
        share /= 4
    return share


def _measurements(found: SliceRegions, plane: Plane, graph: Graph) -> list[Measurement]:
    distance = float(torch.pdist(plane.marks).mean())
    measurements = [
        Measurement(
            "regions on the slice",
            found.count,
            "All pieces of the part of the plane that is shown on each of which the network is one affine map.",
            headline=True,
        ),
        Measurement(
            "relative region diameter",
            float(found.diameters.mean()) / distance,
            "Mean diameter of a region, in units of the mean distance between the three samples: how far an affine "
            "description of the network reaches.",
        ),
    ]
    most = slice_upper(graph)
    if most is not None and most > 1:
        measurements.append(
            Measurement(
                "share of the possible regions",
                math.log10(found.count) - math.log10(most),
                "Common logarithm of the number of regions divided by the largest number that layers of these sizes "
                "allow on a plane.",
                unit="log10",
            )
        )
    return measurements


def _class_shares(
    shares: Float[Tensor, "class"], labels: tuple[str, str, str], subject: Subject, how: str
) -> list[Measurement]:
    """The shares of the classes of the three samples, and of all others together."""
    names = [_class_name(subject, i) for i in range(len(shares))]
    ours = [i for i, name in enumerate(names) if name in labels] or list(range(min(3, len(names))))
    measurements = [
        Measurement(
            f"share of class {names[i]}",
            float(shares[i]),
            f"Part of the slice that the network assigns to class {names[i]}{how}.",
        )
        for i in ours
    ]
    if len(ours) < len(names):
        others = float(shares.sum() - shares[ours].sum())
        meaning = f"Part of the slice that it assigns to classes that none of the three samples has{how}."
        measurements.append(Measurement("share of other classes", others, meaning))
    return measurements


def _marks(plane: Plane, labels: tuple[str, str, str]) -> dict[str, Any]:
    return {"mark_u": plane.marks[:, 0].numpy(), "mark_v": plane.marks[:, 1].numpy(), "mark_label": np.array(labels)}


def _figure(found: SliceRegions, plane: Plane, labels: tuple[str, str, str], *, boundary: bool) -> Figure:
    bold = " Bold: the decision boundary." if boundary else ""
    return Figure(
        "slice-map",
        "Linear regions on a plane through three samples",
        f"Each cell is one linear region: inside it the network is an affine map. Points: the three samples.{bold} "
        "Colours only tell neighbours apart.",
        found.columns(boundary=boundary) | _marks(plane, labels),
        draw_slice,
        size=(5.6, 5.0),
    )


def _part_figure(
    found: SliceRegions,
    whole: SampledSlice,
    plane: Plane,
    labels: tuple[str, str, str],
    subject: Subject,
    classes: bool,
) -> Figure:
    """The whole plane by evaluation, beside the exact regions in its middle."""
    what = "the class" if classes else "the output"
    line = ", and the decision boundary interpolated between them" if classes else ""
    columns = found.columns(boundary=classes)
    bold = ""
    if classes:
        crossed = len(columns["boundary_u0"]) > 0
        bold = " Bold: the decision boundary." if crossed else " No decision boundary crosses it."
    corners = dict(zip(("exact_u", "exact_v"), found.outline.T.numpy(), strict=True))
    names = _class_names(subject, whole) if classes else ()
    width, height = (found.outline.amax(0) - found.outline.amin(0)).tolist()
    return Figure(
        "slice-map",
        "A plane through three samples: the whole by evaluation, and the linear regions in its middle",
        f"Left, sampled: {what} at {whole.side} by {whole.side} points of the plane{line}; what is finer than their "
        "distance is not seen. Points: the three samples. Dashed box: the part on the right. Right, exact: each cell "
        f"is one linear region, inside which the network is an affine map.{bold} Colours there only tell neighbours "
        "apart.",
        columns | whole.columns(names) | corners | _marks(plane, labels),
        _draw_part,
        size=(10.0, min(6.4, 1.6 + 4.4 * height / width)),
        panels=(1, 2),
    )


def _draw_part(axes: Any, data: Mapping[str, Any]) -> None:
    draw_samples(axes[0], data)
    draw_slice(axes[1], {name: column for name, column in data.items() if not name.startswith("mark_")})
    axes[0].set_title("whole plane, sampled")
    axes[1].set_title("dashed box, exact")


# ------------------------------------------------------------------------------------------------------ by evaluation


def _sampled(subject: Subject, plane: Plane, labels: tuple[str, str, str], reason: str) -> Finding:
    """The classes (or the output) at the points of a grid, for a network whose regions cannot be enumerated."""
    parameter = next(subject.module.parameters(), None)
    dtype, device = (torch.float32, None) if parameter is None else (parameter.dtype, parameter.device)
    threshold = 0.5 if _ends_in_sigmoid(subject) else 0.0

    def outputs(x: Tensor) -> Tensor:
        found = predict(subject.module, x.to(device)).flatten(1)
        return found - threshold if found.shape[1] == 1 and subject.task != "regression" else found

    whole = sample_slice(outputs, plane, plane.box(), _side(outputs, plane, dtype, subject.budget), dtype=dtype)
    notes = (f"Linear regions are not shown, because {reason}", "The map was made by evaluating the network on a grid.")
    if not _has_classes(subject, whole.scores.shape[2]):
        figure = _sampled_figure("Output", whole.columns() | _marks(plane, labels))
        span = float(whole.scores[:, :, 0].max() - whole.scores[:, :, 0].min())
        meaning = "Largest minus smallest value of the first output on the grid."
        return Finding((Measurement("range of the output on the slice", span, meaning),), (figure,), notes)
    figure = _sampled_figure("Class", whole.columns(_class_names(subject, whole)) | _marks(plane, labels))
    shares = _class_shares(whole.class_shares(), labels, subject, _by_evaluation(whole))
    return Finding(tuple(shares), (figure,), notes)


def _samples_of_graph(subject: Subject, graph: Graph, plane: Plane) -> SampledSlice:
    """The scores whose regions were enumerated, on the whole plane."""
    dtype = next((t.dtype for t in graph.tensors.values() if t.is_floating_point()), torch.float64)
    graph = as_graph(graph, plane.points(plane.box()).to(dtype))

    def outputs(x: Tensor) -> Tensor:
        return evaluate(graph, x).flatten(1)

    return sample_slice(outputs, plane, plane.box(), _side(outputs, plane, dtype, subject.budget), dtype=dtype)


def _side(outputs: Callable[[Tensor], Tensor], plane: Plane, dtype: torch.dtype, budget: Budget) -> int:
    """Points along a side of the grid: as many as half the budget allows, measured on a few."""
    few = plane.points(plane.box()).to(dtype).repeat(8, *[1] * plane.origin.ndim)
    outputs(few)  # the first run of a network sets things up
    start = time.perf_counter()
    outputs(few)
    seconds = (time.perf_counter() - start) / len(few)
    return int(min(GRID, max(8.0, (budget.remaining() / 2 / max(seconds, 1e-9)) ** 0.5)))


def _ends_in_sigmoid(subject: Subject) -> bool:
    """Whether its outputs are known to be probabilities, one each, so that a class begins at one half."""
    program = subject.program
    return isinstance(program, Graph) and len(program.outputs) == 1 and isinstance(program.outputs[0].op, Sigmoid)


def _by_evaluation(whole: SampledSlice) -> str:
    return f", by evaluation at {whole.side**2:,} points"


def _class_names(subject: Subject, whole: SampledSlice) -> tuple[str, ...]:
    return tuple(_class_name(subject, i) for i in range(max(2, whole.scores.shape[2])))


def _sampled_figure(what: str, columns: dict[str, Any]) -> Figure:
    line = " Black: the decision boundary, interpolated between the points." if what == "Class" else ""
    return Figure(
        "slice-map-sampled",
        f"{what} on a plane through three samples, by evaluation",
        f"{what} of the network at the points of a grid: sampled, not exact, since the network has no linear regions "
        f"that could be enumerated. Points: the three samples.{line}",
        columns,
        draw_samples,
        size=(5.6, 5.4),
    )
