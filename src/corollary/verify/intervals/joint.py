"""Rules of the ops that join several entries: softmax, norms, attention, comparisons, choices."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from corollary.base.errors import NoRule
from corollary.graph.ops import (
    ArgMax,
    Attention,
    Compare,
    Gather,
    GroupNorm,
    LayerNorm,
    LogSoftmax,
    Norm,
    Softmax,
    Where,
)
from corollary.graph.ops.joint import COMPARISONS
from corollary.verify.intervals.bilinear import add, magnitude, matmul, multiply, reshaped
from corollary.verify.intervals.interval import Interval, Operand, between, interval, lower, upper
from corollary.verify.log_odds import LogOdds, log_odds


def sum_of_others(x: Tensor, axis: int) -> Tensor:
    """For each entry of a tensor >= 0, the sum of all the others along an axis, without cancellation.

    Total minus entry loses all digits only for an entry larger than all others together: the largest is left out
    of a sum of its own.
    """
    largest = torch.zeros_like(x, dtype=torch.bool).scatter(axis, x.argmax(axis, keepdim=True), True)
    rest = x.masked_fill(largest, 0).sum(axis, keepdim=True)
    return torch.where(largest, rest, x.sum(axis, keepdim=True) - x)


def softmax(x: Interval, axis: int) -> Interval:
    r"""Exact ends: $e^{l_k} / (e^{l_k} + \sum_{i \neq k} e^{u_i})$, and with l and u exchanged."""
    if x.shape[axis] == 1:
        return between(torch.ones_like, x)
    ends = log_odds(x.lower, x.upper, axis).sigmoid(), log_odds(x.upper, x.lower, axis).sigmoid()
    return Interval(ends[0].nan_to_num(nan=0.0), ends[1].nan_to_num(nan=1.0))  # of infinite scores nothing is known


@interval.rule(LogOdds)
def _log_odds(op: LogOdds, x: Interval) -> Interval:
    ends = log_odds(x.lower, x.upper, op.axis), log_odds(x.upper, x.lower, op.axis)
    low, high = (
        torch.where(end.isnan(), unknown, end) for end, unknown in zip(ends, (-torch.inf, torch.inf), strict=True)
    )
    return Interval(low, high)


@interval.rule(Softmax)
def _softmax(op: Softmax, x: Interval) -> Interval:
    return softmax(x, op.axis)


@interval.rule(LogSoftmax)
def _log_softmax(op: LogSoftmax, x: Interval) -> Interval:
    if x.shape[op.axis] == 1:
        return between(torch.zeros_like, x)
    return Interval(
        F.logsigmoid(log_odds(x.lower, x.upper, op.axis)),
        F.logsigmoid(log_odds(x.upper, x.lower, op.axis)),
    )


@interval.rule(Norm)
def _norm(op: Norm, x: Interval) -> Interval:
    return between(op, magnitude(x))


@interval.rule(LayerNorm)
def _layer_norm(op: LayerNorm, x: Operand, weight: Operand | None = None, bias: Operand | None = None) -> Interval:
    shape = lower(x).shape
    flat = between(lambda end: end.flatten(-len(op.shape)), x)
    found = between(lambda end: end.reshape(shape), _standardised(flat, op.epsilon))
    return _scaled(found, weight, bias)


@interval.rule(GroupNorm)
def _group_norm(op: GroupNorm, x: Operand, weight: Operand | None = None, bias: Operand | None = None) -> Interval:
    shape = lower(x).shape
    by_group = between(lambda end: end.reshape(shape[0], op.groups, -1), x)
    found = between(lambda end: end.reshape(shape), _standardised(by_group, op.epsilon))
    by_channel = (-1, *(1,) * (len(shape) - 2))
    return _scaled(found, *(None if v is None else reshaped(v, by_channel) for v in (weight, bias)))


def _scaled(x: Interval, weight: Operand | None, bias: Operand | None) -> Interval:
    found = x if weight is None else multiply(x, weight)
    return found if bias is None else add(found, bias)


def _standardised(x: Interval, epsilon: float) -> Interval:
    r"""Zero mean and unit variance along the last axis.

    The deviations d from the mean are linear in x, so their intervals are exact. Each result
    $d_k / \sqrt{(d_k^2 + \sum_{i \neq k} d_i^2) / n + \epsilon}$ rises in $d_k$, and in size falls in the other
    squares; it is at most $\sqrt{n - 1}$ in size, because the deviations sum to zero.
    """
    n = x.shape[-1]
    center, radius = x.center, x.radius
    middle = center - center.mean(-1, keepdim=True)
    reach = radius * abs(1 - 2 / n) + radius.mean(-1, keepdim=True) if n > 1 else torch.zeros_like(radius)
    d = Interval(middle - reach, middle + reach)
    squares = between(torch.square, magnitude(d))
    others = between(lambda end: sum_of_others(end, -1), squares)
    most = math.sqrt(n - 1)

    def end(own: Tensor, small: Tensor, large: Tensor, unknown: float) -> Tensor:
        """The result at an end of d_k: `small` are the others' squares where d_k > 0, `large` where not."""
        spread = ((own.square() + torch.where(own > 0, small, large)) / n + epsilon).sqrt()
        return torch.nan_to_num(own / spread, nan=unknown).clamp(-most, most)

    return Interval(end(d.lower, others.upper, others.lower, -most), end(d.upper, others.lower, others.upper, most))


