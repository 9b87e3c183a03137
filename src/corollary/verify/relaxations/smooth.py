"""Lines of functions with two or more inflections: GELU, SiLU, Mish, HardSwish; sine and cosine."""

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import final

import torch
from torch import Tensor

from corollary.graph.ops import GELU, Cos, HardSwish, Mish, SiLU, Sin
from corollary.verify.relaxations.contacts import Curve, Table, Touching, negative, tangent_points, within
from corollary.verify.relaxations.lines import register_relaxation
from corollary.verify.relaxations.s_shaped import LONGEST

TAIL = 60.0
"""How far beyond its last inflection a function that flattens out is still touched."""

NOWHERE = 1e30
"""Stands in a table for a point that there is not; so far out that no box reaches it."""


@final
@dataclass(frozen=True, eq=False)
class ValleyContacts:
    """Contact ranges of a function that is convex from `first` to `last`, concave outside, and tends to lines.

    Below, it is touched in the convex part. Above, it is touched left of `first` or right of `last`, on no box in both:
    its slopes there are different.

    Args: `margin`: how far outside the convex part it is touched from above at least; more than 0 where the inflections
        are kinks, which have no tangent.
    """

    curve: Curve
    first: float
    last: float
    margin: float = 0.0

    def _contact(self, meets: Tensor, holds: float, fails: float, upward: bool = False) -> Tensor:
        curve = negative(self.curve) if upward else self.curve
        return tangent_points(curve, meets, torch.full_like(meets, holds), torch.full_like(meets, fails))

    @cached_property
    def _from_left(self) -> Table:
        return Table(lambda d: self._contact(self.first - d, self.last, self.first), LONGEST)

    @cached_property
    def _from_right(self) -> Table:
        return Table(lambda d: self._contact(self.last + d, self.first, self.last), LONGEST)

    @cached_property
    def _over_from_right(self) -> Table:
        """Points left of the convex part whose tangents meet the function at a point in it."""

        def contact(distance: Tensor) -> Tensor:
            edge = self.first - TAIL
            point = self._contact(self.first + distance, edge, self.first, upward=True) - self.margin
            return torch.where((distance > 0) & (point <= edge), -NOWHERE, point)

        return Table(contact, self.last - self.first)

    @cached_property
    def _over_from_left(self) -> Table:
        """Points right of the convex part whose tangents meet the function at a point in it."""

        def contact(distance: Tensor) -> Tensor:
            edge = self.last + TAIL
            point = self._contact(self.last - distance, edge, self.last, upward=True) + self.margin
            return torch.where((distance > 0) & (point >= edge), NOWHERE, point)

        return Table(contact, self.last - self.first)

    def below(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """In the convex part: from where tangents pass below the lower end to where they pass below the upper one."""
        left = torch.maximum(lower, self._from_left(self.first - lower))
        return left, torch.minimum(upper, self._from_right(upper - self.last))

    def above(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Outside: left as far as tangents pass above the upper end, or right from where they pass above the lower."""
        end = torch.minimum(upper, self._over_from_right(upper - self.first))
        start = torch.maximum(lower, self._over_from_left(self.last - lower))
        on_right = start < upper
        return torch.where(on_right, start, lower), torch.where(on_right, upper, end)


def _valley(
    op: GELU | SiLU | Mish | HardSwish, curve: Curve, first: float, last: float, margin: float = 0.0
) -> Touching:
    """Relaxation of a function between zero and ReLU, but for its dip below zero."""
    contacts = ValleyContacts(curve, first, last, margin)
    least = op.range[0]
    return Touching(
        curve,
        contacts.below,
        contacts.above,
        within(LONGEST),
        0.0,
        lambda lower, upper: (torch.full_like(lower, least), upper.clamp_min(0)),
    )


def gelu_curve(x: Tensor) -> tuple[Tensor, Tensor]:
    """x Phi(x) and its derivative Phi(x) + x phi(x), by erfc, which keeps the left tail."""
    cumulative = 0.5 * torch.special.erfc(-x / math.sqrt(2))
    return x * cumulative, cumulative + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def tanh_gelu_curve(x: Tensor) -> tuple[Tensor, Tensor]:
    """The tanh approximation of GELU and its derivative; (1 + tanh z) / 2 is a sigmoid of 2 z."""
    scale, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
    gate = torch.sigmoid(scale * (x + cubic * x**3))
    # Held where the gate's slope underflows, because 0 times an overflowing cube is not a number.
    near = x.clamp(-1e3, 1e3)
    return x * gate, gate + near * gate * (1 - gate) * scale * (1 + 3 * cubic * near**2)


def silu_curve(x: Tensor) -> tuple[Tensor, Tensor]:
    """x sigmoid(x) and its derivative."""
    gate = torch.sigmoid(x)
    return x * gate, gate * (1 + x * (1 - gate))


def mish_curve(x: Tensor) -> tuple[Tensor, Tensor]:
    """x tanh(softplus(x)) and its derivative; with e = exp(x), tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2)."""
    power = torch.exp(x.clamp(max=30))
    product = power * (power + 2)
    gate = product / (product + 2)
    return x * gate, gate + x * 4 * power * (power + 1) / (product + 2) / (product + 2)


def hard_swish_curve(x: Tensor) -> tuple[Tensor, Tensor]:
    """x clamp(x/6 + 1/2, 0, 1) and its derivative, at the kinks that of the part between."""
    slope = torch.where(x < -3, 0.0, torch.where(x > 3, 1.0, x / 3 + 0.5))
    return x * (x / 6 + 0.5).clamp(0, 1), slope


@register_relaxation(GELU)
@cache
def _gelu(op: GELU) -> Touching:
    if op.approximate == "tanh":
        return _valley(op, tanh_gelu_curve, -1.4185040087908284, 1.4185040087908284)
    return _valley(op, gelu_curve, -math.sqrt(2), math.sqrt(2))


@register_relaxation(SiLU)
@cache
def _silu(op: SiLU) -> Touching:
    return _valley(op, silu_curve, -2.3993572805154677, 2.3993572805154677)


@register_relaxation(Mish)
@cache
def _mish(op: Mish) -> Touching:
    return _valley(op, mish_curve, -2.256376396390632, 1.4905711794854284)


@register_relaxation(HardSwish)
@cache
def _hard_swish(op: HardSwish) -> Touching:
    return _valley(op, hard_swish_curve, -3.0, 3.0, margin=1e-4)


@final
@dataclass(frozen=True, eq=False)
class WaveContacts:
    """Contact ranges of cos(x - `phase`), for boxes shorter than a period.

    Taken from the trough nearest to the middle of the box, the function is -cos(y): convex for |y| < pi/2, and an end
    may reach to |y| = 2 pi. Above, the same from the crest.
    """

    phase: float

    @cached_property
    def _table(self) -> Table:
        def curve(x: Tensor) -> tuple[Tensor, Tensor]:
            return -torch.cos(x), torch.sin(x)

        def contact(distance: Tensor) -> Tensor:
            meets = math.pi / 2 + distance
            return tangent_points(curve, meets, torch.zeros_like(meets), torch.full_like(meets, math.pi / 2))

        return Table(contact, 1.5 * math.pi)

    def below(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Around the trough nearest to the middle."""
        return self._around(self.phase + math.pi, lower, upper)

    def above(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Around the crest nearest to the middle."""
        return self._around(self.phase, lower, upper)

    def _around(self, extremum: float, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        middle = (lower + (upper - lower) / 2).detach()
        center = extremum + 2 * math.pi * torch.round((middle - extremum) / (2 * math.pi))
        start, end = lower - center, upper - center
        left = torch.maximum(lower, center - self._table(-start - math.pi / 2))
        return left, torch.minimum(upper, center + self._table(end - math.pi / 2))


def _wave(op: Sin | Cos, curve: Curve, phase: float) -> Touching:
    def usable(lower: Tensor, upper: Tensor) -> Tensor:
        # Farther out the phase of a number is lost to rounding.
        farthest = 1e-3 / torch.finfo(lower.dtype).eps
        return (lower > -farthest) & (upper < farthest) & (upper - lower < 2 * math.pi)

    def constants(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        point = (lower == upper) & torch.isfinite(lower)
        value = op(torch.where(point, lower, 0.0))
        return torch.where(point, value, -1.0), torch.where(point, value, 1.0)

    contacts = WaveContacts(phase)
    return Touching(curve, contacts.below, contacts.above, usable, 0.0, constants)


@register_relaxation(Sin)
@cache
def _sin(op: Sin) -> Touching:
    return _wave(op, lambda x: (torch.sin(x), torch.cos(x)), math.pi / 2)


@register_relaxation(Cos)
@cache
def _cos(op: Cos) -> Touching:
    return _wave(op, lambda x: (torch.cos(x), -torch.sin(x)), 0.0)
