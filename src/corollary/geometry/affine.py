"""The affine map a network is around each input: exact for piecewise-affine networks, first order for smooth ones.

The matrices of many samples are formed at once, by one walk backward that carries all rows of all samples. Products
without matrices are those of `corollary.geometry.frozen`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from corollary.base.errors import BadInput, CannotCapture, NoRule
from corollary.base.network import (
    Inputs,
    as_function,
    batch_length,
    evaluating,
    first_tensor,
    map_inputs,
    refuse_non_finite,
)
from corollary.geometry.frozen import FrozenNetwork, downstream, freeze, refuse_several, single_output
from corollary.geometry.patterns import lines, smooth_nodes
from corollary.graph import Graph, Node, backward, capture, evaluate
from corollary.graph.ops import BatchNorm, BatchSize, Divide, Elementwise, Input, Multiply, Negate, PReLU

ENTRYWISE = (Elementwise, BatchNorm, Multiply, Divide, Negate, PReLU)
"""Ops whose output entries each depend on one entry of the input that varies, where both have one shape."""
ROW_BYTES = 2**25
"""Samples are taken in parts whose rows take at most so many bytes at the widest node."""

# ---------------------------------------------------------------------------------------- the walk that carries rows


def constants_of(graph: Graph, targets: Collection[Node]) -> frozenset[Node]:
    """The nodes whose values `derivative_rows` needs: what the way from `targets` to the outputs reads beside it."""
    live = downstream(graph, targets)
    return frozenset(source for node in live for source in node.inputs if source not in live)


def derivative_rows(
    network: FrozenNetwork,
    known: Mapping[Node, Any],
    start: Node,
    rows: Float[Tensor, "m *out"],
    targets: Collection[Node],
    batch: int,
) -> dict[Node, Tensor]:
    """Products of `rows` with the derivative of `start` by the value of each of `targets`, for every sample.

    Args:
        known: values of `constants_of(network.graph, targets)` for the samples of the pattern.
        rows: on one sample's value of `start`; they are shared by all samples up to the first node that differs
            between them, so that the last layers are transposed only once.
        batch: number of samples.
    Returns: for each target [m, n, *its shape] (an expanded tensor where all samples share it); a target that `start`
        does not depend on is missing.
    Raises: NoRule, if the samples do not lie along the first axis of `start` or of a target.
    """
    graph = network.graph
    for node in (start, *targets):
        if not _samples_first(node):
            raise NoRule(
                f"the samples do not lie along the first axis of {node.op} ({node.where()}): no map per sample"
            )
    live = downstream(graph, targets)
    by_sample = graph.depends_on_inputs()
    found: dict[Node, Tensor] = {}

    def pull(node: Node, value: Tensor) -> list[Tensor | None]:
        if node in targets:
            found[node] = value.expand(-1, batch, *value.shape[2:])
        flows: list[Tensor | None] = [None] * len(node.inputs)
        moving = tuple(i for i, source in enumerate(node.inputs) if source in live)
        if not moving:
            return flows
        if _same_for_all(network, node, live, by_sample):
            # Rows of different samples are then rows of one map: the op is linearised for a single sample.
            flat = value.reshape(-1, 1, *value.shape[2:])
            pulled = _transposed(network, node, moving, known, flat, 1)
            pulled = tuple(flow.reshape(*value.shape[:2], *flow.shape[2:]) for flow in pulled)
        else:
            full = value.expand(-1, batch, *value.shape[2:]) if _samples_first(node) else value
            pulled = _transposed(network, node, moving, known, full, batch)
        for i, flow in zip(moving, pulled, strict=True):
            flows[i] = flow
        return flows

    ends = backward(graph, {start: rows[:, None]}, pull, torch.add)
    return found | {node: value.expand(-1, batch, *value.shape[2:]) for node, value in ends.items() if node in targets}


def _same_for_all(network: FrozenNetwork, node: Node, live: frozenset[Node], by_sample: frozenset[Node]) -> bool:
    """Whether all samples have the same linear map at `node`, so that it can be transposed once for all."""
    if node in network.held or node in network.tangents or not _samples_first(node):
        return False
    return all(
        _samples_first(source) if source in live else source not in by_sample and _sizes(source, 1) == source.shape
        for source in node.inputs
    )


def _transposed(
    network: FrozenNetwork,
    node: Node,
    moving: tuple[int, ...],
    known: Mapping[Node, Any],
    rows: Tensor,
    batch: int,
) -> tuple[Tensor, ...]:
    """The rows that reach the `moving` inputs of a node: an affine map is transposed by the derivative of itself."""
    if node in network.held and isinstance(node.op, Elementwise):
        return (rows * _slopes(node.op, network.held[node], rows),)
    pull = _pull_of(network, node, moving, known, rows, batch)
    entrywise = isinstance(node.op, ENTRYWISE) and len(moving) == 1 and node.inputs[moving[0]].shape == node.shape
    if entrywise:  # one slope an entry: the rows are multiplied by it, without a derivative for each
        return (rows * pull(rows.new_ones(_sizes(node, batch)))[0],)
    return vmap(pull)(rows)


def _slopes(op: Elementwise, piece: Tensor, like: Tensor) -> Tensor:
    slopes = like.new_tensor(lines(op)[1])
    found = slopes[0]
    for i in range(1, len(slopes)):
        found = torch.where(piece >= i, slopes[i], found)
    return found


def _pull_of(
    network: FrozenNetwork, node: Node, moving: tuple[int, ...], known: Mapping[Node, Any], like: Tensor, batch: int
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    if node in network.tangents:
        tangent = replace(network.tangents[node], moving=moving)
        return vjp(tangent.function, *tangent.moving_point)[1]
    compute = network.stand_in(node, node.op.at(batch))

    def function(*values: Tensor) -> Tensor:
        moved = dict(zip(moving, values, strict=True))
        return compute(*(moved[i] if i in moved else known[source] for i, source in enumerate(node.inputs)))

    return vjp(function, *(like.new_zeros(_sizes(node.inputs[i], batch)) for i in moving))[1]


def _samples_first(node: Node) -> bool:
    return node.shape[:1] == (BatchSize(),) and not any(isinstance(size, BatchSize) for size in node.shape[1:])


def _sizes(node: Node, batch: int) -> tuple[int, ...]:
    return tuple(size.at(batch) if isinstance(size, BatchSize) else size for size in node.shape)


def sample_size(node: Node) -> int:
    """Number of entries of one sample's value."""
    return torch.Size(_sizes(node, 1)).numel()


