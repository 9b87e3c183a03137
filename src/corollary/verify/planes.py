"""Linear bounds of inner nodes at the network's input: found over a box, they hold on every part of it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from corollary.graph import Node
from corollary.verify.linear_bounds import Bounded
from corollary.verify.linear_functions import least
from corollary.verify.sets import Region


@dataclass(frozen=True, eq=False)
class Planes:
    """Linear functions of the network's input that lie below entries of a node, for each of many boxes.

    Args:
        positions: which entries, signed, as `lower_bounds` takes them, (batch, count).
        slopes: (batch, count, inputs); offset: (batch, count), -inf where there is no such function.
    """

    positions: Tensor
    slopes: Tensor
    offset: Tensor

    @classmethod
    def none(cls, positions: Tensor, inputs: int, dtype: torch.dtype) -> "Planes":
        """No functions yet, to be entered with `put`."""
        slopes = torch.zeros(*positions.shape, inputs, dtype=dtype, device=positions.device)
        return cls(positions, slopes, torch.full_like(slopes[..., 0], -torch.inf))

    def put(self, samples: Tensor, entries: int, source: Node, found: list[Bounded]) -> None:
        """Enter the bounds of the first so many entries of each sign of some samples, in pieces along the rows."""
        first = torch.arange(entries, device=samples.device)
        place = samples[:, None], torch.cat([first, first + self.positions.shape[1] // 2])
        slopes = [bound.slopes[source].expand(len(samples), -1, -1) for bound in found]
        self.slopes[place] = torch.cat(slopes, dim=1)
        self.offset[place] = torch.cat([bound.offset.expand(len(samples), -1) for bound in found], dim=1)

    def at(self, samples: Tensor) -> "Planes":
        """Those of some of the boxes."""
        return Planes(self.positions[samples], self.slopes[samples], self.offset[samples])

    def least(self, region: Region) -> Tensor:
        """Lower bounds over parts of the boxes, (batch, count)."""
        return least(self.slopes, region) + self.offset
