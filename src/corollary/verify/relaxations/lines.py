"""Two lines that hold a nonlinear function between them on a box, and the table of which op has which.

A line with a free parameter takes it as a position in [0, 1]: of its slope between two ends, or of its tangent point
between the ends that are valid on this box. Every position is sound on every box, so what was found for one box serves
the boxes inside it unchanged.

Offsets are taken from the slope as it was rounded, at every point where the line may touch the function, and then
moved outward by the rounding error of that sum: a line holds whatever rounding did to its slope.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.graph.ops import Op, Torch


@dataclass(frozen=True, eq=False)
class Lines:
    """Slopes and offsets with lower_slope x + lower_offset <= f(x) <= upper_slope x + upper_offset on a box, entrywise.

    Args: tensors of the shape of the box and the free parameters, broadcast; an offset of None is zero everywhere.
    """

    lower_slope: Tensor
    lower_offset: Tensor | None
    upper_slope: Tensor
    upper_offset: Tensor | None

    def scaled(self, factor: float, shift: float = 0.0) -> "Lines":
        """The lines of factor f + shift: a negative factor turns the upper line into the lower one."""
        lower, upper = (self.lower_slope, self.lower_offset), (self.upper_slope, self.upper_offset)
        (a, b), (c, d) = (lower, upper) if factor >= 0 else (upper, lower)
        offsets = [shift + factor * (torch.zeros_like(s) if o is None else o) for s, o in ((a, b), (c, d))]
        return Lines(factor * a, offsets[0], factor * c, offsets[1])


class Relaxation(abc.ABC):
    """Lines of one function of one variable on any box.

    Attributes: `lower_free`, `upper_free`: whether that line has a free parameter.
    """

    lower_free: bool = False
    upper_free: bool = False

    def defaults(self, lower: Tensor, upper: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Positions in [0, 1] of the lower and the upper line that leave the smallest area; None where not free."""
        return None, None

    @abc.abstractmethod
    def lines(
        self, lower: Tensor, upper: Tensor, lower_free: Tensor | None = None, upper_free: Tensor | None = None
    ) -> Lines:
        """The lines on [lower, upper].

        Args:
            lower, upper: ends of the box, of one shape; infinite ends give finite slopes, and offsets that are
                infinite only where no line holds.
            lower_free, upper_free: positions in [0, 1] that broadcast against the ends; None: the defaults.
        """


Factory: TypeAlias = Callable[[Any], Relaxation | None]

_BY_CLASS: dict[type[Op], Factory] = {}
_BY_TARGET: dict[Any, Factory] = {}


def register_relaxation(key: Any) -> Callable[[Factory], Factory]:
    """Decorate the function that makes, of an op, its relaxation (None: it has none for these arguments).

    Args: `key`: an op class, or the callable of a `Torch` op.
    Raises: BadInput, for anything else.
    """
    if not callable(key):
        raise BadInput(f"a relaxation belongs to an op class or to the callable of a Torch op, got {key!r}")

    def keep(factory: Factory) -> Factory:
        if isinstance(key, type) and issubclass(key, Op):
            _BY_CLASS[key] = factory
        else:
            _BY_TARGET[key] = factory
        return factory

    return keep


def relaxation(op: Op) -> Relaxation | None:
    """The relaxation of an op of one input, or None where there is none."""
    if isinstance(op, Torch):
        factory = _BY_TARGET.get(op.target)
    else:
        factory = next((_BY_CLASS[kind] for kind in type(op).__mro__ if kind in _BY_CLASS), None)
    return None if factory is None else factory(op)


def between(low: Tensor, high: Tensor, position: Tensor) -> Tensor:
    """The point at `position` from low (0) to high (1); never outside, though rounding may say so."""
    return torch.minimum(torch.maximum(torch.lerp(low, high, position), low), high)


def rounded_down(offset: Tensor, *terms: Tensor) -> Tensor:
    """A sum of products, `offset`, less what rounding may have added to it; `terms`: its parts."""
    return offset - _rounding(offset, terms)


def rounded_up(offset: Tensor, *terms: Tensor) -> Tensor:
    """A sum of products, `offset`, plus what rounding may have taken from it; `terms`: its parts."""
    return offset + _rounding(offset, terms)


def _rounding(offset: Tensor, terms: tuple[Tensor, ...]) -> Tensor:
    size = terms[0].detach().abs()
    for term in terms[1:]:
        size = size + term.detach().abs()
    return torch.finfo(offset.dtype).eps * size


def smallest_width(dtype: torch.dtype) -> float:
    """Width that a quotient by a width is held above, so that neither it nor its derivative overflows."""
    return torch.finfo(dtype).tiny ** 0.4
