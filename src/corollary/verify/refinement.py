"""Inner bounds by branch and bound: which side of its kink a neuron lies on, proved by splitting neurons before it.

The bound of an output stands on the bounds of the neurons before it, and those of deep layers are the loosest part of
it: most neurons there that linear bounds leave open lie on one side of their kink on the whole region. Each such claim
is a property of a smaller network, the part before the neuron, and far easier than the property itself. Once proved
the neuron is affine, and every layer behind it is bounded again.

Source: inner bounds refined by complete methods, layer by layer: Singh et al. 2019, "Boosting robustness certification
of neural networks" (there by integer programs).
"""

import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from corollary.graph import Node, evaluate
from corollary.graph.ops import Elementwise, Linear
from corollary.verify.branch_and_bound import Branching, Search
from corollary.verify.domain_bounds import Root
from corollary.verify.known import Known, interval_of
from corollary.verify.layout import Rows, pack, sample_shape, sample_size
from corollary.verify.linear_bounds import Bounded
from corollary.verify.prepared import Prepared
from corollary.verify.queries import Queries
from corollary.verify.search import Margin
from corollary.verify.sets import Ball, Region
from corollary.verify.slopes import Ascent, optimised, sharper
from corollary.verify.sweep import Sweep, open_entries, signed_positions

BRANCHING = Branching(candidates=1, iterations=4, multiplier_rate=0.2)
"""How neurons are split for neurons: there are many claims, each of little depth."""
STEPS = 12
"""Steps along the gradient that look for the values which an entry takes."""
MOST = 256
"""Entries of a node that are refined: those of the highest relaxations."""
TOLERANCE = 0.05
"""An end of an entry that lies on both sides is claimed up to this part of the width from the value that was met."""


@dataclass(frozen=True, eq=False)
class Sides(Queries):
    """Claims about single entries of a node, each a disjunct of one row.

    Args: `rows`: signed positions, (1, r), i + 1 where entry i is claimed to lie above a goal, -(i + 1) for below;
        `offsets`: the goal, times the sign of the position.
    """

    def functions(self, output: Node, index: Tensor) -> Rows | Tensor:
        """The positions, as `lower_bounds` takes them; where it would keep to windows of a feature map, whole rows."""
        positions = self.rows[0][index]
        if isinstance(output.op, Linear) and len(output.shape) == 2:
            return positions
        rows = torch.zeros(*index.shape, sample_size(output), dtype=self.offsets.dtype, device=index.device)
        rows.scatter_(2, positions.abs()[..., None] - 1, positions.sign()[..., None].to(rows.dtype))
        return Rows(pack(output, rows.reshape(*index.shape, *sample_shape(output))), *index.shape)

    @classmethod
    def claimed(cls, region: Region, positions: Tensor, offsets: Tensor) -> "Sides":
        """Claims about one region, positions and offsets (r,)."""
        numbers = torch.arange(len(positions), device=positions.device)
        return cls(
            region, positions[None], offsets[None], numbers[None], torch.ones_like(numbers, dtype=torch.bool)[None]
        )


