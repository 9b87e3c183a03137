"""Intervals, and what ops do to them as far as that follows from the facts of the op."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from corollary.graph import Node
from corollary.graph.ops import Elementwise, Op
from corollary.graph.walk import Meaning


@dataclass(frozen=True, eq=False)
class Interval:
    """Every tensor x with `lower` <= x <= `upper`, entrywise; the layout is that of the value it bounds."""

    lower: Tensor
    upper: Tensor

    @property
    def shape(self) -> torch.Size:
        """Sizes of the value."""
        return self.lower.shape

    @property
    def dtype(self) -> torch.dtype:
        """Type of the ends."""
        return self.lower.dtype

    @property
    def center(self) -> Tensor:
        """Middle; the value itself where the ends are equal."""
        return self.lower / 2 + self.upper / 2

    @property
    def radius(self) -> Tensor:
        """Half the width."""
        return (self.upper - self.lower) / 2

    @property
    def finite(self) -> bool:
        """Whether no end is infinite."""
        return bool(self.lower.isfinite().all()) and bool(self.upper.isfinite().all())

    def to(self, dtype: torch.dtype) -> "Interval":
        """The interval in another dtype."""
        return Interval(self.lower.to(dtype), self.upper.to(dtype))


Operand: TypeAlias = Interval | Tensor
"""What reaches an op: an interval, or a tensor that is known exactly."""


def lower(x: Operand) -> Tensor:
    """The lower end; a tensor is both its ends."""
    return x.lower if isinstance(x, Interval) else x


def upper(x: Operand) -> Tensor:
    """The upper end."""
    return x.upper if isinstance(x, Interval) else x


def between(function: Callable[..., Tensor], *values: Operand) -> Interval:
    """The interval of a function that rises in every value: the function of the ends."""
    return Interval(function(*map(lower, values)), function(*map(upper, values)))


def turning(function: Callable[[Tensor], Tensor], x: Interval, points: Sequence[float]) -> Interval:
    """The interval of a continuous function that is monotone between the `points` where it turns.

    Its extremes lie at the ends and at the points inside.
    """
    at_ends = function(x.lower), function(x.upper)
    low, high = torch.minimum(*at_ends), torch.maximum(*at_ends)
    for point in points:
        value = function(torch.tensor(point, dtype=x.dtype, device=x.lower.device))
        inside = (x.lower < point) & (point < x.upper)
        low = torch.where(inside, torch.minimum(low, value), low)
        high = torch.where(inside, torch.maximum(high, value), high)
    return Interval(low, high)


def from_facts(op: Op) -> Callable[..., Interval] | None:
    """Monotone ops act on the ends, ops that move entries on each, piecewise-linear functions turn at their kinks."""
    if op.monotone > 0 or op.shape_only:
        return lambda *values: between(op, *values)
    if op.monotone < 0:
        return lambda *values: Interval(op(*map(upper, values)), op(*map(lower, values)))
    if isinstance(op, Elementwise) and op.kinks:
        return lambda x: turning(op, x, op.kinks)
    return None


interval: Meaning[Interval] = Meaning("interval", from_facts)


def apply_interval(node: Node, op: Op, values: tuple[Any, ...]) -> Any:
    """The value of a node from those of its inputs: computed where all are known, bounded where one is an interval.

    The ends lie within the range of the op. An end that the op has no number for (the logarithm of a negative number,
    a difference of infinities) is infinite, and an end that overflowed is the largest number: neither is ever NaN.

    Raises: NoRule, naming the node, for an op that has none.
    """
    if not any(isinstance(value, Interval) for value in values):
        return op(*values)
    return _tidy(interval.apply(node, op, values), op.range)


def _tidy(found: Interval, range: tuple[float, float]) -> Interval:
    if not found.dtype.is_floating_point:
        return found
    low = torch.nan_to_num(found.lower, nan=-math.inf, neginf=-math.inf)
    high = torch.nan_to_num(found.upper, nan=math.inf, posinf=math.inf)
    if range[0] > -math.inf:
        low, high = low.clamp(min=range[0]), high.clamp(min=range[0])
    if range[1] < math.inf:
        low, high = low.clamp(max=range[1]), high.clamp(max=range[1])
    return Interval(low, high)
