"""Lines of functions that are convex or concave where they are smooth: exp, log, powers, roots, softplus."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import final

import torch
from torch import Tensor

from corollary.graph.ops import Exp, Log, Power, Reciprocal, Softplus, Sqrt
from corollary.verify.relaxations.contacts import ContactRange, Curve, Ends, Mask, Touching, whole_box, within
from corollary.verify.relaxations.lines import Lines, Relaxation, register_relaxation
from corollary.verify.relaxations.piecewise import OneKink, Ramp

REACH_OF_EXP = 0.99
"""How far right of the lower end exp is touched: a tangent from beyond 1 is negative there, and the reciprocal of a
sum of such lines, as in a softmax, has no bound."""

STEEPEST_ROOT = 1e6
"""Stands for the infinite slope of a root at zero; a line that is less steep than it might be still holds."""


def _exp_range(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    return lower, torch.minimum(upper, lower + REACH_OF_EXP)


def _exp_usable(lower: Tensor, upper: Tensor) -> Tensor:
    info = torch.finfo(lower.dtype)
    largest = 0.9 * torch.log(torch.tensor(info.max, dtype=lower.dtype))
    return (lower > -(info.max**0.5)) & (upper < largest.to(lower.device))


def _exp_curve(x: Tensor) -> tuple[Tensor, Tensor]:
    value = torch.exp(x)
    return value, value


@register_relaxation(Exp)
@cache
def _exp(op: Exp) -> Touching:
    return Touching(_exp_curve, _exp_range, None, _exp_usable, 0.0, lambda low, high: (op(low), op(high)))


def _log_usable(lower: Tensor, upper: Tensor) -> Tensor:
    info = torch.finfo(lower.dtype)
    return (lower > info.tiny**0.5) & (upper < info.max**0.5)


@register_relaxation(Log)
@cache
def _log(op: Log) -> Touching:
    return Touching(
        lambda x: (torch.log(x), torch.reciprocal(x)),
        None,
        whole_box,
        _log_usable,
        1.0,
        lambda lower, upper: (op(lower.clamp_min(0)), op(upper.clamp_min(0))),
    )


@register_relaxation(Sqrt)
def _sqrt(op: Sqrt) -> Relaxation:
    return power_relaxation(0.5)


@register_relaxation(Reciprocal)
def _reciprocal(op: Reciprocal) -> Relaxation:
    return power_relaxation(-1.0)


@register_relaxation(Power)
def _power(op: Power) -> Relaxation:
    return power_relaxation(op.exponent)


@cache
def power_relaxation(exponent: float) -> Relaxation:
    """Relaxation of x to a power. Roots and their kin count on x >= 0 only, and have constants elsewhere."""
    if exponent == 0:
        return Ramp(0.0, 1.0, scale=0.0, shift=1.0)
    if exponent == 1:
        return OneKink(1.0)
    if exponent % 1:
        return _root(exponent)
    if exponent < 0:
        return _negative_power(exponent)
    return _odd_power(exponent) if exponent % 2 else _even_power(exponent)


def _power_curve(exponent: float) -> Curve:
    return lambda x: (torch.pow(x, exponent), exponent * torch.pow(x, exponent - 1))


def _power_usable(exponent: float) -> Mask:
    """Boxes on which the power, and its derivative times the point, are finite."""

    def usable(lower: Tensor, upper: Tensor) -> Tensor:
        largest = torch.finfo(lower.dtype).max ** (0.9 / exponent)
        return (lower > -largest) & (upper < largest)

    return usable


def _even_power(exponent: float) -> Touching:
    def constants(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(lower), torch.maximum(lower**exponent, upper**exponent)

    return Touching(_power_curve(exponent), whole_box, None, _power_usable(exponent), 0.0, constants)


def _odd_power(exponent: float) -> Touching:
    """Concave left of zero, convex right. The tangent that meets the power at l < 0 touches it at -c l, one c for all
    l, since the power is homogeneous."""
    low, high = 0.0, 1.0
    for _ in range(60):
        ratio = (low + high) / 2
        rises = ratio**exponent - exponent * ratio ** (exponent - 1) * (ratio + 1) > -1
        low, high = (ratio, high) if rises else (low, ratio)
    ratio = high

    def below(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(lower < 0, -ratio * lower, lower), upper

    def above(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return lower, torch.where(upper > 0, -ratio * upper, upper)

    return Touching(
        _power_curve(exponent), below, above, _power_usable(exponent), 0.0, lambda l, u: (l**exponent, u**exponent)
    )


def _negative_power(exponent: float) -> Touching:
    """Convex right of zero; left of zero convex too, or concave where the exponent is odd. None across zero."""
    odd = exponent % 2 == 1

    def usable(lower: Tensor, upper: Tensor) -> Tensor:
        info = torch.finfo(lower.dtype)
        nearest = info.tiny ** (0.9 / (1 - exponent))
        return ((lower > nearest) | (upper < -nearest)) & (lower > -(info.max**0.5)) & (upper < info.max**0.5)

    def below(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return lower, torch.where(lower > 0, upper, lower)

    def above(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return lower, torch.where(upper < 0, upper, lower)

    def constants(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        right, left = (lower >= 0) & (upper > 0), (upper <= 0) & (lower < 0)
        if odd:
            least = torch.where(right | (left & (upper < 0)), upper**exponent, -torch.inf)
            most = torch.where(left | (right & (lower > 0)), lower**exponent, torch.inf)
            return least, most
        nearest, farthest = torch.minimum(lower.abs(), upper.abs()), torch.maximum(lower.abs(), upper.abs())
        return farthest**exponent, torch.where(right | left, nearest**exponent, torch.inf)

    curve = _power_curve(exponent)
    ranges: tuple[ContactRange, ContactRange | None] = (below, above) if odd else (whole_box, None)
    return Touching(curve, *ranges, usable, 1.0, constants)


def _root(exponent: float) -> Touching:
    """A fractional power: concave for exponents in (0, 1), convex for the others, on x >= 0 or x > 0."""
    steepest = 0.0 if exponent > 1 else STEEPEST_ROOT

    def curve(x: Tensor) -> tuple[Tensor, Tensor]:
        positive = x > 0
        base = torch.where(positive, x, 1.0)  # no infinite derivative may reach a gradient, even a masked one
        value, slope = torch.pow(base, exponent), exponent * torch.pow(base, exponent - 1)
        return torch.where(positive, value, 0.0), torch.where(positive, slope, steepest)

    def usable(lower: Tensor, upper: Tensor) -> Tensor:
        info = torch.finfo(lower.dtype)
        largest = info.max ** (0.9 / max(1.0, exponent))
        nearest = info.tiny ** (0.9 / (1 - exponent)) if exponent < 0 else 0.0
        return (lower >= nearest) & (upper < largest)

    def away_from_zero(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return torch.maximum(lower, 1e-6 * upper), upper

    def constants(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        low, high = lower.clamp_min(0) ** exponent, upper.clamp_min(0) ** exponent
        return (low, high) if exponent > 0 else (high, low)

    ranges: tuple[ContactRange | None, ContactRange | None] = (
        (None, away_from_zero) if 0 < exponent < 1 else (whole_box, None)
    )
    return Touching(curve, *ranges, usable, 1.0, constants)


@final
@dataclass(frozen=True, eq=False)
class Softened(Relaxation):
    """Lines of softplus as PyTorch has it: the convex function, less a step down at the threshold."""

    convex: Touching
    threshold: float
    step: float
    lower_free = True

    def defaults(self, lower: Tensor, upper: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Those of the convex function."""
        return self.convex.defaults(lower, upper)

    def lines(
        self, lower: Tensor, upper: Tensor, lower_free: Tensor | None = None, upper_free: Tensor | None = None
    ) -> Lines:
        lines = self.convex.lines(lower, upper, lower_free, upper_free)
        assert lines.lower_offset is not None
        offset = lines.lower_offset - torch.where(upper > self.threshold, self.step, 0.0).to(lower.dtype)
        return Lines(lines.lower_slope, offset, lines.upper_slope, lines.upper_offset)


@register_relaxation(Softplus)
@cache
def _softplus(op: Softplus) -> Softened:
    def curve(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.logaddexp(op.beta * x, torch.zeros_like(x)) / op.beta, torch.sigmoid(op.beta * x)

    constants: Ends = lambda lower, upper: (op(lower), op(upper))  # noqa: E731
    convex = Touching(curve, whole_box, None, within(1e12), 0.0, constants)
    step: Callable[[float], float] = lambda t: float(torch.tensor(-t, dtype=torch.float64).exp().log1p())  # noqa: E731
    return Softened(convex, op.threshold / op.beta, step(op.threshold) / op.beta)
