"""Softmax, attention and normalisations in log-odds, exponentials, sums, roots, reciprocals and products."""

import math

import torch

from corollary.graph import Node
from corollary.graph.ops import (
    Add,
    Attention,
    Exp,
    GroupNorm,
    LayerNorm,
    Log,
    LogSoftmax,
    LogSumExp,
    MatMul,
    Mean,
    Multiply,
    Norm,
    Permute,
    Power,
    Reciprocal,
    Reshape,
    Sigmoid,
    Softmax,
    Sqrt,
    Subtract,
    Sum,
)
from corollary.verify.log_odds import LogOdds
from corollary.verify.primitives.rewriter import Rewriter, parts_of

MASKED = -1e20
"""A constant below it, added before a softmax, is a mask: its exponential is zero whatever it is added to."""


@parts_of(Softmax)
def _softmax(to: Rewriter, op: Softmax, x: Node) -> Node:
    x, seen = _unmasked(to, x)
    axis = op.axis % len(x.shape)
    return softmax(to, x, axis, seen)


def softmax(to: Rewriter, x: Node, axis: int, seen: Node | None) -> Node:
    """The softmax over the entries where the constant `seen` is 1; over all, as a sigmoid, where it is None."""
    length = x.shape[axis]
    if seen is None and isinstance(length, int) and length > 1:
        return to.emit(Sigmoid(), to.emit(LogOdds(axis), x))
    exponentials = _exponentials(to, x, seen)
    total = to.emit(Sum((axis,), keep_axes=True), exponentials)
    return to.emit(Multiply(), exponentials, to.emit(Reciprocal(), total))


def _exponentials(to: Rewriter, x: Node, seen: Node | None) -> Node:
    exponentials = to.emit(Exp(), x)
    return exponentials if seen is None else to.emit(Multiply(), exponentials, seen)


def _unmasked(to: Rewriter, x: Node) -> tuple[Node, Node | None]:
    """Take a constant mask of minus infinity out of what a softmax reads: bounds need finite numbers."""
    if not isinstance(x.op, Add):
        return x, None
    for own, other in (x.inputs, x.inputs[::-1]):
        added = to.value(other)
        if added is not None and to.moves(own) and bool((added < MASKED).any()):
            finite = added.masked_fill(added < MASKED, 0)
            seen = to.constant((added >= MASKED).to(x.dtype), "seen")
            return (to.emit(Add(), own, to.constant(finite, "unmasked")) if bool(finite.any()) else own), seen
    return x, None


@parts_of(LogSoftmax)
def _log_softmax(to: Rewriter, op: LogSoftmax, x: Node) -> Node:
    return to.emit(Subtract(), x, to.emit(LogSumExp((op.axis,), keep_axes=True), x))


@parts_of(LogSumExp)
def _log_sum_exp(to: Rewriter, op: LogSumExp, x: Node) -> Node:
    return to.emit(Log(), to.emit(Sum(op.axes, op.keep_axes), to.emit(Exp(), x)))


@parts_of(Norm)
def _norm(to: Rewriter, op: Norm, x: Node) -> Node:
    return to.emit(Sqrt(), to.emit(Sum(op.axes, op.keep_axes), to.emit(Power(2.0), x)))


@parts_of(LayerNorm)
def _layer_norm(to: Rewriter, op: LayerNorm, x: Node, *weight_and_bias: Node) -> Node:
    axes = tuple(range(len(x.shape) - len(op.shape), len(x.shape)))
    return _scaled(to, _standardised(to, x, axes, math.prod(op.shape), op.epsilon), weight_and_bias)


@parts_of(GroupNorm)
def _group_norm(to: Rewriter, op: GroupNorm, x: Node, *weight_and_bias: Node) -> Node:
    batch, channels, *spatial = x.shape
    size = math.prod(size for size in (channels, *spatial) if isinstance(size, int)) // op.groups
    by_group = to.emit(Reshape((batch, op.groups, size)), x)
    found = to.emit(Reshape(x.shape), _standardised(to, by_group, (2,), size, op.epsilon))
    by_channel = Reshape((-1, *(1,) * len(spatial)))
    return _scaled(to, found, tuple(to.emit(by_channel, node) for node in weight_and_bias))


def _standardised(to: Rewriter, x: Node, axes: tuple[int, ...], n: int, epsilon: float) -> Node:
    """(x - mean) / sqrt(variance + epsilon) over n entries; the deviations sum to zero, so none exceeds sqrt(n - 1)."""
    deviation = to.emit(Subtract(), x, to.emit(Mean(axes, keep_axes=True), x))
    variance = to.emit(Mean(axes, keep_axes=True), to.emit(Power(2.0), deviation))
    spread = to.emit(Sqrt(), to.emit(Add(), variance, to.number(epsilon, x)))
    found = to.emit(Multiply(), deviation, to.emit(Reciprocal(), spread))
    to.hold(found, (-math.sqrt(n - 1), math.sqrt(n - 1)))
    return found


def _scaled(to: Rewriter, x: Node, weight_and_bias: tuple[Node, ...]) -> Node:
    for op, node in zip((Multiply(), Add()), weight_and_bias, strict=False):
        x = to.emit(op, x, node)
    return x


@parts_of(Attention)
def _attention(to: Rewriter, op: Attention, query: Node, key: Node, value: Node, mask: Node | None = None) -> Node:
    width, axes = query.shape[-1], len(key.shape)
    assert isinstance(width, int)
    scale = op.scale if op.scale is not None else 1 / math.sqrt(width)
    turned = to.emit(Permute((*range(axes - 2), axes - 1, axes - 2)), key)
    scaled = to.emit(Multiply(), query, to.number(scale, query))
    scores = to.emit(MatMul(), scaled, turned)
    seen = None
    if op.causal:
        sizes = scores.shape[-2:]
        if not all(isinstance(size, int) for size in sizes):
            raise to.declined(op, "its causal mask depends on the batch")
        seen = to.constant(torch.ones(sizes, dtype=scores.dtype).tril(), "seen")  # type: ignore[arg-type]  # scores have fixed sizes here
    elif mask is not None and mask.dtype == torch.bool and not to.moves(mask):
        known = to.value(mask)
        if known is None:
            raise to.declined(op, "its mask depends on the batch")
        seen = to.constant(known.to(scores.dtype), "seen")
    elif mask is not None:
        scores, seen = _unmasked(to, to.emit(Add(), scores, mask))
    if not to.moves(scores):
        weights = to.emit(Softmax(axes - 1), scores)
    else:
        weights = softmax(to, scores, axes - 1, seen)
        to.hold(weights, (0.0, 1.0))
    return to.emit(MatMul(), weights, value)
