"""How loose interval bounds are: the smallest box around a network's outputs over the box that intervals give.

For inputs in a box of radii $\\epsilon$ around x, the network is near x the linear map
$W_L D_{L-1} W_{L-1} \\cdots D_1 W_1$, with masks D of the units that are active at x. As the box shrinks, the tightness
tends to the local one,

$$\\tau(x) = \\frac{|C W_L D_{L-1} W_{L-1} \\cdots D_1 W_1|\\,\\epsilon}
{|C W_L| D_{L-1} |W_{L-1}| \\cdots D_1 |W_1|\\,\\epsilon},$$

C the rows of the margins. Its numerator takes a backward pass for each row, its denominator one forward pass; no matrix
is formed. Convolutions, batch normalisation and pools are linear maps like any other; a maximum passes its largest
entry on.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.graph import Graph, Node, forward
from corollary.graph.ops import Elementwise, Op, PReLU
from corollary.verify.ibp_initialisation import Radii
from corollary.verify.interval_margins import (
    WEIGHTED,
    DataRange,
    IntervalNetwork,
    Network,
    box_around,
    check_labels,
    label_rows,
)
from corollary.verify.intervals import Interval, apply_interval, propagate
from corollary.verify.layout import pack, sample_shape, sample_size, unpack
from corollary.verify.output_ranges import output_ranges
from corollary.verify.sets import Box

Mode: TypeAlias = Literal["local", "linear"]
ENTRIES_AT_ONCE = 2**24
"""Samples are taken together while the rows at the widest node have at most so many entries."""


class NotPiecewiseLinear(BadInput, TypeError):
    """A layer is not piecewise linear, so the network is no linear map near an input."""


@final
@dataclass(frozen=True, eq=False)
class _Local:
    """A node's value at the input, and the radius of its box by intervals, both in the layout of the network."""

    value: Tensor
    radius: Tensor


def propagation_radii(
    model: Network,
    x: Float[Tensor, "batch *input"],
    eps: float | int | Tensor,
    labels: Int[Tensor, "batch"] | None = None,
    *,
    mode: Mode = "local",
    data_range: DataRange = (0, 1),
    dtype: torch.dtype = torch.float64,
) -> Radii:
    """The two radii whose ratio is the propagation tightness, for boxes scaled to a largest radius of 1.

    Args: as for `propagation_tightness`.
    Returns: optimal and interval radii, (batch, rows) each, in `dtype`.
    """
    network = IntervalNetwork.of(model, x)
    if labels is not None:
        check_labels(labels, network.classes)
    x, radius = _unit_box(x.to(dtype), eps, data_range)
    rows = network.classes if labels is None else network.classes - 1
    found = []
    for part in _parts(network.graph, len(x), rows):
        wanted = _rows(network.classes, x[part], None if labels is None else labels[part])
        found.append(_radii(network, x[part], radius[part], wanted, mode))
    return Radii(*(torch.cat(ends) for ends in zip(*found, strict=True)))