# ------------------------------------------------------------------------------------------------------ dense maps


@final
@dataclass(frozen=True, eq=False)
class LocalAffine:
    r"""The maps $f(x) = A_i x + b_i$ around the samples $x_i$; inputs and outputs flattened, several inputs joined.

    Args:
        exact: whether map and network agree on the whole linear region; otherwise they agree to first order.
    """

    A: Float[Tensor, "n m d"]
    b: Float[Tensor, "n m"]
    exact: bool

    def apply(self, x: Inputs) -> Float[Tensor, "n m"]:
        """The maps at other points, one for each sample."""
        return torch.einsum("nmd,nd->nm", self.A, flattened(x)) + self.b


def local_affine(model: nn.Module | Graph, x: Inputs, *, outputs: Sequence[int] | None = None) -> LocalAffine:
    r"""The affine map $f(x) = A(x)\,x + b(x)$ the network is around each sample, in evaluation mode.

    Exact on the linear region of each sample for networks of affine layers and piecewise-linear activations, pools,
    sorts and comparisons; with smooth activations the first-order map. A module whose program cannot be captured is
    differentiated as a function, and its map is reported as not exact, since nothing is known of its pieces.

    Args:
        model: a module (not written to) or a graph, with one output tensor [n, ...]. Capturing a module takes longer
            than most maps: for many calls, capture it once and pass the graph.
        x: n samples [n, ...]; several input tensors as a tuple or a mapping.
        outputs: the coordinates of the flattened output to keep; all of them if None.
    Returns: A [n, m, d], b [n, m] in the dtype of the network.
    Raises: BadInput, for inputs that are empty, not floating point or not finite, or several outputs.
    Source: Riedi, Balestriero and Baraniuk 2022, arXiv 2203.03099: the exact local linear representation of a layer.
    """
    check_inputs(x)
    try:
        graph = as_graph(model, x)
        single_output(graph)
        smooth = smooth_nodes(graph)
        refuse_several(smooth)
    except (CannotCapture, NoRule):
        return _by_differentiation(model, x, outputs)
    output, origins, n = single_output(graph), input_nodes(graph, x), batch_length(x)
    chosen = range(sample_size(output)) if outputs is None else outputs
    rows = torch.empty(0)
    offsets: list[Tensor] = []
    for first, part in parts(graph, x, len(chosen)):
        found, value = local_rows(graph, part, output, origins, chosen)
        offsets.append(value - torch.einsum("mnd,nd->nm", found, flattened(part)))
        if len(value) == n:
            rows = found
            continue
        rows = rows if first else found.new_empty(len(found), n, found.shape[2])
        rows[:, first : first + len(value)] = found
    return LocalAffine(rows.transpose(0, 1), torch.cat(offsets), exact=not smooth)


