"""Lines of piecewise linear functions: ReLU and its kin, ramps, steps."""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from corollary.graph.ops import Abs, Clamp, Floor, HardSigmoid, LeakyReLU, ReLU, Sign
from corollary.verify.relaxations.lines import (
    Lines,
    Relaxation,
    register_relaxation,
    rounded_down,
    rounded_up,
    smallest_width,
)


def _positive_side(lower: Tensor, upper: Tensor) -> Tensor:
    """1 where more of a box is above zero than below, 0 elsewhere: the piece that a line through the kink follows."""
    return (upper > -lower).to(lower.dtype)


def _chosen(
    one: Relaxation, lower: Tensor, upper: Tensor, lower_free: Tensor | None, upper_free: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both free parameters of a relaxation that has two, the defaults where they are not given."""
    usual = one.defaults(lower, upper)
    below = usual[0] if lower_free is None else lower_free
    above = usual[1] if upper_free is None else upper_free
    assert below is not None
    assert above is not None
    return below, above


@final
@dataclass(frozen=True, eq=False)
class OneKink(Relaxation):
    """x where positive, `slope` x elsewhere: ReLU (0), LeakyReLU, PReLU, Abs (-1).

    On a box around zero one line is the chord; the other passes through the kink with a free slope between both.

    Args: `slope`: a number, or a tensor that broadcasts against the boxes (PReLU: one a channel).
    """

    slope: float | Tensor = 0.0

    @property
    def lower_free(self) -> bool:  # type: ignore[override]  # a field of the base
        """The function is convex where the slope is below 1."""
        return bool((torch.as_tensor(self.slope) < 1).any())

    @property
    def upper_free(self) -> bool:  # type: ignore[override]  # a field of the base
        """The function is concave where the slope is above 1."""
        return bool((torch.as_tensor(self.slope) > 1).any())

    def defaults(self, lower: Tensor, upper: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The slope of the larger side."""
        position = _positive_side(lower, upper)
        return position if self.lower_free else None, position if self.upper_free else None

    def lines(
        self, lower: Tensor, upper: Tensor, lower_free: Tensor | None = None, upper_free: Tensor | None = None
    ) -> Lines:
        chord, offset = self._chord(lower, upper)
        if not self.upper_free:  # convex
            return Lines(self._through_kink(lower, upper, lower_free), None, chord, offset)
        if not self.lower_free:  # concave
            return Lines(chord, offset, self._through_kink(lower, upper, upper_free), None)
        convex = torch.as_tensor(self.slope, device=lower.device) <= 1
        below, above = self._through_kink(lower, upper, lower_free), self._through_kink(lower, upper, upper_free)
        zero = torch.zeros_like(offset)
        return Lines(
            torch.where(convex, below, chord),
            torch.where(convex, zero, offset),
            torch.where(convex, chord, above),
            torch.where(convex, offset, zero),
        )

    def _through_kink(self, lower: Tensor, upper: Tensor, free: Tensor | None) -> Tensor:
        if free is None:
            position = _positive_side(lower, upper)
        else:  # a box on one side of the kink has that side's slope
            at_least, at_most = (lower >= 0).to(lower.dtype), (upper > 0).to(lower.dtype)
            position = torch.minimum(torch.maximum(free, at_least), at_most)
        return self.slope + position * (1 - self.slope)

    def _chord(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and offset of the chord over the kink; its limit where one end is infinite.

        Off the kink one end of [min(l, 0), max(u, 0)] is zero, and the chord is the function.
        """
        largest = torch.finfo(lower.dtype).max / 8
        low, high = lower.clamp(-largest, 0), upper.clamp(0, largest)
        slope = (high - self.slope * low) / (high - low).clamp_min(smallest_width(lower.dtype))
        slope = torch.where(lower < -largest, self.slope, slope)
        slope = torch.where(upper > largest, 1.0, slope)
        at_low, at_high = low * (self.slope - slope), high * (1 - slope)
        bend = 1 - self.slope  # positive: convex, and the chord lies above
        if isinstance(bend, Tensor):
            offset = torch.where(bend >= 0, torch.maximum(at_low, at_high), torch.minimum(at_low, at_high))
        else:
            offset = torch.maximum(at_low, at_high) if bend >= 0 else torch.minimum(at_low, at_high)
        offset = offset * (1 + 4 * torch.finfo(lower.dtype).eps)
        nowhere = (lower < -largest) & (upper > largest)
        return slope, torch.where(nowhere, offset * largest * 4, offset)  # overflows to infinity: no line holds


def prelu(slope: Tensor) -> OneKink:
    """Relaxation of PReLU; `slope` [channel, 1, ...] or whatever broadcasts against the boxes."""
    return OneKink(slope)


@final
@dataclass(frozen=True)
class Ramp(Relaxation):
    """`scale` clamp(x, `low`, `high`) + `shift`: a convex kink, then a concave one.

    A line with room at its kink passes through it, its free slope between flat and the line to the box's far end;
    where a box does not reach over the kink the line is the chord.
    """

    low: float
    high: float
    scale: float = 1.0
    shift: float = 0.0
    lower_free = True
    upper_free = True

    def defaults(self, lower: Tensor, upper: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Steep where most of the box is beyond the kink, flat elsewhere."""
        below = (upper - self.low > self.low - lower).to(lower.dtype)
        above = (self.high - lower > upper - self.high).to(lower.dtype)
        return (below, above) if self.scale >= 0 else (above, below)

    def lines(
        self, lower: Tensor, upper: Tensor, lower_free: Tensor | None = None, upper_free: Tensor | None = None
    ) -> Lines:
        below, above = _chosen(self, lower, upper, lower_free, upper_free)
        if self.scale < 0:
            below, above = above, below
        slope, offset = _under_ramp(lower, upper, self.low, self.high, below)
        mirrored, mirrored_offset = _under_ramp(-upper, -lower, -self.high, -self.low, above)
        return Lines(slope, offset, mirrored, -mirrored_offset).scaled(self.scale, self.shift)


def _under_ramp(lower: Tensor, upper: Tensor, low: float, high: float, position: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset of a line below clamp(x, low, high)."""
    tiny = smallest_width(lower.dtype)
    finite = torch.isfinite(lower) & torch.isfinite(upper)
    inside = (lower >= low) & (upper <= high)
    start, end = torch.where(finite, lower, 0.0), torch.where(finite, upper, 0.0)
    start_value, end_value = start.clamp(low, high), end.clamp(low, high)
    chord = ((end_value - start_value) / (end - start).clamp_min(tiny)).clamp(0, 1)
    chord = torch.where(inside, 1.0, chord)
    chord_offset = torch.minimum(start_value - chord * start, end_value - chord * end)
    chord_offset = torch.where(inside, 0.0, rounded_down(chord_offset, start_value, end_value))
    chord = torch.where(finite | inside, chord, 0.0)
    chord_offset = torch.where(finite | inside, chord_offset, lower.clamp(low, high))
    if math.isinf(low):
        return chord.expand(torch.broadcast_shapes(chord.shape, position.shape)), chord_offset
    bends = (lower < low) & (upper > low)
    reach = torch.where(bends & torch.isfinite(upper), upper, low + 1.0) - low
    steepest = (reach.clamp_max(high - low) / reach.clamp_min(tiny)).clamp(0, 1)
    steepest = torch.where(torch.isinf(upper), 0.0 if math.isfinite(high) else 1.0, steepest)
    slope = position * steepest
    # The slope is held a rounding error below the line to the far end, which f may not reach.
    slope = slope * (1 - 4 * torch.finfo(lower.dtype).eps) if math.isfinite(high) else slope
    offset = rounded_down(low - slope * low, torch.full_like(slope, low))
    return torch.where(bends, slope, chord), torch.where(bends, offset, chord_offset)


@final
@dataclass(frozen=True)
class Step(Relaxation):
    """The sign: -1, 0 or 1. Each line turns about the end of its flat part."""

    lower_free = True
    upper_free = True

    def defaults(self, lower: Tensor, upper: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Steep on the larger side."""
        position = _positive_side(lower, upper)
        return position, 1 - position

    def lines(
        self, lower: Tensor, upper: Tensor, lower_free: Tensor | None = None, upper_free: Tensor | None = None
    ) -> Lines:
        below, above = _chosen(self, lower, upper, lower_free, upper_free)
        slope, offset = _under_step(lower, upper, below)
        mirrored, mirrored_offset = _under_step(-upper, -lower, above)
        return Lines(slope, offset, mirrored, -mirrored_offset)


def _under_step(lower: Tensor, upper: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset of a line below sign(x): at the height of the lower end where it meets zero."""
    height = torch.sign(lower)
    # A box that ends just above zero allows a slope without limit, of no use and of much rounding.
    reach = torch.where(upper > 0, upper, 1.0).clamp_min(torch.finfo(lower.dtype).eps)
    steepest = torch.where(upper > 0, (1 - height) / reach, 0.0) * (1 - 4 * torch.finfo(lower.dtype).eps)
    return position * steepest, height


@final
@dataclass(frozen=True)
class Stairs(Relaxation):
    """The floor. The lower line turns about the foot of the first stair, the upper one about the top of the last."""

    lower_free = True
    upper_free = True

    def defaults(self, lower: Tensor, upper: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Steep where most of the box is beyond the point turned about."""
        middle = lower + (upper - lower) / 2
        first, last = torch.floor(lower) + 1, torch.floor(upper)
        return (middle > first).to(lower.dtype), (middle < last).to(lower.dtype)

    def lines(
        self, lower: Tensor, upper: Tensor, lower_free: Tensor | None = None, upper_free: Tensor | None = None
    ) -> Lines:
        below, above = _chosen(self, lower, upper, lower_free, upper_free)
        left, right = torch.isfinite(lower), torch.isfinite(upper)
        bottom, top = torch.floor(torch.where(left, lower, 0.0)), torch.floor(torch.where(right, upper, 0.0))
        several = ~left | ~right | (top > bottom)
        # Over a single stair a line may be steeper than 1, as it need only reach the end of the box.
        single = left & right & (top == bottom + 1)
        ahead, behind = (torch.where(single, end, 1.0) for end in (upper - top, top - lower))
        smallest = torch.finfo(lower.dtype).eps
        lower_slope = torch.where(several, torch.where(left, below / ahead.clamp_min(smallest), 1.0), 0.0)
        upper_slope = torch.where(several, torch.where(right, above / behind.clamp_min(smallest), 1.0), 0.0)
        lower_offset = bottom - lower_slope * (bottom + 1)
        upper_offset = top - upper_slope * top
        return Lines(
            lower_slope,
            rounded_down(lower_offset, 4 * bottom, 4 * lower_slope * (bottom + 1), torch.ones_like(bottom)),
            upper_slope,
            rounded_up(upper_offset, 4 * top, 4 * upper_slope * top, torch.ones_like(top)),
        )


@register_relaxation(ReLU)
def _relu(op: ReLU) -> OneKink:
    return OneKink(0.0)


@register_relaxation(LeakyReLU)
def _leaky_relu(op: LeakyReLU) -> OneKink:
    return OneKink(op.slope)


@register_relaxation(Abs)
def _abs(op: Abs) -> OneKink:
    return OneKink(-1.0)


@register_relaxation(Clamp)
def _clamp(op: Clamp) -> Ramp:
    return Ramp(op.low, op.high)


@register_relaxation(HardSigmoid)
def _hard_sigmoid(op: HardSigmoid) -> Ramp:
    if op.slope == 0:
        level = min(max(op.offset, 0.0), 1.0)
        return Ramp(0.0, 1.0, scale=0.0, shift=level)
    return Ramp(*op.kinks, scale=op.slope, shift=op.offset)


@register_relaxation(Sign)
def _sign(op: Sign) -> Step:
    return Step()


@register_relaxation(Floor)
def _floor(op: Floor) -> Stairs:
    return Stairs()
