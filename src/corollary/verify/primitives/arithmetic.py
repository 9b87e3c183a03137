"""Quotients, larger and smaller ones, choices and comparisons in products and ReLUs; copies left out."""

import torch

from corollary.graph import Node
from corollary.graph.ops import (
    Abs,
    Add,
    Cast,
    Compare,
    Divide,
    Expand,
    Identity,
    LeakyReLU,
    Maximum,
    Minimum,
    Multiply,
    Permute,
    Power,
    PReLU,
    Reciprocal,
    ReLU,
    Reshape,
    Sign,
    Sqrt,
    Subtract,
    Where,
)
from corollary.verify.primitives.rewriter import Rewriter, parts_of


@parts_of(Identity)
def _identity(_to: Rewriter, _op: Identity, x: Node) -> Node:
    return x


@parts_of(Reshape, Expand)
def _same_shape_left_out(to: Rewriter, op: Reshape | Expand, x: Node) -> Node:
    if op.shape == x.shape:
        return x
    if isinstance(op, Reshape) and isinstance(x.op, Reshape):
        return to.emit(op, x.inputs[0])
    return to.keep(op, x)


@parts_of(Permute)
def _permute(to: Rewriter, op: Permute, x: Node) -> Node:
    axes = tuple(axis % len(x.shape) for axis in op.axes)
    if axes == tuple(range(len(axes))):
        return x
    if isinstance(x.op, Permute):
        inner = x.op.axes
        return to.emit(Permute(tuple(inner[axis] % len(axes) for axis in axes)), x.inputs[0])
    return to.keep(Permute(axes), x)


@parts_of(Cast)
def _cast(to: Rewriter, op: Cast, x: Node) -> Node:
    """Between floating types a copy; the truth value of a number is 1 unless it is zero."""
    if x.dtype.is_floating_point and op.dtype.is_floating_point:
        return x
    if x.dtype.is_floating_point and op.dtype == torch.bool:
        return to.emit(Sign(), to.emit(Abs(), x))
    return to.keep(op, x)


@parts_of(Multiply)
def _multiply(to: Rewriter, op: Multiply, a: Node, b: Node) -> Node:
    return to.emit(Power(2.0), a) if a is b else to.keep(op, a, b)


@parts_of(Divide)
def _divide(to: Rewriter, _op: Divide, a: Node, b: Node) -> Node:
    return to.emit(Multiply(), a, to.emit(Reciprocal(), b))


@parts_of(Power)
def _power(to: Rewriter, op: Power, x: Node) -> Node:
    n = op.exponent
    if n == 1:
        return x
    if n == 0.5:
        return to.emit(Sqrt(), x)
    if n < 0:
        return to.emit(Reciprocal(), to.emit(Power(-n), x))
    return to.keep(op, x)


@parts_of(Maximum)
def _maximum(to: Rewriter, _op: Maximum, a: Node, b: Node) -> Node:
    """b + relu(a - b), with a constant in the place of b, so that only one term depends on the inputs."""
    if not to.moves(a):
        a, b = b, a
    return to.emit(Add(), b, to.emit(ReLU(), to.emit(Subtract(), a, b)))


@parts_of(Minimum)
def _minimum(to: Rewriter, _op: Minimum, a: Node, b: Node) -> Node:
    """a - relu(a - b), with a constant in the place of a."""
    if not to.moves(b):
        a, b = b, a
    return to.emit(Subtract(), a, to.emit(ReLU(), to.emit(Subtract(), a, b)))


@parts_of(PReLU)
def _prelu(to: Rewriter, op: PReLU, x: Node, weight: Node) -> Node:
    """w x + (1 - w) relu(x): one kink for each entry."""
    if not to.moves(x):
        return to.keep(op, x, weight)
    slope = to.value(weight)
    if slope is not None and bool((slope == slope.flatten()[0]).all()):
        return to.emit(LeakyReLU(float(slope.flatten()[0])), x)
    by_channel = to.emit(Reshape((-1, *(1,) * (len(x.shape) - 2))), weight)
    rest = to.emit(Subtract(), to.number(1.0, x), by_channel)
    return to.emit(Add(), to.emit(Multiply(), x, by_channel), to.emit(Multiply(), to.emit(ReLU(), x), rest))


@parts_of(Where)
def _where(to: Rewriter, _op: Where, condition: Node, a: Node, b: Node) -> Node:
    """c a + (1 - c) b, in which a constant of the two stands by itself: it may be infinite where it is not chosen."""
    dtype = next(node.dtype for node in (a, b, condition) if node.dtype.is_floating_point)
    holds = condition if condition.dtype == dtype else to.emit(Cast(dtype), condition)
    fails = to.emit(Subtract(), to.number(1.0, holds), holds)
    if to.moves(condition):
        return to.emit(Add(), to.emit(Multiply(), a, holds), to.emit(Multiply(), b, fails))
    zero = to.number(0.0, holds)
    chosen = to.emit(Multiply(), a, holds) if to.moves(a) else to.emit(Where(), condition, a, zero)
    other = to.emit(Multiply(), b, fails) if to.moves(b) else to.emit(Where(), condition, zero, b)
    return to.emit(Add(), chosen, other)


@parts_of(Compare)
def _compare(to: Rewriter, op: Compare, a: Node, b: Node) -> Node:
    """As the number 1 or 0: a > b is the sign of relu(a - b), a != b that of |a - b|; the others by negation."""
    if op.relation in ("<", "<="):
        return to.emit(Compare(">" if op.relation == "<" else ">="), b, a)
    if op.relation in (">=", "=="):
        opposite = to.emit(Compare("<"), a, b) if op.relation == ">=" else to.emit(Compare("!="), a, b)
        return to.emit(Subtract(), to.number(1.0, opposite), opposite)
    difference = to.emit(Subtract(), a, b)
    size = to.emit(ReLU() if op.relation == ">" else Abs(), difference)
    return to.emit(Sign(), size)
