r"""Lines that touch a smooth function: tangents where one fits under it, the chord where none does.

A line below f on [l, u] that cannot be raised touches f, either at a point t of a convex part, where it is the tangent,
or at both ends, where it is the chord. The points t whose tangent stays below f form a range [A, B]. Its end B is l or
u itself where f is convex up to there, and otherwise the point whose tangent meets f again at u,
$f(B) + f'(B) (u - B) = f(u)$: a function of u alone, so it is tabulated once; A likewise of l. Where A >= B no tangent
fits, and the chord is the only such line. Lines above f are those below -f.

The offset is the smallest of f(x) - slope x over t, l and u. For a slope f'(t) these are all the minima there are, so a
line is sound wherever t lies in the convex part: an error of the table costs tightness only.

Source: Shi et al. 2025 (arXiv 2405.21063), section on linear relaxations; Zhang et al. 2018 (CROWN) for S-shapes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from corollary.verify.relaxations.lines import Lines, Relaxation, between, rounded_down, smallest_width

Curve: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A function's values and derivatives."""

ContactRange: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of the ends of boxes, the ends A, B of the points whose tangents hold: in the box, or A >= B where there is none."""

Ends: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Mask: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def whole_box(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The contact range of a convex function."""
    return lower, upper


@final
@dataclass(frozen=True, eq=False)
class Touching(Relaxation):
    """Lines of a function of known contacts; the free parameter is the place of the point touched in its range.

    Args:
        curve: values and derivatives.
        below, above: contact ranges of f and of -f; None where the line is always the chord.
        usable: boxes on which `curve` is finite; the others get the constants.
        neutral: a point at which `curve` is finite, put in place of the ends of unusable boxes.
        constants: the smallest and the largest value of f on a box, infinite ends included.
    """

    curve: Curve
    below: ContactRange | None
    above: ContactRange | None
    usable: Mask
    neutral: float
    constants: Ends

    @property
    def lower_free(self) -> bool:  # type: ignore[override]  # a field of the base
        """Whether some lower line is a tangent."""
        return self.below is not None

    @property
    def upper_free(self) -> bool:  # type: ignore[override]  # a field of the base
        """Whether some upper line is a tangent."""
        return self.above is not None

    def defaults(self, lower: Tensor, upper: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The tangent at the middle of the box, or at the point of the range next to it: the smallest area."""
        low, high, _ = self._usable_part(lower.detach(), upper.detach())
        below, above = (
            None if touch is None else _nearest_middle(touch, low, high) for touch in (self.below, self.above)
        )
        return below, above

    def lines(
        self, lower: Tensor, upper: Tensor, lower_free: Tensor | None = None, upper_free: Tensor | None = None
    ) -> Lines:
        low, high, usable = self._usable_part(lower, upper)
        ends = (*self.curve(low), *self.curve(high))
        slope, offset = line_below(self.curve, self.below, low, high, ends, lower_free)
        mirrored = tuple(-end for end in ends)
        above, above_offset = line_below(negative(self.curve), self.above, low, high, mirrored, upper_free)
        above, above_offset = -above, -above_offset
        if usable is not None:
            least, most = self.constants(lower.detach(), upper.detach())
            largest = torch.finfo(lower.dtype).max  # a value that overflows is above that, not at infinity
            least, most = least.clamp(max=largest), most.clamp(min=-largest)
            slope, offset = torch.where(usable, slope, 0.0), torch.where(usable, offset, least)
            above, above_offset = torch.where(usable, above, 0.0), torch.where(usable, above_offset, most)
        return Lines(slope, offset, above, above_offset)

    def _usable_part(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The ends, with the neutral point in place of those of unusable boxes, and which are usable (None: all)."""
        usable = self.usable(lower, upper)
        if bool(usable.all()):
            return lower, upper, None
        return torch.where(usable, lower, self.neutral), torch.where(usable, upper, self.neutral), usable


def line_below(
    curve: Curve,
    contacts: ContactRange | None,
    lower: Tensor,
    upper: Tensor,
    ends: tuple[Tensor, ...],
    position: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Slope and offset of a line that touches a function from below on [lower, upper].

    Args:
        contacts: the points it may touch; None: the chord.
        ends: value and derivative at the lower end, and at the upper end.
        position: of the point touched in its range; None: next to the middle of the box.
    """
    at_lower, start_slope, at_upper, end_slope = ends
    touched = [(lower, at_lower), (upper, at_upper)]
    if contacts is None:
        slope = _chord(lower, upper, at_lower, at_upper, start_slope, end_slope)
        return slope, _lowest(slope, touched)
    left, right = contacts(lower, upper)
    if position is None:
        point = torch.minimum(torch.maximum(lower + (upper - lower) / 2, left), right)
    else:
        point = between(left, right, position)
    point = torch.minimum(torch.maximum(point, lower), upper)  # there may be no range
    at_point, tangent = curve(point)
    chord = _chord(lower, upper, at_lower, at_upper, start_slope, end_slope)
    slope = torch.where(left < right, tangent, chord)
    return slope, _lowest(slope, [*touched, (point, at_point)])


def _chord(
    lower: Tensor, upper: Tensor, at_lower: Tensor, at_upper: Tensor, start_slope: Tensor, end_slope: Tensor
) -> Tensor:
    """Slope of the chord below f, held between the derivatives at the ends, which it lies between where it holds.

    On a box so narrow that the quotient is all rounding, that is what gives it a meaning.
    """
    slope = (at_upper - at_lower) / (upper - lower).clamp_min(smallest_width(lower.dtype))
    return torch.minimum(torch.maximum(slope, end_slope), start_slope)


def _lowest(slope: Tensor, touched: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The largest offset of a line of that slope below the points (x, f(x)), rounded down."""
    offset = touched[0][1] - slope * touched[0][0]
    for x, value in touched[1:]:
        offset = torch.minimum(offset, value - slope * x)
    (lower, at_lower), (upper, at_upper) = touched[:2]
    farthest = torch.maximum(lower.detach().abs(), upper.detach().abs())
    return rounded_down(offset, slope * farthest, at_lower, at_upper)


def _nearest_middle(contacts: ContactRange, lower: Tensor, upper: Tensor) -> Tensor:
    """Position, in its range, of the point nearest to the middle of the box."""
    left, right = contacts(lower, upper)
    middle = lower + (upper - lower) / 2
    return ((middle - left) / (right - left).clamp_min(smallest_width(lower.dtype))).clamp(0, 1)


def negative(curve: Curve) -> Curve:
    """The curve of -f."""

    def negated(x: Tensor) -> tuple[Tensor, Tensor]:
        value, derivative = curve(x)
        return -value, -derivative

    return negated


def within(largest: float) -> Mask:
    """The boxes with both ends in [-largest, largest]."""
    return lambda lower, upper: (lower >= -largest) & (upper <= largest)


def tangent_points(curve: Curve, meets: Tensor, holds: Tensor, fails: Tensor) -> Tensor:
    r"""The point d between `holds` and `fails` whose tangent meets the function at another point w = `meets`.

    Bisection for $f(d) + f'(d) (w - d) = f(w)$, from a point whose tangent is below f(w) to one whose tangent is above;
    the result is on the side that holds, and is `holds` where no tangent does.
    """
    target = curve(meets)[0]
    for _ in range(64):
        middle = holds + (fails - holds) / 2
        value, derivative = curve(middle)
        good = value + derivative * (meets - middle) <= target
        holds, fails = torch.where(good, middle, holds), torch.where(good, fails, middle)
    return holds


@final
class Table:
    """A function of a distance, on a grid that is even in log(1 + distance); linear in between, detached.

    Args: `function`: tabulated in float64 at distances from 0 to `longest`.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], longest: float, count: int = 8192):
        self._top = count - 1
        self._rate = self._top / float(torch.tensor(longest, dtype=torch.float64).log1p())
        grid = torch.arange(count, dtype=torch.float64) / self._rate
        self._values = {torch.float64: function(torch.expm1(grid))}

    def __call__(self, distance: Tensor) -> Tensor:
        """Values at distances; negative ones count as 0, longer ones as the longest."""
        values = self._in_dtype_of(distance)
        place = (torch.log1p(distance.detach().clamp_min(0)) * self._rate).clamp_max(self._top - 1e-3)
        whole = torch.floor(place)
        index = whole.to(torch.int32).flatten()
        start, end = (values.index_select(0, i).reshape(place.shape) for i in (index, index + 1))
        return torch.lerp(start, end, place - whole)

    def _in_dtype_of(self, like: Tensor) -> Tensor:
        if like.dtype not in self._values:
            self._values[like.dtype] = self._values[torch.float64].to(like.dtype)
        return self._values[like.dtype].to(like.device)
