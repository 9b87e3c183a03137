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
from corollary.graph.ops import Elementwise
from corollary.verify.branch_and_bound import Branching, Search
from corollary.verify.domain_bounds import Root
from corollary.verify.known import Known, interval_of
from corollary.verify.linear_bounds import Bounded
from corollary.verify.prepared import Prepared
from corollary.verify.queries import Queries
from corollary.verify.search import Margin
from corollary.verify.sets import Ball, Region
from corollary.verify.slopes import Ascent, optimised, sharper
from corollary.verify.sweep import Sweep, open_entries

BRANCHING = Branching(candidates=1, iterations=4, multiplier_rate=0.2)
"""How neurons are split for neurons: there are many claims, each of little depth."""
STEPS = 12
"""Steps down the gradient that look for a point on the other side of a kink."""


@dataclass(frozen=True, eq=False)
class Sides(Queries):
    """Claims about single entries of a node, each a disjunct: i + 1 for entry i above its kink, -(i + 1) for below.

    Args: `rows`: these positions, (1, r); `offsets`: the kink, times the sign of the position.
    """

    def functions(self, output: Node, index: Tensor) -> Tensor:
        """The positions, as `lower_bounds` takes them."""
        return self.rows[0][index]

    @classmethod
    def claimed(cls, region: Region, positions: Tensor, offsets: Tensor) -> "Sides":
        """Claims on one region, positions and offsets (r,)."""
        numbers = torch.arange(len(positions), device=positions.device)
        return cls(region, positions[None], offsets[None], numbers[None], torch.ones_like(numbers, dtype=torch.bool)[None])


class SideSearch(Search):
    """A search that serves its claims in turn, the worst domain of each first, so that easy ones end early."""

    def __init__(self, network: Prepared, query: Sides, root: Root, margin: Margin, deadline: float):
        super().__init__(network, query, root, margin, deadline, BRANCHING, None, None)
        self.spent = torch.zeros(query.open.shape[1], dtype=torch.long, device=network.device)
        self.given_up = torch.zeros_like(self.spent, dtype=torch.bool)

    def run_out(self) -> Tensor:
        """The least bound of each claim, zero where it is proved, once all are decided or the time is up."""
        self.begin()
        while not self.is_over() and not bool(self.given_up[self.pool.held("disjunct")].all()):
            self.advance()
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
        """No linear programs for claims given up."""
        return domain


@dataclass(eq=False)
class Refinement:
    """Inner bounds of one region, to be tightened in turns of growing length.

    Args:
        nodes: whose bounds came from backward passes, in the order of the graph.
        hopeless: entries, (entries,), that lie on both sides of their kink, or whose splits are used up.
    """

    network: Prepared
    region: Region
    nodes: Collection[Node]
    margin: Margin
    ascent: Ascent
    hopeless: dict[Node, Tensor] = field(default_factory=dict)
    domains: int = 0

    def open_claims(self, node: Node, known: Known) -> Tensor:
        """The entries whose side is open and may be proved, (r,)."""
        if only_kink(self.network, node) is None:
            return torch.zeros(0, dtype=torch.long, device=self.network.device)
        needed = open_entries(self.network, node, known)[0]
        return (needed & ~self.hopeless.get(node, torch.zeros_like(needed))).nonzero()[:, 0]

    def is_spent(self, known: Known) -> bool:
        """Whether nothing is left to refine."""
        return not any(len(self.open_claims(node, known)) for node in self.nodes)

    def refined(self, known: Known, seconds: float) -> Known:
        """Tightened bounds of all nodes, after about so many seconds of search in equal shares."""
        tight, changed = Known(self.network, 1, known.bounds), False
        deadline = time.monotonic() + seconds
        nodes = list(self.nodes)
        for i, node in enumerate(nodes):
            if changed and not self.ascent.is_over():
                tight = sharper(self.network, [self.region], Sweep(tight, {node: self._any}), self.ascent)
            start = time.monotonic()
            share = max(0.0, deadline - start) / (len(nodes) - i)
            ends = self._sided(node, tight, start + share) if share > 0 else None
            if ends is not None:
                tight, changed = Known(self.network, 1, {**tight.bounds, node: interval_of(node, *ends)}), True
        return tight

    @property
    def _any(self) -> Tensor:
        return torch.zeros(1, 0, dtype=torch.long)

    def _sided(self, node: Node, known: Known, deadline: float) -> tuple[Tensor, Tensor] | None:
        """The bounds of a node, (1, entries) each, after a search for the sides of its open entries."""
        entries = self.open_claims(node, known)
        if not len(entries):
            return None
        kink = only_kink(self.network, node)
        part = self.network.until(node)
        before = Known(part, 1, {source: known.bounds[source] for source in part.bounded})
        at_center = evaluate(part.graph, self.region.center).flatten()[entries]
        sign = torch.where(at_center > kink, 1, -1)
        one_sided = ~passing(part, self.region, entries, sign, kink)
        self._give_up(node, known, entries[~one_sided])
        entries, sign = entries[one_sided], sign[one_sided]
        if not len(entries):
            return None
        query = Sides.claimed(self.region, sign * (entries + 1), (sign * kink).to(self.network.dtype))
        ascent = replace(self.ascent, deadline=deadline)
        best = optimised(part, node, query.rows, [self.region], Sweep(before, {}), ascent=ascent, goal=query.offsets)
        search = SideSearch(part, query, Root(before, best.free, best.lower), self.margin, deadline)
        least = search.run_out()
        self.domains += search.count
        print(node.name,'targets',len(entries),'met both',int((~one_sided).sum()),'given up',int(search.given_up.sum()),'proved',int((least>=0).sum()),'domains',search.count)
        self._give_up(node, known, entries[search.given_up])
        lower, upper = (end.clone() for end in known.flat(node))
        above, end = sign > 0, kink + sign * least
        lower[0, entries[above]] = torch.maximum(lower[0, entries[above]], end[above])
        upper[0, entries[~above]] = torch.minimum(upper[0, entries[~above]], end[~above])
        return lower, upper

    def _give_up(self, node: Node, known: Known, entries: Tensor) -> None:
        held = self.hopeless.setdefault(node, torch.zeros_like(known.flat(node)[0][0], dtype=torch.bool))
        held[entries] = True


def only_kink(network: Prepared, node: Node) -> float | None:
    """The point on either side of which all readers of a node are affine, if there is one."""
    kinks: set[float] = set()
    for reader in network.nonlinear:
        if node in reader.inputs:
            if not isinstance(reader.op, Elementwise) or not reader.op.kinks:
                return None
            kinks.update(reader.op.kinks)
    return kinks.pop() if len(kinks) == 1 else None


def passing(part: Prepared, region: Region, entries: Tensor, sign: Tensor, kink: float) -> Tensor:
    """Which entries of the output leave their side of the kink somewhere in a region, as far as gradient steps find."""
    box = region.box() if isinstance(region, Ball) else region
    x = region.center.expand(len(entries), *region.center.shape[1:])
    met = torch.zeros(len(entries), dtype=torch.bool, device=entries.device)
    for step in range(STEPS):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            value = evaluate(part.graph, x).flatten(1).gather(1, entries[:, None])[:, 0]
            (slope,) = torch.autograd.grad(((value - kink) * sign).sum(), x)
        met |= (value - kink) * sign < 0
        x = torch.minimum(torch.maximum(x - 2 * box.radius * 0.8**step * slope.sign(), box.lower), box.upper)
    return met