class SideSearch(Search):
    """A search that serves its claims in turn, the worst domain of each first, so that easy ones end early."""

    def __init__(self, network: Prepared, query: Sides, root: Root, margin: Margin, deadline: float, how: Branching):
        super().__init__(network, query, root, margin, deadline, how, None, None)
        self.spent = torch.zeros(query.open.shape[1], dtype=torch.long, device=network.device)
        self.given_up = torch.zeros_like(self.spent, dtype=torch.bool)

    def run_until(self, deadline: float) -> None:
        """Go on until all claims are decided or the time is up."""
        self.deadline = self.bounder.deadline = deadline
        if not self.count:
            self.begin()
        while not self.is_over() and not bool(self.given_up[self.pool.held("disjunct")].all()):
            self.advance()

    def least(self) -> Tensor:
        """The least bound of each claim, zero where it is proved."""
        least = torch.zeros(len(self.spent), dtype=self.network.dtype, device=self.network.device)
        return least.scatter_reduce(0, self.pool.held("disjunct"), self.pool.held("priority"), "amin")

    def taken(self) -> dict[str, Tensor]:
        """The next domains of all claims; a claim with a domain that has nothing left to split is given up."""
        disjunct, priority = self.pool.held("disjunct"), self.pool.held("priority")
        by_priority = priority.argsort()
        grouped = by_priority[disjunct[by_priority].argsort(stable=True)]
        counts = torch.bincount(disjunct, minlength=len(self.spent))
        rank = torch.empty_like(disjunct)
        rank[grouped] = torch.arange(len(disjunct), device=rank.device) - (counts.cumsum(0) - counts)[disjunct[grouped]]
        served = (rank + self.spent[disjunct]).double()
        taken = self.pool.take(self.batch_size, torch.where(self.given_up[disjunct], torch.inf, served))
        self.spent += torch.bincount(taken["disjunct"], minlength=len(self.spent))
        self.given_up[taken["disjunct"][taken["split"][:, 0] < 0]] = True
        return taken

    def unsafe(self, domain: dict[str, Tensor], bound: Bounded) -> None:
        """No points are looked for."""

    def settled(self, domain: dict[str, Tensor]) -> dict[str, Tensor]:
        """No linear programs for claims that are given up."""
        return domain


