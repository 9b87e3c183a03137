"""Optimised linear bounds: the free parameters of every relaxation by gradient ascent on the bound itself.

Inner nodes come first, in their order: each entry's two bounds have parameters of their own, and later ones stand on
the lines that the earlier, tighter ones allow. Every value of a parameter in [0, 1] gives a sound bound, so whatever
the optimiser does, each step's bounds hold; the best of all steps is returned.

Source: Xu et al. 2021, arXiv 2011.13824 (alpha), with inner bounds optimised for themselves.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR

from corollary.graph import Node
from corollary.verify.known import Known
from corollary.verify.layout import Rows
from corollary.verify.linear_bounds import lower_bounds
from corollary.verify.prepared import Prepared
from corollary.verify.relevance import relevant_entries
from corollary.verify.sets import Region
from corollary.verify.sweep import Sweep, entered, open_entries, signed_positions
from corollary.verify.windows import row_width

COEFFICIENTS = 2**20
"""Rows of an inner node are optimised in parts of so many coefficients at the widest node."""

SAMPLE, WORTHWHILE = 32, 0.03
"""So many entries of an inner node are optimised first; the others where these become narrower by this share."""

WINDOW, SETTLED = 4, 0.02
"""Inner nodes are left when so many steps together gain no more than this share of the whole gain."""

Parameters = dict[Node, tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class Ascent:
    """How parameters are optimised: steps of Adam, its rate and the rate's factor a step, and when to stop.

    Args:
        deadline: by `time.monotonic`; the best so far counts then.
        thrifty: inner nodes are left where a sample of their entries, or the last steps, gain little.
    """

    iterations: int = 20
    learning_rate: float = 0.25
    decay: float = 0.98
    deadline: float | None = None
    thrifty: bool = False

    def half(self) -> "Ascent":
        """The same in half of the time that is left."""
        now = time.monotonic()
        return self if self.deadline is None else replace(self, deadline=now + (self.deadline - now) / 2)

    def is_over(self) -> bool:
        """Whether the time is up."""
        return self.deadline is not None and time.monotonic() > self.deadline


@dataclass(frozen=True, eq=False)
class Optimised:
    """The best bounds found.

    Args:
        lower: (batch, count), never below what the sweep's own bounds give, nor below what `known` and `free` do.
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
    """Lower bounds of `rows`, all parameters optimised: those of the pass from `start`, which often suffice and cost
    little, then those of the passes that bound inner nodes, and then the first again.

    Args:
        found: bounds by default parameters; where they came from no backward pass, they stay.
        goal: stop once every bound is above it; a number, or one for each row. Bounds above it are not raised further.
    """
    how = ascent or Ascent()
    least, first = raised(network, start, rows, regions, found.known, how, goal)
    if not found.positions or bool((least > goal).all()):
        return Optimised(least, found.known, first)
    relevant = relevant_entries(network, start, rows, found.known) if isinstance(rows, Rows) else None
    known = sharper(network, regions, found, how.half(), relevant)
    lower, free = raised(network, start, rows, regions, known, how, goal, first)
    return Optimised(torch.maximum(lower, least), known, free)


def sharper(
    network: Prepared,
    regions: Sequence[Region],
    found: Sweep,
    ascent: Ascent,
    relevant: Mapping[Node, Tensor] | None = None,
) -> Known:
    """The bounds of a sweep, those that came from backward passes optimised node by node.

    Args: `relevant`: the entries that are worth it, (batch, entries); nodes that are not there have none.
    """
    known = Known(network, found.known.batch, found.known.bounds)
    for node in found.positions:
        if relevant is not None and node not in relevant:
            continue
        needed = open_entries(network, node, known)
        if relevant is not None:
            needed &= relevant[node]
        if ascent.iterations == 0 or ascent.is_over() or not bool(needed.any()):
            continue
        together = max(1, COEFFICIENTS // (2 * known.batch * row_width(network, node)))
        sample, rest = _sampled(signed_positions(needed))
        before = _widths(known, node, sample)
        for piece in sample.split(together, dim=1):
            _rise_entries(network, node, piece, regions, known, ascent)
        if not ascent.thrifty or bool(_widths(known, node, sample) <= (1 - WORTHWHILE) * before):
            for piece in rest.split(together, dim=1):
                _rise_entries(network, node, piece, regions, known, ascent)
    return known


def _sampled(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Some of the entries of positions of both signs, evenly spread, and the others; as positive positions."""
    positive = positions[:, : positions.shape[1] // 2]
    chosen = torch.zeros(positive.shape[1], dtype=torch.bool, device=positions.device)
    chosen[:: max(1, positive.shape[1] // SAMPLE)] = True
    return positive[:, chosen], positive[:, ~chosen]


def _widths(known: Known, node: Node, positions: Tensor) -> Tensor:
    """The sum of the ranges of entries."""
    lower, upper = (end.gather(1, positions - 1) for end in known.flat(node))
    return (upper - lower).sum()


def _rise_entries(
    network: Prepared, node: Node, positions: Tensor, regions: Sequence[Region], known: Known, ascent: Ascent
) -> None:
    """Optimise both bounds of entries of a node, at positive positions, and enter them."""
    if positions.shape[1]:
        both = torch.cat([positions, -positions], dim=1)
        lower, _ = raised(network, node, both, regions, known, ascent, inner=True)
        known.bounds[node] = entered(node, known.flat(node), both, lower)


def raised(
    network: Prepared,
    start: Node,
    rows: Rows | Tensor,
    regions: Sequence[Region],
    known: Known,
    ascent: Ascent,
    goal: Tensor | float = torch.inf,
    first: Parameters | None = None,
    inner: bool = False,
) -> tuple[Tensor, Parameters]:
    """The best lower bounds of one pass, (batch, count), and the parameters that gave them.

    Args:
        first: parameters to start from, too: tighter bounds of inner nodes can have worse defaults.
        inner: the parameters are not wanted.
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
    schedule = ExponentialLR(adam, ascent.decay)
    start_bound, gains = best, [0.0]
    for step in range(ascent.iterations):
        if bool((best > goal).all()) or ascent.is_over() or (inner and ascent.thrifty and _has_settled(gains)):
            break
        with torch.enable_grad():
            lower = lower_bounds(network, start, rows, regions, known, free=free).lower
            loss = -torch.minimum(lower, goal).sum()
        with torch.no_grad():
            better = lower > best
            best = torch.where(better, lower, best)
            if inner:
                gains.append(float((best - start_bound).nan_to_num(0.0, 0.0, 0.0).sum()))
            else:
                best_free = _better(better, free, best_free)
        if step + 1 < ascent.iterations:
            step_down(loss, adam, schedule, leaves)
    return best, best_free


def step_down(loss: Tensor, adam: torch.optim.Adam, schedule: ExponentialLR, leaves: Sequence[Tensor]) -> None:
    """One step of the optimiser, after which the free parameters lie in [0, 1] again."""
    adam.zero_grad()
    loss.backward()
    adam.step()
    schedule.step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.clamp_(0, 1)


def _has_settled(gains: list[float]) -> bool:
    """Whether the last steps brought little of what all of them did."""
    return len(gains) > WINDOW and gains[-1] - gains[-1 - WINDOW] <= SETTLED * gains[-1]


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
