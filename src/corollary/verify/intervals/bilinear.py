"""Rules of the ops that are linear in each operand: products, matrix products, convolutions, sums with signs.

With one operand in an interval and the others known, centre and radius are carried: c' = W c, r' = |W| r, which is
exact. With two in intervals, the set of products is bounded in one of three ways:

- where one operand has one sign, by its two ends against the positive and the negative part of the other: exact for
  each scalar product, at the cost of four products;
- where the tensor of all scalar products is small, by the corners of each: exact for each scalar product;
- elsewhere in centre and radius (Rump): |a||b| - |a_c||b_c| around a_c b_c, at most 1.5 times as wide.

Source: Rump 1999, "Fast and parallel interval arithmetic", BIT 39.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from corollary.graph.ops import (
    BatchNorm,
    Convolution,
    ConvolutionTransposed,
    Divide,
    Einsum,
    Linear,
    MatMul,
    Multiply,
    Subtract,
    Upsample,
)
from corollary.verify.intervals.interval import Interval, Operand, between, interval, lower, upper

CORNER_LIMIT = 2**21
"""Most scalar products that are formed one by one: 16 MiB of float64 for each corner."""

Multilinear = Callable[..., Tensor]


def add(a: Operand, b: Operand) -> Interval:
    """a + b."""
    return between(torch.add, a, b)


@interval.rule(Subtract)
def _subtract(_op: Subtract, a: Operand, b: Operand) -> Interval:
    return subtract(a, b)


def subtract(a: Operand, b: Operand) -> Interval:
    """a - b."""
    return Interval(lower(a) - upper(b), upper(a) - lower(b))


@interval.rule(Multiply)
def _multiply(_op: Multiply, a: Operand, b: Operand) -> Interval:
    return multiply(a, b)


def multiply(a: Operand, b: Operand) -> Interval:
    """Entrywise a b: the extremes are at corners. A value times itself is a square."""
    if a is b:
        size = magnitude(a)
        return Interval(size.lower.square(), size.upper.square())
    ends_of_a = (a.lower, a.upper) if isinstance(a, Interval) else (a,)
    ends_of_b = (b.lower, b.upper) if isinstance(b, Interval) else (b,)
    # 0 times infinity is 0 here: an infinite end stands for numbers without limit, not for infinity.
    corners = [_zero_where_undefined(x * y) for x in ends_of_a for y in ends_of_b]
    low = high = corners[0]
    for corner in corners[1:]:
        low, high = torch.minimum(low, corner), torch.maximum(high, corner)
    return Interval(low, high)


def magnitude(x: Operand) -> Interval:
    """|x|."""
    sizes = lower(x).abs(), upper(x).abs()
    crosses = (lower(x) < 0) & (upper(x) > 0)
    smallest = torch.minimum(*sizes)
    return Interval(torch.where(crosses, torch.zeros_like(smallest), smallest), torch.maximum(*sizes))


@interval.rule(Divide)
def _divide(_op: Divide, a: Operand, b: Operand) -> Interval:
    if not isinstance(a, Interval) or isinstance(b, Interval):
        return multiply(a, reciprocal(b))
    quotients = a.lower / b, a.upper / b
    return Interval(torch.minimum(*quotients), torch.maximum(*quotients))


def reciprocal(x: Operand) -> Interval:
    """1 / x; unbounded where 0 lies inside, one-sided where 0 is an end."""
    low, high = lower(x), upper(x)
    one_sign = (low >= 0) | (high <= 0)
    below = torch.where(one_sign & (high != 0), high, torch.ones_like(high)).reciprocal()
    above = torch.where(one_sign & (low != 0), low, torch.ones_like(low)).reciprocal()
    return Interval(
        torch.where(one_sign & (high != 0), below, -torch.inf),
        torch.where(one_sign & (low != 0), above, torch.inf),
    )


@interval.rule(BatchNorm)
def _batch_norm(
    op: BatchNorm, x: Operand, mean: Operand, variance: Operand, weight: Operand, bias: Operand
) -> Interval:
    if isinstance(variance, Interval):
        steepness = reciprocal(between(lambda v: (v + op.epsilon).clamp(min=0).sqrt(), variance))
        scale = multiply(weight, steepness)
    else:
        steepness = (variance + op.epsilon).rsqrt()
        scale = multiply(weight, steepness) if isinstance(weight, Interval) else weight * steepness
    shape = (-1, *(1,) * (lower(x).ndim - 2))
    mean, scale, bias = (reshaped(value, shape) for value in (mean, scale, bias))
    return add(multiply(subtract(x, mean), scale), bias)


def reshaped(x: Operand, shape: Sequence[int]) -> Operand:
    """The same entries under another shape."""
    return between(lambda end: end.reshape(*shape), x) if isinstance(x, Interval) else x.reshape(*shape)


@interval.rule(Linear, Convolution, ConvolutionTransposed)
def _weighted(
    op: Linear | Convolution | ConvolutionTransposed, x: Operand, weight: Operand, bias: Operand | None = None
) -> Interval:
    if isinstance(op, Linear) and isinstance(x, Interval) and isinstance(weight, Interval):
        found = matmul(x, between(lambda end: end.mT, weight))
    else:
        found = multilinear(op, x, weight)
    if bias is None:
        return found
    after = 0 if isinstance(op, Linear) else len(op.stride)
    return add(found, reshaped(bias, (-1, *(1,) * after)))


@interval.rule(MatMul)
def _matmul(_op: MatMul, a: Operand, b: Operand) -> Interval:
    return matmul(a, b)


def matmul(a: Operand, b: Operand) -> Interval:
    """a b with broadcasting."""
    if lower(a).ndim > 1 and lower(b).ndim > 1:
        views = Views(lambda a: a[..., None], lambda b: b[..., None, :, :], (-2,))
    elif lower(b).ndim > 1:
        views = Views(lambda a: a[:, None], lambda b: b, (-2,))
    else:
        views = Views(lambda a: a, lambda b: b, (-1,))
    return multilinear(torch.matmul, a, b, views=views)


@interval.rule(Einsum)
def _einsum(op: Einsum, *operands: Operand) -> Interval:
    return multilinear(op, *operands, views=_views_of(op.equation))


@dataclass(frozen=True)
class Views:
    """How two operands are laid out so that their entrywise product, summed over `axes`, is their product."""

    first: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor]
    axes: tuple[int, ...]


def _views_of(equation: str) -> Views | None:
    """The layouts for an Einstein sum of two operands, none of which repeats a label."""
    terms, _, result = equation.replace(" ", "").partition("->")
    labels = terms.split(",")
    plain = "->" in equation and all(term.isalpha() and len(set(term)) == len(term) for term in labels)
    if not plain or len(labels) != 2:
        return None
    order = result + "".join(sorted(set("".join(labels)) - set(result)))

    def laid_out(term: str) -> Callable[[Tensor], Tensor]:
        places = tuple(slice(None) if label in term else None for label in order)
        axes = tuple(term.index(label) for label in order if label in term)
        return lambda x: x.permute(axes)[places]

    summed = tuple(range(len(result), len(order)))
    return Views(laid_out(labels[0]), laid_out(labels[1]), summed)


def multilinear(apply: Multilinear, *operands: Operand, views: Views | None = None) -> Interval:
    """The interval of a function that is linear in each operand by itself, with coefficients that are not negative."""
    unknown = [operand for operand in operands if isinstance(operand, Interval)]
    if not all(operand.finite for operand in unknown):
        return _with_infinite_ends(apply, operands, views)
    if len(operands) == 2 and len(unknown) == 2:
        return _two_unknown(apply, unknown[0], unknown[1], views)
    center = apply(*(x.center if isinstance(x, Interval) else x for x in operands))
    if len(unknown) == 1:
        radius = apply(*(x.radius if isinstance(x, Interval) else x.abs() for x in operands))
    else:
        radius = apply(*(magnitude(x).upper for x in operands))
        radius = radius - apply(*(x.center.abs() if isinstance(x, Interval) else x.abs() for x in operands))
    return Interval(center - radius, center + radius)


def _two_unknown(apply: Multilinear, a: Interval, b: Interval, views: Views | None) -> Interval:
    if bool((a.lower >= 0).all()):
        return _signed(apply, a, b)
    if bool((b.lower >= 0).all()):
        return _signed(lambda x, y: apply(y, x), b, a)
    if views is not None:
        ends = [(views.first(a.lower), views.second(b.lower)), (views.first(a.upper), views.second(b.upper))]
        if torch.broadcast_shapes(*(end.shape for end in ends[0])).numel() <= CORNER_LIMIT:
            (a_low, b_low), (a_high, b_high) = ends
            products = multiply(Interval(a_low, a_high), Interval(b_low, b_high))
            return between(lambda end: end.sum(views.axes), products) if views.axes else products
    center = apply(a.center, b.center)
    radius = apply(a.center.abs() + a.radius, b.radius) + apply(a.radius, b.center.abs())
    return Interval(center - radius, center + radius)


def _signed(apply: Multilinear, a: Interval, b: Interval) -> Interval:
    """The product where no entry of `a` is negative: each end of b meets the end of a that its sign asks for."""
    low = apply(a.lower, b.lower.clamp(min=0)) + apply(a.upper, b.lower.clamp(max=0))
    high = apply(a.upper, b.upper.clamp(min=0)) + apply(a.lower, b.upper.clamp(max=0))
    return Interval(low, high)


def _with_infinite_ends(apply: Multilinear, operands: Sequence[Operand], views: Views | None) -> Interval:
    """Nothing is known of a sum in which an entry without bounds has a weight that is not zero."""
    marks = [_infinite(x) if isinstance(x, Interval) else torch.zeros_like(x, dtype=torch.bool) for x in operands]
    bounded = [_cleared(x, mark) if isinstance(x, Interval) else x for x, mark in zip(operands, marks, strict=True)]
    found = multilinear(apply, *bounded, views=views)
    weights = [(magnitude(x).upper != 0).to(found.dtype) for x in operands]
    reached = torch.zeros_like(found.lower)
    for place, mark in enumerate(marks):
        reached = reached + apply(*(mark.to(found.dtype) if i == place else w for i, w in enumerate(weights)))
    return Interval(
        found.lower.masked_fill(reached > 0, -torch.inf),
        found.upper.masked_fill(reached > 0, torch.inf),
    )


def _infinite(x: Interval) -> Tensor:
    return ~(x.lower.isfinite() & x.upper.isfinite())


def _cleared(x: Interval, mark: Tensor) -> Interval:
    return Interval(x.lower.masked_fill(mark, 0), x.upper.masked_fill(mark, 0))


def _zero_where_undefined(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), torch.zeros_like(x), x)


@interval.rule(Upsample)
def _upsample(op: Upsample, x: Interval) -> Interval:
    if op.mode != "bicubic":  # averages of entries
        return between(op, x)
    axes = [_resized_basis(op, x, axis) for axis in (0, 1)]

    def resize(end: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return torch.einsum("...hw,hi,wj->...ij", end, rows, columns)

    return multilinear(resize, x, *axes)


def _resized_basis(op: Upsample, x: Interval, axis: int) -> Tensor:
    """How much of each entry along one spatial axis goes into each resized one, (before, after)."""
    before = x.shape[2 + axis]
    shape, output = [before, 1, 1, 1], [1, 1]
    shape[2 + axis], output[axis] = before, op.output[axis]
    basis = torch.eye(before, dtype=x.dtype, device=x.lower.device).reshape(shape)
    return replace(op, output=tuple(output))(basis).reshape(before, -1)
