"""What the searches of branch and bound share: what counts as proof, and how they end."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from corollary.verify.linear_bounds import Bounded
from corollary.verify.queries import OpenBoxes


@dataclass(frozen=True)
class Margin:
    """What a lower bound must exceed to count as proof: rounding must not turn a false property into a true one.

    Args: `absolute`, `relative`: to the size of what was summed in the bound.
    """

    absolute: float
    relative: float

    @staticmethod
    def for_dtype(dtype: torch.dtype) -> "Margin":
        """1e-9 in float64 and 1e-6 in float32, and 450 and 33 rounding errors of the largest sum."""
        return Margin(1e-9, 1e-13) if dtype == torch.float64 else Margin(1e-6, 4e-6)

    def below(self, bound: Bounded, offsets: Tensor) -> Tensor:
        """Lower bounds of row . y - offset that rounding leaves true, (batch, count): above zero they are proof."""
        return bound.lower - offsets - self.allowance(bound, offsets)

    def allowance(self, bound: Bounded, offsets: Tensor) -> Tensor:
        """What is taken off each bound for rounding, (batch, count)."""
        return self.absolute + self.relative * (bound.size.detach() + offsets.abs())


Ending = Literal["proved", "found", "timeout", "stuck"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """How a search ended.

    Args:
        status: "proved"; "found", with a point that must still be replayed; "timeout"; "stuck" where nothing is left
            to cut.
        point: (1, *input) where found.
        domains: how many were bounded.
        worst: the smallest margin of the last domains left open.
        rest: the boxes left open by a search that cuts boxes.
    """

    status: Ending
    point: Tensor | None
    domains: int
    worst: float
    rest: OpenBoxes | None = None