def propagation_tightness(
    model: Network,
    x: Float[Tensor, "batch *input"],
    eps: float | int | Tensor,
    labels: Int[Tensor, "batch"] | None = None,
    mode: Mode = "local",
    data_range: DataRange = (0, 1),
    reduce: Literal["mean"] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    r"""Propagation tightness $\tau \in (0, 1]$ of each sample and row: 1, interval bounds are exact.

    Args:
        eps: half width of the box around an input, before it is cut to the range of the data; one number or (batch,).
        labels: with them, rows are the margins $o_y - o_j$ over the other classes in order, multiplied into the last
            layer (elision); without, each output by itself.
        mode: "local", with the units that are active at x; "linear", with every elementwise activation taken for the
            identity, the tightness of the deep linear network with the same weights.
        data_range: least and greatest value of an input, or None.
        reduce: "mean" of all that are numbers.
        dtype: that it is computed in: deep networks have a tightness that single precision cannot resolve.
    Returns: (batch, rows), or a scalar, in the dtype of x. NaN where both radii are 0: no unit on the way is active.
    Raises: NotPiecewiseLinear (a TypeError), naming the layer; BadInput, for eps <= 0, labels or inputs out of range.
    Source: Mao et al. 2024, arXiv 2306.10426, definitions of propagation tightness and local tightness.
    """
    found = propagation_radii(model, x, eps, labels, mode=mode, data_range=data_range, dtype=dtype).tightness
    return (found if reduce is None else found.nanmean()).to(x.dtype)


@final
@dataclass(frozen=True)
class LayerTightness:
    """The mean tightness of the network up to and with a layer, over samples and `units` of the layer's `of`."""

    name: str
    tightness: float
    units: int
    of: int


def tightness_by_layer(
    model: Network,
    x: Float[Tensor, "batch *input"],
    eps: float | int | Tensor,
    *,
    units: int = 64,
    data_range: DataRange = (0, 1),
    generator: torch.Generator | None = None,
) -> list[LayerTightness]:
    """The local tightness of the network cut off after each weighted layer: where the bounds get loose.

    Args:
        units: of each layer, drawn without replacement where it has more.
        generator: of the draws.
    Raises: as `propagation_tightness`.
    """
    network = IntervalNetwork.of(model, x)
    moving = network.graph.depends_on_inputs()
    layers = [node for node in network.graph if node in moving and isinstance(node.op, WEIGHTED)]
    x, radius = _unit_box(x.double(), eps, data_range)
    chosen = {node: torch.randperm(sample_size(node), generator=generator)[:units] for node in layers}
    totals: dict[Node, list[Tensor]] = {node: [] for node in layers}
    for part in _parts(network.graph, len(x), units):
        inputs = x[part].requires_grad_()
        values = _walk(network, inputs, radius[part], "local", layers)
        for node in layers:
            rows = torch.eye(sample_size(node), dtype=x.dtype)[chosen[node]].to(x.device).expand(len(inputs), -1, -1)
            optimal = _optimal(node, values[node].value, inputs, radius[part], rows)
            interval = unpack(node, values[node].radius, len(inputs), 1).flatten(1)[:, chosen[node]]
            totals[node].append(optimal / interval)
    return [
        LayerTightness(node.layer or node.name, float(torch.cat(t).nanmean()), len(chosen[node]), sample_size(node))
        for node, t in totals.items()
    ]


def true_tightness(
    model: Network,
    x: Float[Tensor, "batch *input"],
    eps: float | int | Tensor,
    labels: Int[Tensor, "batch"] | None = None,
    timeout: float | int = 10,
    *,
    data_range: DataRange = (0, 1),
) -> Float[Tensor, "batch rows"]:
    """The tightness of interval bounds over the whole box, from the exact ranges of the outputs by branch and bound.

    Args: as for `propagation_tightness`.
        timeout: seconds for each sample; for small networks.
    Returns: (batch, rows) in the dtype of x; NaN where a range was not found in time.
    Raises: BadInput, naming the layer, for one that is not a piecewise-linear function of one variable.
    """
    network = IntervalNetwork.of(model, x)
    if labels is not None:
        check_labels(labels, network.classes)
    inputs, last = x.double(), network.last
    _unit_box(inputs, eps, data_range)
    box = Box(*box_around(inputs, eps, data_range))
    stored = {name: _in(tensor.detach(), torch.float64) for name, tensor in network.stored().items()}
    graph = replace(network.graph, tensors=stored)
    rows = _rows(network.classes, inputs, labels)
    values: dict[Node, Any] = propagate(graph, [Interval(box.lower, box.upper)], keep=(last.reads, *last.constants))
    radius = unpack(last.reads, values[last.reads].radius, len(x), 1).flatten(2)
    interval = (last.pull(rows, values).abs() @ radius.mT)[..., 0]
    lower, upper = output_ranges(graph, box, rows, timeout=timeout)
    return ((upper - lower) / 2 / interval).to(x.dtype)


def _unit_box(x: Tensor, eps: float | int | Tensor, data_range: DataRange) -> tuple[Tensor, Tensor]:
    """The inputs, and the radii of their boxes over the largest of the sample: a ratio of radii has no scale."""
    if not bool((torch.as_tensor(eps) > 0).all()):
        raise BadInput(f"a tightness is a ratio of widths and needs eps > 0, got {eps}")
    lower, upper = box_around(x, eps, data_range)
    radius = (upper - lower) / 2
    return x, radius / radius.flatten(1).amax(1).reshape(-1, *(1,) * (x.ndim - 1))


def _rows(classes: int, like: Tensor, labels: Tensor | None) -> Tensor:
    """Rows of the margins over the other classes, (batch, classes - 1, classes), or of the outputs."""
    eye = torch.eye(classes, dtype=like.dtype, device=like.device)
    if labels is None:
        return eye.expand(len(like), -1, -1)
    others = torch.arange(classes, device=like.device) != labels[:, None]
    return label_rows(labels, classes).to(like)[others].reshape(len(like), classes - 1, classes)


def _parts(graph: Graph, batch: int, rows: int) -> Iterator[slice]:
    """Samples to take together."""
    moving = graph.depends_on_inputs()
    widest = max(sample_size(node) for node in graph if node in moving)
    size = max(1, ENTRIES_AT_ONCE // (rows * widest))
    return (slice(start, start + size) for start in range(0, batch, size))


def _radii(network: IntervalNetwork, x: Tensor, radius: Tensor, rows: Tensor, mode: Mode) -> Radii:
    inputs = x.detach().requires_grad_()
    last = network.last
    values = _walk(network, inputs, radius, mode, (last.reads, *last.constants))
    optimal = _optimal(network.output, values[network.output].value, inputs, radius, rows)
    with torch.no_grad():
        read = unpack(last.reads, values[last.reads].radius, len(x), 1).flatten(2)
        interval = (last.pull(rows, values).abs() @ read.mT)[..., 0]
    return Radii(optimal, interval)


def _optimal(node: Node, value: Tensor, inputs: Tensor, radius: Tensor, rows: Tensor) -> Tensor:
    """|rows J| radius with J the derivative of a node's value by the inputs: a backward pass for each row, batched."""
    batch, count, _ = rows.shape
    shaped = rows.reshape(batch, count, *sample_shape(node)).transpose(0, 1)
    starts = torch.func.vmap(lambda one: pack(node, one[:, None]))(shaped)
    (slopes,) = torch.autograd.grad(value, inputs, starts, is_grads_batched=True, retain_graph=True)
    return (slopes.abs() * radius).flatten(2).sum(2).T


def _walk(
    network: IntervalNetwork, inputs: Tensor, radius: Tensor, mode: Mode, keep: Collection[Node]
) -> dict[Node, Any]:
    """Values at the inputs and radii around them, `_Local` for nodes that depend on the inputs, plain for constants."""
    if mode not in ("local", "linear"):
        raise BadInput(f"the mode of a tightness is 'local' or 'linear', got {mode!r}")

    def apply(node: Node, op: Op, values: tuple[Any, ...]) -> Any:
        moving = [i for i, value in enumerate(values) if isinstance(value, _Local)]
        if not moving:
            return op(*values)
        return _local(node, op, values, moving, mode)

    stored = {name: _in(tensor.detach(), inputs.dtype) for name, tensor in network.stored().items()}
    with torch.enable_grad():
        return forward(network.graph, [_Local(inputs, radius)], stored, apply, batch=len(inputs), keep=keep)


def _local(node: Node, op: Op, values: tuple[Any, ...], moving: list[int], mode: Mode) -> _Local:
    points = [value.value if isinstance(value, _Local) else value for value in values]
    if op.affine_in(frozenset(moving)):
        around = [Interval(-v.radius, v.radius) if isinstance(v, _Local) else v for v in values]
        return _Local(op(*points), apply_interval(node, op, tuple(around)).radius)
    if mode == "linear" and isinstance(op, Elementwise | PReLU):
        return values[0]
    entrywise = isinstance(op, Elementwise | PReLU)
    if not op.piecewise_linear or not (entrywise or op.monotone > 0) or mode == "linear":
        raise NotPiecewiseLinear(
            f"{op} ({node.where()}) is no {'linear map' if mode == 'linear' else 'piecewise-linear layer'}, which the "
            f"{mode} tightness of interval bounds is of.\nBound the network over a box of a given size instead: "
            "ibp_bounds, or BoundedGraph for tighter bounds."
        )
    return _Local(op(*points), _slope_times_radius(op, points, values, moving))


def _slope_times_radius(op: Op, points: list[Tensor], values: tuple[Any, ...], moving: list[int]) -> Tensor:
    """The derivative of a piecewise-linear op along the radii: monotone or entrywise, it is the radius behind it."""

    def function(*parts: Tensor) -> Tensor:
        operands = [point.detach() for point in points]
        for i, part in zip(moving, parts, strict=True):
            operands[i] = part
        return op(*operands)

    at = tuple(points[i].detach() for i in moving)
    change: Any = torch.func.jvp(function, at, tuple(values[i].radius for i in moving))[1]
    return change.abs()


def _in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
