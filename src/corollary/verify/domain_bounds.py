"""Bounds of the domains of a branch and bound search: optimised slopes, and a multiplier for each split.

Source: Wang et al. 2021, arXiv 2103.06624 (beta-CROWN); Shi et al. 2025, arXiv 2405.21063 (GenBaB).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR

from corollary.graph import Node
from corollary.verify.branching import Neurons
from corollary.verify.domains import constraints
from corollary.verify.jumps import Cut
from corollary.verify.known import Known
from corollary.verify.linear_bounds import Bounded, Free, lower_bounds
from corollary.verify.prepared import Prepared
from corollary.verify.queries import Queries
from corollary.verify.search import Margin
from corollary.verify.sets import Ball, Box, Region
from corollary.verify.slopes import step_down


@dataclass(frozen=True, eq=False)
class Root:
    """What the bounds of one region gave: from where the search starts.

    Args:
        known: bounds of all nodes, for one region.
        free: parameters of the pass from the output, for all rows of the query (1, rows, entries).
        lower: of the rows, (1, rows).
        cuts: constraints that the bounds of nodes stand on.
    """

    known: Known
    free: dict[Node, tuple[Tensor | None, Tensor | None]]
    lower: Tensor
    cuts: tuple[Cut, ...] = ()


@dataclass(frozen=True)
class Steps:
    """Steps of the optimiser for each domain, the rates of slopes and multipliers, and their factor a step."""

    iterations: int
    slope_rate: float
    multiplier_rate: float
    decay: float


class Bounder:
    """Bounds of the rows of one query on domains: a region with some neurons held to a part of their range.

    Args:
        query: of one region.
        deadline: by `time.monotonic`.
    """

    def __init__(
        self,
        network: Prepared,
        neurons: Neurons,
        query: Queries,
        root: Root,
        margin: Margin,
        steps: Steps,
        deadline: float,
    ):
        self.network, self.neurons, self.query, self.root, self.margin = network, neurons, query, root, margin
        self.steps, self.deadline = steps, deadline
        self.output = network.graph.outputs[0]
        self.lower, self.upper = neurons.ends(root.known)
        upstream = network.upstream(self.output)
        self.kept = frozenset(node for node in network.nonlinear if node in upstream)
        self.parts = [
            (node, side)
            for node in network.nonlinear
            for side, part in enumerate(root.known.defaults(node))
            if part is not None and node in upstream
        ]
        self.names = [f"free{i}" for i in range(len(self.parts))]

    def start(self) -> dict[str, Tensor]:
        """One domain for each open disjunct."""
        disjunct = self.query.open[0].nonzero()[:, 0]
        count = len(disjunct)
        rows = self.rows_of(disjunct)
        dtype = self.network.dtype
        cuts = [(self.neurons.first[cut.node] + cut.entry, cut.sign, cut.point) for cut in self.root.cuts]
        entries, signs, points = zip(*cuts or [(0, 0.0, 0.0)], strict=True)  # a sign of 0 stands for no constraint
        domain = {
            "disjunct": disjunct,
            "entry": torch.tensor(entries, device=self.network.device).expand(count, -1),
            "sign": torch.tensor(signs, dtype=dtype, device=self.network.device).expand(count, -1),
            "point": torch.tensor(points, dtype=dtype, device=self.network.device).expand(count, -1),
            "multiplier": torch.zeros(*rows.shape, len(signs), dtype=dtype, device=self.network.device),
            "settled": torch.zeros(count, dtype=torch.bool, device=self.network.device),
        }
        for i, (node, side) in enumerate(self.parts):
            part = self.root.free[node][side]
            assert part is not None
            domain[f"free{i}"] = part[0][rows] if part.shape[1] > 1 else part[0].expand(*rows.shape, part.shape[2])
        return domain

    def rows_of(self, disjunct: Tensor) -> Tensor:
        """The rows of each disjunct, (domains, most rows of any); short ones repeat their first."""
        member = self.query.disjunct[0][None] == disjunct[:, None]
        order = member.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        most = int(torch.bincount(self.query.disjunct[0]).max())
        counts = member.sum(1, keepdim=True)
        place = torch.arange(most, device=disjunct.device)[None].expand(len(disjunct), most)
        return order.gather(1, torch.where(place < counts, place, 0))

    # ------------------------------------------------------------------------------------------------- bounding

    def known(self, domain: dict[str, Tensor]) -> tuple[Known, Tensor]:
        """Bounds of the neurons in each domain; and which domains are empty."""
        count = len(domain["disjunct"])
        lower, upper = self.lower.expand(count, -1).clone(), self.upper.expand(count, -1).clone()
        below = torch.where(domain["sign"] > 0, domain["point"], torch.inf)
        above = torch.where(domain["sign"] < 0, domain["point"], -torch.inf)
        upper.scatter_reduce_(1, domain["entry"], below, "amin")
        lower.scatter_reduce_(1, domain["entry"], above, "amax")
        empty = (lower > upper).any(1)
        return self.neurons.known(torch.minimum(lower, upper), upper), empty

    def carried(
        self, domain: dict[str, Tensor], known: Known, free: Free, multiplier: Tensor | None, keep: bool = False
    ) -> Bounded:
        """One pass for the rows of each domain, (domains, rows), less its margin; `keep` its coefficients."""
        rows = self.rows_of(domain["disjunct"])
        splits = {} if multiplier is None else constraints(domain, self.neurons, multiplier)
        region = self.region(len(rows))
        start = self.query.functions(self.output, rows)
        bound = lower_bounds(
            self.network, self.output, start, [region], known, free=free, splits=splits,
            keep=self.kept if keep else (),
        )  # fmt: skip
        bound.lower = self.margin.below(bound, self.query.offsets[0][rows])
        return bound

    def region(self, count: int) -> Region:
        """The query's region, so many times."""
        region = self.query.region
        if isinstance(region, Box):
            return Box.trusted(
                region.lower.expand(count, *region.lower.shape[1:]), region.upper.expand(count, *region.upper.shape[1:])
            )
        return Ball(region.center.expand(count, *region.center.shape[1:]), region.radii.expand(count), region.norm)

    def free_of(self, domain: dict[str, Tensor]) -> Free:
        """The free parameters that domains hold."""
        return self.free([domain[name] for name in self.names])

    def free(self, tensors: Sequence[Tensor]) -> Free:
        """Free parameters by node, from those of `parts`."""
        pairs: dict[Node, list[Tensor | None]] = {}
        for (node, side), tensor in zip(self.parts, tensors, strict=True):
            pairs.setdefault(node, [None, None])[side] = tensor
        return {node: (pair[0], pair[1]) for node, pair in pairs.items()}

    def bound(self, domain: dict[str, Tensor], slower: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """Lower bounds of the rows of each domain, (domains, rows), and the domains with their best parameters.

        Args: `slower`: a factor on the rates.
        """
        known, empty = self.known(domain)
        names = self.names
        best = self.carried(domain, known, self.free_of(domain), domain["multiplier"]).lower
        best = torch.where(empty[:, None], torch.inf, best)
        open_ = ~(best.amax(1) > 0)
        if not bool(open_.any()) or self.steps.iterations == 0:
            return best, domain
        index = open_.nonzero()[:, 0]
        part = {name: values[index] for name, values in domain.items()}
        known = known.at(index)
        leaves = [part[name].clone().requires_grad_() for name in names]
        multiplier = part["multiplier"].clone().requires_grad_()
        adam = torch.optim.Adam(
            [
                {"params": leaves, "lr": slower * self.steps.slope_rate},
                {"params": [multiplier], "lr": slower * self.steps.multiplier_rate},
            ],
            foreach=True,
        )
        schedule = ExponentialLR(adam, self.steps.decay)
        for step in range(self.steps.iterations):
            with torch.enable_grad():
                lower = self.carried(part, known, self.free(leaves), multiplier).lower
                loss = -lower.sum()
            with torch.no_grad():
                better = lower.amax(1) > best[index].amax(1)
                best[index] = torch.maximum(best[index], lower)
                for name, leaf in [*zip(names, leaves, strict=True), ("multiplier", multiplier)]:
                    part[name][better] = leaf[better].detach()
                if bool((best[index].amax(1) > 0).all()) or time.monotonic() > self.deadline:
                    break
            if step + 1 < self.steps.iterations:
                step_down(loss, adam, schedule, leaves)
                with torch.no_grad():
                    multiplier.clamp_(min=0)
        for name in (*names, "multiplier"):
            domain[name] = domain[name].clone()
            domain[name][index] = part[name]
        return best, domain
