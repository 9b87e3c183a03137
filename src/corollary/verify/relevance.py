"""Which entries of inner nodes some rows of an output depend on over a region; bounds of others do not matter."""

from collections.abc import Mapping

import torch
from torch import Tensor

from corollary.graph import Node, backward
from corollary.graph.ops import MatMul, Max, MaxPool, Multiply
from corollary.verify.known import Known
from corollary.verify.layout import Rows, pack, sample_axis, sample_shape
from corollary.verify.linear_functions import summed_to
from corollary.verify.log_odds import LogOdds
from corollary.verify.prepared import Prepared
from corollary.verify.transpose import transposed


def relevant_entries(network: Prepared, start: Node, rows: Rows, known: Known) -> Mapping[Node, Tensor]:
    """The entries of each node in `network.bounded` that some row can depend on, (batch, entries); missing nodes: none.

    Random weights are carried back instead of the rows' own: sums of them that cancel have probability zero. They
    end where a nonlinear node is constant over the region, such as an inactive ReLU. What comes out says where effort
    pays; no bound stands on it.
    """
    generator = torch.Generator(device=network.device).manual_seed(0)
    found: dict[Node, Tensor] = {}

    def shuffled(flow: Tensor) -> Tensor:
        weights = torch.rand(flow.shape, generator=generator, dtype=flow.dtype, device=flow.device)
        return (flow != 0) * (0.5 + weights)

    def pull(node: Node, given: Rows) -> list[Rows | None]:
        flow = shuffled(given.unpacked(node))
        flows: list[Rows | None] = [None] * len(node.inputs)
        moving = network.moving(node)
        if moving and network.is_nonlinear(node):
            for i in moving:
                source = node.inputs[i]
                values = _through(node, i, flow, known)
                reached = (values != 0).flatten(1)
                found[source] = found[source] | reached if source in found else reached
                flows[i] = Rows(pack(source, values), known.batch, 1)
        elif moving:
            operands = network.operands(node, known.batch)
            parts = transposed(node, moving, operands, pack(node, flow), known.batch)
            for i, part in zip(moving, parts, strict=True):
                flows[i] = Rows(part, known.batch, 1)
        return flows

    def add(a: Rows, b: Rows) -> Rows:
        return Rows(a.values + b.values, a.batch, 1)

    first = rows.widened(start, known.batch).unpacked(start).abs().sum(1, keepdim=True)
    backward(network.graph, {start: Rows(pack(start, first), known.batch, 1)}, pull, add)
    return found


def _through(node: Node, position: int, flow: Tensor, known: Known) -> Tensor:
    """Nonzero where an entry of the input at `position` moves an output with nonzero flow, (batch, 1, *source)."""
    source = node.inputs[position]
    shape = sample_shape(source)
    if isinstance(node.op, Multiply):
        return summed_to(flow, shape)
    if isinstance(node.op, MatMul):
        # an entry of X meets a row of the product, one of Y a column
        spread = flow.sum(-1 if position == 0 else -2, keepdim=True)
        return summed_to(spread + torch.zeros_like(spread[..., :1, :1]).expand(*flow.shape[:-2], *shape[-2:]), shape)
    if isinstance(node.op, LogOdds):
        return flow.sum(sample_axis(node, node.op.axis), keepdim=True).expand_as(flow)
    if isinstance(node.op, Max | MaxPool):
        return flow.new_ones(len(flow), 1, *shape) * flow.flatten(1).sum(1).reshape(-1, *(1,) * (1 + len(shape)))
    lines = known.lines(node)
    rises = (lines.lower_slope != 0) | (lines.upper_slope != 0)
    apart = _number(lines.lower_offset) != _number(lines.upper_offset)
    return flow * (rises | apart).reshape(flow.shape)


def _number(offset: Tensor | None) -> Tensor | float:
    return 0.0 if offset is None else offset
