"""Linear functions carried back through the two halves of a softmax: log-odds, and their sigmoids that sum to one."""

import torch
from torch import Tensor

from corollary.graph import Node
from corollary.verify.known import Known
from corollary.verify.layout import Rows, pack, sample_axis
from corollary.verify.log_odds import LogOdds


def recentered(node: Node, rows: Rows, known: Known) -> tuple[Rows, Tensor]:
    """The functions less a multiple of a sum that is one, the multiple with which their lines are tightest; and it.

    Entries whose coefficient is positive then stand on their lower lines, the others on their upper ones; the cost of
    these at the middle of the box is least at a quantile of the coefficients.
    """
    rows = rows.widened(node, known.batch)
    axis = known.network.shares[node]
    values = rows.unpacked(node).movedim(axis, -1)
    below, above = (part.movedim(axis, -1) for part in known.looseness(node))
    order = values.detach().argsort(-1)
    low, high = (part.expand_as(values).gather(-1, order) for part in (below, above))
    # Raising the multiple past entry i moves it from its lower to its upper line.
    balance = high.cumsum(-1) + low.cumsum(-1) - low.sum(-1, keepdim=True)
    place = (balance < 0).sum(-1, keepdim=True).clamp(max=values.shape[-1] - 1)
    multiple = values.gather(-1, order.gather(-1, place))
    moved = pack(node, (values - multiple).movedim(-1, axis))
    return Rows(moved, rows.batch, rows.count), multiple.flatten(2).sum(2)


def through_odds(node: Node, rows: Rows, known: Known) -> tuple[Rows, Tensor]:
    """The functions of the entries below those of their log-odds: coefficients and constant."""
    assert isinstance(node.op, LogOdds)
    axis = sample_axis(node, node.op.axis)
    values = rows.widened(node, known.batch).unpacked(node).movedim(axis, -1)
    lines = known.odds(node)
    flow, shift = values, values.new_zeros(())
    for part, weights, offset in (
        (values.clamp(min=0), lines.lower_weights, lines.lower_offset),
        (values.clamp(max=0), lines.upper_weights, lines.upper_offset),
    ):
        grouped = part.flatten(2, -2) if part.ndim > 3 else part[:, :, None]
        matrices = weights.reshape(len(weights), -1, *weights.shape[-2:])
        flow = flow - torch.einsum("bcgk,bgki->bcgi", grouped, matrices).reshape(part.shape)
        shift = shift + (part * torch.where(part == 0, 0.0, offset)).flatten(2).sum(2)
    return Rows(pack(node.inputs[0], flow.movedim(-1, axis)), known.batch, rows.count), shift
