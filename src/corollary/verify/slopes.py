"""Optimised linear bounds: the free parameters of every relaxation by gradient ascent on the bound itself.

Every value of a parameter in [0, 1] gives a sound bound, so whatever the optimiser does, each step's bounds hold; the
best of all steps is returned.

Source: Xu et al. 2021, arXiv 2011.13824 (alpha); Wang et al. 2021, arXiv 2103.06624 (beta).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corollary.graph import Node
from corollary.verify.intervals import Interval
from corollary.verify.known import Known
from corollary.verify.layout import Rows
from corollary.verify.linear_bounds import lower_bounds
from corollary.verify.prepared import Prepared
from corollary.verify.sets import Region
from corollary.verify.sweep import Sweep, met, resweep

Parameters = dict[Node, tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Optimised:
    """The best bounds found.

    Args:
        lower: (batch, count).
        bounds: of every node that relaxations read, met over all steps.
        free: the parameters of the pass from the output that gave `lower`.
    """

    lower: Tensor
    bounds: dict[Node, Interval]
    free: dict[Node, tuple[Tensor | None, Tensor | None]]


def optimised(
    network: Prepared,
    start: Node,
    rows: Rows,
    regions: Sequence[Region],
    found: Sweep,
    *,
    iterations: int = 20,
    learning_rate: float = 0.25,
    decay: float = 0.98,
    goal: Tensor | float = torch.inf,
    deadline: float | None = None,
) -> Optimised:
    """Lower bounds of `rows`, all parameters optimised: those of the passes that bound inner nodes, too.

    Args:
        found: bounds by default parameters; where they came from no backward pass, they stay.
        goal: stop once every bound is above it; a number, or one for each row. Bounds above it are not raised further.
        deadline: by `time.monotonic`; the best so far is returned then.
    """
    batch = len(regions[0])
    starts: dict[Node | None, Parameters] = {}
    for node, positions in found.positions.items():
        starts[node] = {}
        lower_bounds(network, node, positions, regions, found.known, collect=starts[node])
    starts[None] = {}
    best = lower_bounds(network, start, rows, regions, found.known, collect=starts[None]).lower.detach()
    for key, free in starts.items():
        starts[key] = {node: (_leaf(low), _leaf(high)) for node, (low, high) in free.items()}
    leaves = [part for free in starts.values() for pair in free.values() for part in pair if part is not None]
    best_bounds = dict(found.known.bounds)
    best_free = {node: (_copy(low), _copy(high)) for node, (low, high) in starts[None].items()}
    if not leaves or iterations == 0 or bool((best > goal).all()):
        return Optimised(best, best_bounds, best_free)
    adam = torch.optim.Adam(leaves, lr=learning_rate, foreach=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(adam, decay)
    inner = {node: free for node, free in starts.items() if node is not None}
    for step in range(iterations):
        with torch.enable_grad():
            known = resweep(network, regions, found, inner)
            lower = lower_bounds(network, start, rows, regions, known, free=starts[None]).lower
            loss = -torch.minimum(lower, torch.as_tensor(goal, dtype=lower.dtype, device=lower.device)).sum()
        with torch.no_grad():
            better = lower > best
            best = torch.where(better, lower, best)
            for node, value in known.bounds.items():
                best_bounds[node] = met(best_bounds[node], Interval(value.lower.detach(), value.upper.detach()))
            for node, pair in starts[None].items():
                low, high = (_chosen(better, new, old) for new, old in zip(pair, best_free[node], strict=True))
                best_free[node] = low, high
        if bool((best > goal).all()) or (deadline is not None and time.monotonic() > deadline):
            break
        if step + 1 < iterations:
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
            with torch.no_grad():
                for leaf in leaves:
                    leaf.clamp_(0, 1)
    last = lower_bounds(
        network, start, rows, regions, Known(network, batch, best_bounds), free=best_free
    ).lower.detach()
    return Optimised(torch.maximum(best, last), best_bounds, best_free)


def _leaf(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.detach().clone().requires_grad_()


def _copy(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.detach().clone()


def _chosen(better: Tensor, new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """The parameters of the rows that got better, (batch, count); those that rows share, where all of them did."""
    if new is None or old is None:
        return old
    if new.shape[1] != better.shape[1]:
        better = better.all(1, keepdim=True)
    return torch.where(better[..., None], new.detach(), old)