@interval.rule(Attention)
def _attention(op: Attention, query: Operand, key: Operand, value: Operand, mask: Operand | None = None) -> Interval:
    scale = op.scale if op.scale is not None else 1 / math.sqrt(lower(query).shape[-1])
    scores = matmul(between(lambda end: end * scale, query), between(lambda end: end.mT, key))
    if op.causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.lower.device).tril()
    if mask is not None:
        scores = _masked(scores, mask)
    weights = softmax(scores, -1)
    found = matmul(weights, value)
    # The weights sum to one: no mean of the values leaves the range of the values.
    smallest, largest = lower(value).amin(-2, keepdim=True), upper(value).amax(-2, keepdim=True)
    return Interval(torch.maximum(found.lower, smallest), torch.minimum(found.upper, largest))


def _masked(scores: Interval, mask: Operand) -> Interval:
    """A truth value keeps a score or makes it minus infinity; a number is added."""
    if isinstance(mask, Interval) or mask.dtype != torch.bool:
        return add(scores, mask)
    hidden = ~mask
    return between(lambda end: end.masked_fill(hidden, -math.inf), scores)


@interval.rule(Compare)
def _compare(op: Compare, a: Operand, b: Operand) -> Interval:
    """Truth values: the lower end says whether it always holds, the upper whether it can."""
    if op.relation in (">", ">="):
        return _compare(Compare("<" if op.relation == ">" else "<="), b, a)
    if op.relation in ("<", "<="):
        holds = COMPARISONS[op.relation]
        return Interval(holds(upper(a), lower(b)), holds(lower(a), upper(b)))
    known = (lower(a) == upper(a)) & (lower(b) == upper(b))
    always = known & (lower(a) == lower(b))
    possible = (lower(a) <= upper(b)) & (lower(b) <= upper(a))
    return Interval(always, possible) if op.relation == "==" else Interval(~possible, ~always)


@interval.rule(Where)
def _where(_op: Where, condition: Operand, a: Operand, b: Operand) -> Interval:
    always, possible = lower(condition), upper(condition)
    low = torch.where(always, lower(a), torch.where(possible, torch.minimum(lower(a), lower(b)), lower(b)))
    high = torch.where(always, upper(a), torch.where(possible, torch.maximum(upper(a), upper(b)), upper(b)))
    return Interval(low, high)


@interval.rule(ArgMax)
def _arg_max(op: ArgMax, x: Interval) -> Interval:
    """From the first to the last entry that can be largest."""
    candidates = (x.upper >= x.lower.amax(op.axis, keepdim=True)).to(torch.int8)
    last = x.shape[op.axis] - 1 - candidates.flip(op.axis).argmax(op.axis, keepdim=op.keep_axes)
    return Interval(candidates.argmax(op.axis, keepdim=op.keep_axes), last)


@interval.rule(Gather)
def _gather(op: Gather, x: Operand, indices: Operand) -> Interval:
    if isinstance(indices, Interval):
        raise NoRule(
            "the interval meaning has no rule for Gather by indices that depend on the input (an embedding of computed "
            "tokens, an argmax used as an index); bound the network up to the indices instead."
        )
    return between(lambda end: op(end, indices), x)
