"""Rules of the elementwise functions that turn, have poles, or are not defined everywhere."""

import math

import torch
from torch import Tensor

from corollary.graph.ops import (
    ELU,
    GELU,
    Cast,
    Cos,
    HardSwish,
    Log,
    Mish,
    Power,
    PReLU,
    Reciprocal,
    SiLU,
    Sin,
    Softplus,
    Sqrt,
)
from corollary.verify.intervals.bilinear import magnitude, reciprocal
from corollary.verify.intervals.interval import Interval, Operand, between, interval, lower, turning, upper

SILU_MINIMUM = -1.2784645427610738
MISH_MINIMUM = -1.19243121451549521
GELU_MINIMUM = {"none": -0.751791524693564457, "tanh": -0.752461422071016258}
HARD_SWISH_MINIMUM = -1.5
GATE_SHUT = -1e4
"""Below it the gated functions x g(x), with g(x) -> 0, are 0 in every dtype; at minus infinity they would be NaN."""


@interval.rule(Sin)
def _sin(op: Sin, x: Interval) -> Interval:
    return _wave(op, x, peak=math.pi / 2)


@interval.rule(Cos)
def _cos(op: Cos, x: Interval) -> Interval:
    return _wave(op, x, peak=0.0)


def _wave(op: Sin | Cos, x: Interval, peak: float) -> Interval:
    """1 where a peak lies inside, -1 where a trough does, else the ends."""
    at_ends = op(x.lower), op(x.upper)
    high = torch.where(_meets(x, peak), 1.0, torch.maximum(*at_ends))
    low = torch.where(_meets(x, peak + math.pi), -1.0, torch.minimum(*at_ends))
    return Interval(low, high)


def _meets(x: Interval, point: float) -> Tensor:
    """Whether a point, or one whole turns from it, lies inside."""
    turn = 2 * math.pi
    return torch.ceil((x.lower - point) / turn) * turn + point <= x.upper


@interval.rule(GELU, SiLU, Mish, HardSwish)
def _gated(op: GELU | SiLU | Mish | HardSwish, x: Interval) -> Interval:
    if isinstance(op, GELU):
        minimum = GELU_MINIMUM[op.approximate]
    else:
        minimum = {SiLU: SILU_MINIMUM, Mish: MISH_MINIMUM, HardSwish: HARD_SWISH_MINIMUM}[type(op)]
    return turning(op, between(lambda end: end.clamp(min=GATE_SHUT), x), (minimum,))


@interval.rule(ELU)
def _elu(op: ELU, x: Interval) -> Interval:
    return between(op, x) if op.monotone else turning(op, x, (0.0,))


@interval.rule(Softplus)
def _softplus(op: Softplus, x: Interval) -> Interval:
    """Rises but for a step down where PyTorch's form changes over to the identity."""
    found = between(op, x)
    if op.monotone:
        return found
    step = op.threshold / op.beta
    top = math.log1p(math.exp(op.threshold)) / op.beta
    inside = (x.lower <= step) & (step < x.upper)
    low = torch.where(inside, found.lower.clamp(max=step), found.lower)
    return Interval(low, torch.where(inside, found.upper.clamp(min=top), found.upper))


@interval.rule(PReLU)
def _prelu(op: PReLU, x: Operand, weight: Operand) -> Interval:
    corners = torch.stack([op(end, slope) for end in (lower(x), upper(x)) for slope in (lower(weight), upper(weight))])
    crosses = (lower(x) < 0) & (upper(x) > 0)
    low, high = corners.amin(0), corners.amax(0)
    return Interval(
        torch.where(crosses, low.clamp(max=0), low),
        torch.where(crosses, high.clamp(min=0), high),
    )


@interval.rule(Reciprocal)
def _reciprocal(_op: Reciprocal, x: Interval) -> Interval:
    return reciprocal(x)


@interval.rule(Log)
def _log(op: Log, x: Interval) -> Interval:
    return _from_zero(op, x, at_zero=-math.inf)


@interval.rule(Sqrt)
def _sqrt(op: Sqrt, x: Interval) -> Interval:
    return _from_zero(op, x, at_zero=0.0)


def _from_zero(op: Log | Sqrt | Power, x: Interval, at_zero: float) -> Interval:
    """A function that rises from its value at zero, below which it is not defined: nothing is known there.

    The ends are kept off zero, where the slope is infinite and would reach the gradient as 0 times infinity.
    """
    inside = [torch.where(end > 0, end, torch.ones_like(end)) for end in (x.lower, x.upper)]
    low = torch.where(x.lower > 0, op(inside[0]), at_zero)
    high = torch.where(x.upper > 0, op(inside[1]), at_zero)
    undefined = x.upper < 0
    return Interval(low.masked_fill(undefined, -math.inf), high.masked_fill(undefined, math.inf))


@interval.rule(Power)
def _power(op: Power, x: Interval) -> Interval:
    n = op.exponent
    if n < 0:
        return reciprocal(_power(Power(-n), x))
    if n % 1:
        return _from_zero(op, x, at_zero=0.0)
    return between(op, x) if n % 2 else between(op, magnitude(x))


@interval.rule(Cast)
def _cast(op: Cast, x: Interval) -> Interval:
    if op.dtype == torch.bool:
        size = magnitude(x)
        return Interval(size.lower != 0, size.upper != 0)
    if op.dtype.is_floating_point and x.dtype.is_floating_point:
        return x  # the bounds have a dtype of their own
    return between(op, x)