def local_rows(
    graph: Graph, x: Inputs, end: Node, origins: Sequence[Node], coordinates: Sequence[int]
) -> tuple[Float[Tensor, "m n d"], Float[Tensor, "n m"]]:
    """Derivatives of some coordinates of the value of `end` by the values of `origins` (joined), and those coordinates.

    Raises: NoRule, as `derivative_rows` does.
    """
    wanted = constants_of(graph, origins) | {end, *origins}
    network, known = freeze(graph, x, wanted)
    value = known[end].flatten(1)
    with torch.no_grad():
        rows = unit_rows(end, value, coordinates)
        found = derivative_rows(network, known, end, rows, origins, len(value))
        blocks = (found[node] if node in found else value.new_zeros(len(rows), *known[node].shape) for node in origins)
        columns = [block.flatten(2) for block in blocks]
    return torch.cat(columns, dim=2) if len(columns) > 1 else columns[0], value[:, list(coordinates)]


def unit_rows(node: Node, like: Tensor, coordinates: Sequence[int] | None = None) -> Float[Tensor, "m *out"]:
    """One row for each entry (or each of `coordinates`) of one sample's value of `node`, in the dtype of `like`."""
    wanted = list(range(sample_size(node)) if coordinates is None else coordinates)
    rows = like.new_zeros(len(wanted), sample_size(node))
    rows[range(len(wanted)), wanted] = 1  # not the identity: a layer has more entries than a square of them fits
    return rows.reshape(len(wanted), *_sizes(node, 1)[1:])


def parts(graph: Graph, x: Inputs, rows: int) -> list[tuple[int, Inputs]]:
    """`x` in parts for which so many rows fit in `ROW_BYTES`, each with the position of its first sample."""
    widest = max(sample_size(node) for node in downstream(graph, graph.inputs))
    size = max(1, ROW_BYTES // max(1, rows * widest * first_tensor(x).itemsize))
    return [(i, map_inputs(lambda t, i=i: t[i : i + size], x)) for i in range(0, batch_length(x), size)]


def _by_differentiation(model: nn.Module | Graph, x: Inputs, outputs: Sequence[int] | None) -> LocalAffine:
    leaves = map_inputs(lambda t: t.detach().requires_grad_(), x)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        if isinstance(model, nn.Module):
            with evaluating(model):
                value = as_function(model)({}, leaves).flatten(1)
        else:
            value = evaluate(model, leaves).flatten(1)
        identity = torch.eye(value.shape[1], dtype=value.dtype, device=value.device)
        rows = identity if outputs is None else identity[list(outputs)]
        seeds = rows[:, None].expand(-1, *value.shape)
        columns = torch.autograd.grad(value, _tensors(leaves), seeds, is_grads_batched=True, materialize_grads=True)
    A = torch.cat([column.flatten(2) for column in columns], dim=2).transpose(0, 1).detach()
    kept = value.detach() if outputs is None else value.detach()[:, list(outputs)]
    return LocalAffine(A, kept - torch.einsum("nmd,nd->nm", A, flattened(x)), exact=False)


# ------------------------------------------------------------------------------------------------- at the door


def as_graph(model: nn.Module | Graph, x: Inputs, *, dtype: torch.dtype | None = None) -> Graph:
    """`model` as a graph in `dtype` (its own if None), its tensors detached.

    Raises: CannotCapture, if its program cannot be written as a graph.
    """
    graph = capture(model, x, dtype=dtype) if isinstance(model, nn.Module) else model

    def converted(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype) if dtype is not None and tensor.is_floating_point() else tensor.detach()

    return replace(graph, tensors={name: converted(tensor) for name, tensor in graph.tensors.items()})


def flattened(x: Inputs) -> Float[Tensor, "n d"]:
    """One row a sample, several input tensors joined in their order."""
    return torch.cat([tensor.flatten(1) for tensor in _tensors(x)], dim=1)


def _tensors(x: Inputs) -> tuple[Tensor, ...]:
    if isinstance(x, Tensor):
        return (x,)
    return tuple(x.values() if isinstance(x, Mapping) else x)


def input_nodes(graph: Graph, x: Inputs) -> tuple[Node, ...]:
    """The graph's inputs in the order of the tensors in `x`."""
    if not isinstance(x, Mapping):
        return graph.inputs
    by_name = {node.op.name: node for node in graph.inputs if isinstance(node.op, Input)}
    return tuple(by_name[name] for name in x)


def check_inputs(x: Inputs) -> None:
    """Raises: BadInput, if there is no sample, or one that is not floating point or not finite."""
    if batch_length(x) == 0:
        raise BadInput("the inputs are empty: at least one sample is needed")

    def check(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            raise BadInput(
                f"a local map needs floating-point inputs, got {tensor.dtype}: take the part after the embedding"
            )
        refuse_non_finite(tensor, "the input")
        return tensor

    map_inputs(check, x)
