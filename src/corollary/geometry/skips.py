"""What skip connections do to a network's singular values: the same weights with them, and with them taken out."""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import Inputs, map_inputs
from corollary.geometry.affine import as_graph, check_inputs, local_rows, parts, sample_size
from corollary.geometry.frozen import downstream, single_output
from corollary.geometry.layer_operator import WEIGHT_OPS
from corollary.geometry.singular_values import identity_skips, refusal
from corollary.graph import Graph, Node
from corollary.graph.ops import Add, Einsum, Identity, MatMul

WEIGHTED = (*WEIGHT_OPS, MatMul, Einsum)


@final
@dataclass(frozen=True, eq=False)
class SkipComparison:
    """Singular values of one local map, from before the first residual block on, with skip connections and without.

    Args:
        with_skips: of the network as it is, in decreasing order.
        without_skips: of the same weights at the same inputs with zero in the place of every skipped value.
        end: "the last block" or "the output": where the map leads.
        removed: number of skip connections taken out.
    """

    with_skips: Float[Tensor, "n values"]
    without_skips: Float[Tensor, "n values"]
    end: str
    removed: int


def skip_sums(graph: Graph) -> tuple[tuple[Node, Node, Node], ...]:
    """Every sum of a value and of a function of it that holds weights: the sum, the value and the function, as nodes.

    A sum without weights between (x + |x|, which is a ReLU) is no residual block.
    """
    return tuple(
        (total, skip, branch)
        for total, skip, branch in identity_skips(graph)
        if any(isinstance(node.op, WEIGHTED) for node in _between(graph, skip, branch))
    )


def _between(graph: Graph, skip: Node, branch: Node) -> set[Node]:
    """The nodes that lead from one to the other, the latter among them."""
    within, found = downstream(graph, [skip]), {branch}
    for node in reversed(graph.nodes):
        if node in found:
            found.update(source for source in node.inputs if source in within and source is not skip)
    return found


def other_sums(graph: Graph) -> tuple[Node, ...]:
    """The sums of two values that both depend on the input, of which neither is a function of the other.

    Parallel branches, such as a shortcut with weights of its own.
    """
    varying = downstream(graph, graph.inputs)
    known = {total for total, _, _ in identity_skips(graph)}
    return tuple(
        n for n in graph.nodes if isinstance(n.op, Add) and n not in known and all(s in varying for s in n.inputs)
    )


def without_skips(graph: Graph) -> tuple[Graph, dict[Node, Node]]:
    """The network of the same weights whose residual blocks hand on their branch alone, and where each node went."""
    branches = {total: branch for total, _, branch in skip_sums(graph)}
    place: dict[Node, Node] = {}
    for node in graph.nodes:
        if node in branches:
            place[node] = replace(node, op=Identity(), inputs=(place[branches[node]],))
            continue
        inputs = tuple(place[source] for source in node.inputs)
        place[node] = node if inputs == node.inputs else replace(node, inputs=inputs)
    outputs = tuple(place[node] for node in graph.outputs)
    return replace(graph, nodes=tuple(place[node] for node in graph.nodes), outputs=outputs), place


def trunk(graph: Graph, *, to_output: bool = False) -> tuple[Node, Node]:
    """Where the residual part begins (what the first block skips) and ends (the last sum, or the output).

    Raises: BadInput, if there are no residual blocks.
    """
    sums = skip_sums(graph)
    if not sums:
        raise BadInput("this network has no residual blocks: no sum of a value and of a layer's function of it")
    start = min((skip for _, skip, _ in sums), key=graph.nodes.index)
    return start, single_output(graph) if to_output else sums[-1][0]


def skip_comparison(model: nn.Module | Graph, x: Inputs, *, to_output: bool | None = None) -> SkipComparison:
    r"""Singular values of the local map through all residual blocks, with their skip connections and without.

    With blocks z + B z the map is $\prod_l (B_l + I)$, and without skips $\prod_l B_l$ at the same weights. The second
    network has activation patterns of its own: its branches read other values.

    Args:
        model: a module (not written to, taken in evaluation mode) or a captured graph.
        x: samples.
        to_output: whether the map leads to the network's output instead of the last block's sum. By default only where
            the latter is too large to decompose.
    Returns: values in float64.
    Raises: BadInput, if there are no residual blocks, or the map is too large. NoRule, if samples are mixed.
    Source: Riedi, Balestriero and Baraniuk 2022, arXiv 2203.03099.
    """
    check_inputs(x)
    x = map_inputs(lambda tensor: tensor.double(), x)
    graph = as_graph(model, x, dtype=torch.float64)
    start, end = trunk(graph, to_output=bool(to_output))
    if to_output is None and refusal(graph, start, end):
        start, end = trunk(graph, to_output=True)
    if reason := refusal(graph, start, end):
        raise BadInput(f"the map through the residual blocks is not formed: {reason}")
    plain, place = without_skips(graph)
    return SkipComparison(
        _singular_values(graph, x, start, end),
        _singular_values(plain, x, place[start], place[end]),
        "the output" if end is single_output(graph) else "the last block",
        len(skip_sums(graph)),
    )


def _singular_values(graph: Graph, x: Inputs, start: Node, end: Node) -> Float[Tensor, "n values"]:
    m = sample_size(end)
    rows = (local_rows(graph, part, end, [start], range(m))[0] for _, part in parts(graph, x, m))
    return torch.cat([torch.linalg.svdvals(found.transpose(0, 1)) for found in rows])
