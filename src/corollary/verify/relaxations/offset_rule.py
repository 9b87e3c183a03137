r"""Lines of any function whose derivative is known: a free slope, and the offset that fits it.

For every slope s the line $s x + \min_{[l, u]} (f(x) - s x)$ holds. The minimum is at an end of the box or where
f'(x) = s; it is found by bisection on the pieces on which f' is monotone, or bounded by samples where only a bound of
the second derivative is known. ELU with a kink is of this kind, and so is what users register.

Source: Shi et al. 2025, arXiv 2405.21063, section on linear relaxations of general nonlinearities.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, final

import torch
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.graph.ops import ELU, Op
from corollary.verify.relaxations.contacts import (
    ContactRange,
    Curve,
    Table,
    Touching,
    negative,
    tangent_points,
    whole_box,
)
from corollary.verify.relaxations.lines import (
    Lines,
    Relaxation,
    between,
    register_relaxation,
    rounded_down,
    smallest_width,
)

HALVINGS = 36
SAMPLES = 65

LONGEST = 1e12
"""Distances that the table of tangents reaches."""


@final
@dataclass(frozen=True, eq=False)
class OffsetRule(Relaxation):
    """Lines with a free slope between the smallest and the largest derivative on the box.

    Args:
        curve: values and derivatives.
        range: of values, given where a box is not finite.
        pieces: points between which the derivative is monotone; kinks count.
        second_derivative_bound: bound of |f''|; used where `pieces` is None.
        turns: of slopes, the points x with f'(x) = slope, stacked along a new first axis; found by bisection if None.
    """

    curve: Curve
    range: tuple[float, float]
    pieces: tuple[float, ...] | None = None
    second_derivative_bound: float = 0.0
    turns: Callable[[Tensor], Tensor] | None = None
    lower_free = True
    upper_free = True

    def defaults(self, lower: Tensor, upper: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Of a few slopes, those of the chord and of the tangent in the middle among them, the one of smallest area."""
        low, high, _ = self._usable_part(lower.detach(), upper.detach())
        return self._better(self.curve, low, high), 1 - self._better(negative(self.curve), low, high)

    def lines(
        self, lower: Tensor, upper: Tensor, lower_free: Tensor | None = None, upper_free: Tensor | None = None
    ) -> Lines:
        low, high, usable = self._usable_part(lower, upper)
        mirrored = negative(self.curve)
        if lower_free is None:
            lower_free = self._better(self.curve, low.detach(), high.detach())
        upper_free = self._better(mirrored, low.detach(), high.detach()) if upper_free is None else 1 - upper_free
        slope = between(*self._slopes(self.curve, low, high), lower_free)
        above = between(*self._slopes(mirrored, low, high), upper_free)
        offset, above_offset = self._lowest(self.curve, slope, low, high), -self._lowest(mirrored, above, low, high)
        least, most = self.range
        return Lines(
            torch.where(usable, slope, 0.0),
            torch.where(usable, offset, least),
            torch.where(usable, -above, 0.0),
            torch.where(usable, above_offset, most),
        )

    def _usable_part(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        farthest = torch.finfo(lower.dtype).max ** 0.4
        usable = (lower > -farthest) & (upper < farthest)
        low, high = lower.detach(), upper.detach()
        at_low, at_high = (self.curve(torch.where(usable, end, 0.0))[0] for end in (low, high))
        usable = usable & (at_low.abs() < farthest**2) & (at_high.abs() < farthest**2)
        return torch.where(usable, lower, 0.0), torch.where(usable, upper, 0.0), usable

    def _slopes(self, curve: Curve, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest derivative on the box."""
        if self.pieces is None:
            middle = curve(lower + (upper - lower) / 2)[1]
            reach = self.second_derivative_bound * (upper - lower) / 2
            return middle - reach, middle + reach
        breaks = [_held(lower.new_tensor(p), lower, upper) for p in self.pieces]
        slopes = curve(torch.stack([lower, upper, *breaks]))[1]
        return slopes.amin(0), slopes.amax(0)

    def _better(self, curve: Curve, lower: Tensor, upper: Tensor) -> Tensor:
        """Position of the slope, of a few, whose line below is highest in the middle: the one of smallest area."""
        least, most = self._slopes(curve, lower, upper)
        (at_lower, _), (at_upper, _) = curve(lower), curve(upper)
        middle = lower + (upper - lower) / 2
        chord = (at_upper - at_lower) / (upper - lower).clamp_min(smallest_width(lower.dtype))
        between_them = [least + k / 8 * (most - least) for k in range(1, 8)]
        slopes = _held(torch.stack([chord, curve(middle)[1], *between_them]), least, most)
        heights = self._lowest(curve, slopes, lower, upper) + slopes * middle
        slope = slopes.gather(0, heights.argmax(0, keepdim=True))[0]
        return ((slope - least) / (most - least).clamp_min(smallest_width(lower.dtype))).clamp(0, 1)

    def _lowest(self, curve: Curve, slope: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        """The least of f(x) - slope x on the box, rounded down."""
        lower, upper, slope = torch.broadcast_tensors(lower, upper, slope)
        farthest = torch.maximum(lower.abs(), upper.abs()).detach()
        points, slack = (
            self._sampled(lower, upper) if self.pieces is None else self._turning(curve, slope, lower, upper)
        )
        values = curve(points)[0]
        offset = (values - slope * points - slack).amin(0)
        return rounded_down(offset, slope * farthest, values.detach().abs().amax(0))

    def _sampled(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Samples of the box, and how far below the least of them the function may dip between two: M h^2 / 8."""
        share = torch.linspace(0, 1, SAMPLES, dtype=lower.dtype, device=lower.device)
        points = torch.lerp(lower, upper, share.reshape(-1, *(1,) * lower.ndim))
        return points, self.second_derivative_bound * ((upper - lower) / (SAMPLES - 1)) ** 2 / 8

    def _turning(self, curve: Curve, slope: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of each piece in the box and the point in it where f(x) - slope x turns, and what bisection left.

        On a piece whose derivative falls the bisection ends anywhere, and the least value is at an end.
        """
        assert self.pieces is not None
        edges = torch.stack([lower, *(_held(lower.new_tensor(p), lower, upper) for p in sorted(self.pieces)), upper])
        with torch.no_grad():
            if self.turns is not None:
                turn = _held(self.turns(slope if curve is self.curve else -slope), lower, upper)
                return torch.cat([edges, turn]), torch.zeros_like(lower)
            low, high = edges[:-1], edges[1:]
            for _ in range(HALVINGS):
                middle = low + (high - low) / 2
                falls = curve(middle)[1] < slope
                low, high = torch.where(falls, middle, low), torch.where(falls, high, middle)
            turn = low + (high - low) / 2
            left = (curve(turn)[1] - slope).abs() * (high - low)
        return torch.cat([edges, turn]), torch.cat([torch.zeros_like(edges), left])


@final
@dataclass(frozen=True, eq=False)
class Pair(Relaxation):
    """The lower lines of one relaxation and the upper lines of another."""

    below: Relaxation
    above: Relaxation

    @property
    def lower_free(self) -> bool:  # type: ignore[override]  # a field of the base
        """That of the first."""
        return self.below.lower_free

    @property
    def upper_free(self) -> bool:  # type: ignore[override]  # a field of the base
        """That of the second."""
        return self.above.upper_free

    def defaults(self, lower: Tensor, upper: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """One of each."""
        return self.below.defaults(lower, upper)[0], self.above.defaults(lower, upper)[1]

    def lines(
        self, lower: Tensor, upper: Tensor, lower_free: Tensor | None = None, upper_free: Tensor | None = None
    ) -> Lines:
        unused = torch.zeros_like(lower)  # spares the search for a default that nobody reads
        below, above = self.below.lines(lower, upper, lower_free), self.above.lines(lower, upper, unused, upper_free)
        return Lines(below.lower_slope, below.lower_offset, above.upper_slope, above.upper_offset)


def _held(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, lower), upper)


def register_function(
    key: Any,
    function: Callable[[Tensor], Tensor],
    derivative: Callable[[Tensor], Tensor],
    *,
    pieces: tuple[float, ...] | None = None,
    second_derivative_bound: float | None = None,
) -> None:
    """Give an op of one variable linear bounds.

    Args:
        key: an op class, or the callable of a `Torch` op.
        function, derivative: elementwise, differentiable.
        pieces: points between which the derivative is monotone, in order; () where it is monotone throughout. Points
            where the derivative jumps count.
        second_derivative_bound: a bound of |f''| instead.

    Raises: BadInput, unless one of the two is given.
    """
    if (pieces is None) == (second_derivative_bound is None):
        raise BadInput(
            "a function needs either `pieces`, the points between which its derivative is monotone, or "
            f"`second_derivative_bound`; got pieces={pieces}, second_derivative_bound={second_derivative_bound}"
        )

    def curve(x: Tensor) -> tuple[Tensor, Tensor]:
        return function(x), derivative(x)

    @register_relaxation(key)
    def make(op: Op) -> OffsetRule:
        return OffsetRule(curve, op.range, pieces, second_derivative_bound or 0.0)


@register_relaxation(ELU)
@cache
def _elu(op: ELU) -> Relaxation:
    def curve(x: Tensor) -> tuple[Tensor, Tensor]:
        below = op.input_scale * x.clamp(max=0)
        value = op.scale * (x.clamp(min=0) + op.alpha * torch.expm1(below))
        return value, op.scale * torch.where(x > 0, 1.0, op.alpha * op.input_scale * torch.exp(below))

    def usable(lower: Tensor, upper: Tensor) -> Tensor:
        farthest = torch.finfo(lower.dtype).max ** 0.4
        return (lower > -farthest) & (upper < farthest)

    def turns(slope: Tensor) -> Tensor:
        share = (slope / steepest).clamp_min(torch.finfo(slope.dtype).tiny)
        return (torch.log(share) / op.input_scale)[None]

    @cache
    def contacts() -> Table:
        return Table(
            lambda u: tangent_points(curve, u, torch.full_like(u, -60 / op.input_scale), torch.zeros_like(u)), LONGEST
        )

    def left(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return lower, torch.minimum(upper, contacts()(upper))

    def touching(below: ContactRange) -> Touching:
        return Touching(curve, below, None, usable, 0.0, lambda lower, upper: (op(lower), op(upper)))

    steepest = op.scale * op.alpha * op.input_scale
    rule = OffsetRule(curve, op.range, (0.0,), turns=turns)
    if op.scale <= 0 or op.input_scale <= 0 or op.alpha < 0:
        return rule
    return touching(whole_box) if steepest <= op.scale else Pair(touching(left), rule)
