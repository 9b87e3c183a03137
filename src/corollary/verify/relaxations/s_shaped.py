"""Lines of functions that are convex, then concave: sigmoid, tanh, erf. Each is odd about zero, but for a constant."""

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import final

import torch
from torch import Tensor

from corollary.graph.ops import Erf, Sigmoid, Tanh
from corollary.verify.relaxations.contacts import Curve, Table, Touching, tangent_points, within
from corollary.verify.relaxations.lines import register_relaxation

LONGEST = 1e12
"""Distances from the inflection that the tables reach; longer boxes get constants."""


@final
@dataclass(frozen=True, eq=False)
class SContacts:
    """Contact ranges of a function that is convex left of zero, concave right of it, and odd up to a constant.

    Below, the range is [l, u] left of zero and [l, d(u)] across it; above, the same mirrored.
    """

    curve: Curve

    @cached_property
    def _table(self) -> Table:
        def contact(upper: Tensor) -> Tensor:
            return tangent_points(self.curve, upper, torch.full_like(upper, -60.0), torch.zeros_like(upper))

        return Table(contact, LONGEST)

    def below(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """From the lower end to the point whose tangent meets the function at the upper end."""
        return lower, torch.minimum(upper, self._table(upper))

    def above(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """From the point whose tangent meets the function at the lower end to the upper end."""
        return torch.maximum(lower, -self._table(-lower)), upper


def sigmoid_curve(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sigmoid and its derivative."""
    value = torch.sigmoid(x)
    return value, value * (1 - value)


def tanh_curve(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tanh and its derivative, by the sigmoid: 1 - tanh^2 would lose the left tail to cancellation."""
    value = torch.sigmoid(2 * x)
    return 2 * value - 1, 4 * value * (1 - value)


def erf_curve(x: Tensor) -> tuple[Tensor, Tensor]:
    """The error function and its derivative."""
    return torch.erf(x), 2 / math.sqrt(math.pi) * torch.exp(-x * x)


def _s_shaped(curve: Curve, op: Sigmoid | Tanh | Erf) -> Touching:
    contacts = SContacts(curve)
    return Touching(
        curve, contacts.below, contacts.above, within(LONGEST), 0.0, lambda lower, upper: (op(lower), op(upper))
    )


@register_relaxation(Sigmoid)
@cache
def _sigmoid(op: Sigmoid) -> Touching:
    return _s_shaped(sigmoid_curve, op)


@register_relaxation(Tanh)
@cache
def _tanh(op: Tanh) -> Touching:
    return _s_shaped(tanh_curve, op)


@register_relaxation(Erf)
@cache
def _erf(op: Erf) -> Touching:
    return _s_shaped(erf_curve, op)