@dataclass(eq=False)
class _Claims:
    """Ends of single entries of a node that are claimed to lie at goals, and the search that proves them.

    Args:
        side: 0 for lower ends, 1 for upper ones; `entry`: of the node; `goal`: a value, for each of the claims, (r,).
    """

    side: Tensor
    entry: Tensor
    goal: Tensor
    search: SideSearch

    def met_with(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds (entries,) met with what is proved."""
        first = self.side == 0
        end = self.goal + torch.where(first, 1, -1) * self.search.least()
        lower = lower.scatter_reduce(0, self.entry[first], end[first], "amax")
        upper = upper.scatter_reduce(0, self.entry[~first], end[~first], "amin")
        return torch.minimum(lower, upper), torch.maximum(lower, upper)  # they cross by a rounding error only


@dataclass(eq=False)
class Refinement:
    """Inner bounds of one region, to be tightened in several turns.

    Args:
        nodes: whose bounds came from backward passes, in the order of the graph.
        ascent: of the bounds of nodes behind those that became tighter.
        how: neurons are split for claims.
        goals: of the ends of all entries of a node, (2, entries); infinite where nothing is claimed, or no longer.
        claims: those that a search is under way for, while nothing before the node has changed.
        domains: bounded so far.
    """

    network: Prepared
    region: Region
    nodes: Collection[Node]
    margin: Margin
    ascent: Ascent
    how: Branching = BRANCHING
    goals: dict[Node, Tensor] = field(default_factory=dict)
    claims: dict[Node, _Claims] = field(default_factory=dict)
    domains: int = 0

    def is_spent(self, known: Known) -> bool:
        """Whether nothing is left to refine."""
        return not any(bool(self._claimable(node, known).any()) for node in self.nodes)

    def refined(self, known: Known, seconds: float) -> Known:
        """Tightened bounds of all nodes, after about so many seconds of search in equal shares."""
        deadline = time.monotonic() + seconds
        nodes = list(self.nodes)
        changed = False
        for i, node in enumerate(nodes):
            if changed and not self.ascent.is_over():
                open_ = signed_positions(open_entries(self.network, node, known))
                known = sharper(self.network, [self.region], Sweep(known, {node: open_}), self.ascent)
                self.claims.pop(node, None)
            now = time.monotonic()
            if now < deadline and bool(self._claimable(node, known).any()):
                before = known.flat(node)
                known = self._searched(node, known, now + (deadline - now) / (len(nodes) - i))
                changed |= any(not torch.equal(a, b) for a, b in zip(before, known.flat(node), strict=True))
        return known

    def _claimable(self, node: Node, known: Known) -> Tensor:
        """The ends that may be moved to their goals, (2, entries)."""
        needed = open_entries(self.network, node, known)[0]
        if only_kink(self.network, node) is None or not bool(needed.any()):
            return torch.zeros_like(needed)
        if node not in self.goals:
            return torch.stack([needed, needed])
        (lower,), (upper,) = known.flat(node)
        return torch.stack([lower < self.goals[node][0], upper > self.goals[node][1]]) & needed

    def _goals(self, node: Node, kink: float, known: Known, deadline: float) -> Tensor:
        """Where the ends of entries may lie, by the values that gradient steps reach: at best the kink."""
        (lower,), (upper,) = known.flat(node)
        height = torch.where(open_entries(self.network, node, known)[0], (upper - kink) * (kink - lower), -torch.inf)
        entries = (height / (upper - lower)).topk(min(MOST, int((height > 0).sum()))).indices
        low, high = reached(self.network.until(node), self.region, entries, deadline)
        slack = TOLERANCE * (upper - lower)[entries]
        goals = torch.stack([torch.full_like(lower, -torch.inf), torch.full_like(upper, torch.inf)])
        goals[0, entries] = torch.where(low > kink, kink, torch.where(high < kink, -torch.inf, low - slack))
        goals[1, entries] = torch.where(high < kink, kink, torch.where(low > kink, torch.inf, high + slack))
        return goals

    def _searched(self, node: Node, known: Known, deadline: float) -> Known:
        """The bounds with those of one node tightened by a search until the deadline."""
        kink = only_kink(self.network, node)
        if node not in self.goals and kink is not None:
            self.goals[node] = self._goals(node, kink, known, deadline)
        if not bool(self._claimable(node, known).any()):
            return known
        if node not in self.claims:
            self.claims[node] = self._claimed(node, known, deadline)
        claims = self.claims[node]
        search, before = claims.search, claims.search.count
        search.run_until(deadline)
        self.domains += search.count - before
        for side, nothing in enumerate((-torch.inf, torch.inf)):
            self.goals[node][side, claims.entry[search.given_up & (claims.side == side)]] = nothing
        (lower,), (upper,) = known.flat(node)
        low, high = claims.met_with(lower, upper)
        return Known(self.network, 1, {**known.bounds, node: interval_of(node, low[None], high[None])})

    def _claimed(self, node: Node, known: Known, deadline: float) -> _Claims:
        side, entry = self._claimable(node, known).nonzero().unbind(1)
        goal, sign = self.goals[node][side, entry], 1 - 2 * side
        part = self.network.until(node)
        before = Known(part, 1, {source: known.bounds[source] for source in part.bounded})
        query = Sides.claimed(self.region, sign * (entry + 1), sign * goal)
        ascent = replace(self.ascent, deadline=deadline)
        rows = query.functions(node, torch.arange(len(side), device=side.device)[None])
        best = optimised(part, node, rows, [self.region], Sweep(before, {}), ascent=ascent, goal=query.offsets)
        root = Root(before, best.free, best.lower)
        return _Claims(side, entry, goal, SideSearch(part, query, root, self.margin, deadline, self.how))


def only_kink(network: Prepared, node: Node) -> float | None:
    """The point on either side of which all readers of a node are affine, if there is one."""
    kinks: set[float] = set()
    for reader in network.nonlinear:
        if node in reader.inputs:
            if not isinstance(reader.op, Elementwise) or not reader.op.kinks:
                return None
            kinks.update(reader.op.kinks)
    return kinks.pop() if len(kinks) == 1 else None


def reached(part: Prepared, region: Region, entries: Tensor, deadline: float) -> tuple[Tensor, Tensor]:
    """The least and the largest values of entries of the output that gradient steps reach in a region."""
    box = region.box() if isinstance(region, Ball) else region
    twice = torch.cat([entries, entries])
    sign = torch.ones_like(twice)
    sign[: len(entries)] = -1
    x = region.center.expand(len(twice), *region.center.shape[1:])
    best = torch.full((len(twice),), -torch.inf, dtype=part.dtype, device=part.device)
    for step in range(STEPS):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            value = evaluate(part.graph, x).flatten(1).gather(1, twice[:, None])[:, 0] * sign
            (slope,) = torch.autograd.grad(value.sum(), x)
        best = torch.maximum(best, value.detach())
        if time.monotonic() > deadline:
            break
        x = torch.minimum(torch.maximum(x + 2 * box.radius * 0.8**step * slope.sign(), box.lower), box.upper)
    return -best[: len(entries)], best[len(entries) :]
