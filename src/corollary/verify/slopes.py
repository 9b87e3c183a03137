"""Optimised linear bounds: the free parameters of every relaxation by gradient ascent on the bound itself.

Inner nodes come first, in their order: each entry's two bounds have parameters of their own, and later ones stand on
the lines that the earlier, tighter ones allow. Every value of a parameter in [0, 1] gives a sound bound, so whatever
the optimiser does, each step's bounds hold; the best of all steps is returned.

Source: Xu et al. 2021, arXiv 2011.13824 (alpha), with inner bounds optimised for themselves.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corollary.graph import Node
from corollary.verify.known import Known
from corollary.verify.layout import Rows
from corollary.verify.linear_bounds import lower_bounds
from corollary.verify.prepared import Prepared
from corollary.verify.sets import Region
from corollary.verify.sweep import Sweep, entered, open_entries, signed_positions
from corollary.verify.windows import row_width

COEFFICIENTS = 2**20
"""Rows of an inner node are optimised in parts of so many coefficients at the widest node."""

Parameters = dict[Node, tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class Ascent:
    """How parameters are optimised: steps of Adam, its rate and the rate's factor a step, and when to stop.

    Args: `deadline`: by `time.monotonic`; the best so far counts then.
    """

    iterations: int = 20
    learning_rate: float = 0.25
    decay: float = 0.98
    deadline: float | None = None

    def is_over(self) -> bool:
        """Whether the time is up."""
        return self.deadline is not None and time.monotonic() > self.deadline


@dataclass(frozen=True, eq=False)
class Optimised:
    """The best bounds found.

    Args:
        lower: (batch, count), never below what the sweep's own bounds give.
        known: bounds of every node that relaxations read.
        free: the best parameters found for the pass from the output.
    """

    lower: Tensor
    known: Known
    free: Parameters


def optimised(
    network: Prepared,
    start: Node,
    rows: Rows | Tensor,
    regions: Sequence[Region],
    found: Sweep,
    *,
    ascent: Ascent | None = None,
    goal: Tensor | float = torch.inf,
) -> Optimised:
    """Lower bounds of `rows`, all parameters optimised: those of the passes that bound inner nodes, too.

    Args:
        found: bounds by default parameters; where they came from no backward pass, they stay.
        goal: stop once every bound is above it; a number, or one for each row. Bounds above it are not raised further.
    """
    how = ascent or Ascent()
    first: Parameters = {}
    least = lower_bounds(network, start, rows, regions, found.known, collect=first).lower.detach()
    known = sharper(network, regions, found, how)
    lower, free = _risen(network, start, rows, regions, known, how, goal, first)
    return Optimised(torch.maximum(lower, least), known, free)


def sharper(network: Prepared, regions: Sequence[Region], found: Sweep, ascent: Ascent) -> Known:
    """The bounds of a sweep, those that came from backward passes optimised node by node."""
    known = Known(network, found.known.batch, found.known.bounds)
    for node in found.positions:
        needed = open_entries(network, node, known)
        if ascent.iterations == 0 or ascent.is_over() or not bool(needed.any()):
            continue
        positions = signed_positions(needed)
        together = max(1, COEFFICIENTS // (known.batch * row_width(network, node)))
        lower = [_risen(network, node, piece, regions, known, ascent)[0] for piece in positions.split(together, dim=1)]
        known.bounds[node] = entered(node, known.flat(node), positions, torch.cat(lower, dim=1))
    return known


def _risen(
    network: Prepared,
    start: Node,
    rows: Rows | Tensor,
    regions: Sequence[Region],
    known: Known,
    ascent: Ascent,
    goal: Tensor | float = torch.inf,
    first: Parameters | None = None,
) -> tuple[Tensor, Parameters]:
    """The best lower bounds of one pass, (batch, count), and the parameters that gave them.

    Args: `first`: parameters to start from, too: tighter bounds of inner nodes can have worse defaults.
    """
    free: Parameters = {}
    best = lower_bounds(network, start, rows, regions, known, collect=free).lower.detach()
    if first is not None:
        lower = lower_bounds(network, start, rows, regions, known, free=first).lower.detach()
        free = _better(lower > best, first, free)
        best = torch.maximum(best, lower)
    best_free = {node: (_copy(low), _copy(high)) for node, (low, high) in free.items()}
    free = {node: (_leaf(low), _leaf(high)) for node, (low, high) in free.items()}
    leaves = [part for pair in free.values() for part in pair if part is not None]
    if not leaves:
        return best, best_free
    goal = torch.as_tensor(goal, dtype=best.dtype, device=best.device)
    adam = torch.optim.Adam(leaves, lr=ascent.learning_rate, foreach=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(adam, ascent.decay)
    for step in range(ascent.iterations):
        if bool((best > goal).all()) or ascent.is_over():
            break
        with torch.enable_grad():
            lower = lower_bounds(network, start, rows, regions, known, free=free).lower
            loss = -torch.minimum(lower, goal).sum()
        with torch.no_grad():
            better = lower > best
            best = torch.where(better, lower, best)
            best_free = _better(better, free, best_free)
        if step + 1 < ascent.iterations:
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
            with torch.no_grad():
                for leaf in leaves:
                    leaf.clamp_(0, 1)
    return best, best_free


def _leaf(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.detach().clone().requires_grad_()


def _copy(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.detach().clone()


def _better(better: Tensor, new: Parameters, old: Parameters) -> Parameters:
    """The new parameters of the rows that got better, (batch, count)."""
    return {
        node: (_chosen(better, new[node][0], low), _chosen(better, new[node][1], high))
        for node, (low, high) in old.items()
    }


def _chosen(better: Tensor, new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """The parameters of the rows that got better, (batch, count); those that rows share, where all of them did."""
    if new is None or old is None:
        return old
    if new.shape[1] != better.shape[1]:
        better = better.all(1, keepdim=True)
    return torch.where(better[..., None], new.detach(), old)
