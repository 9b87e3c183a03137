"""Branch and bound on neurons of any nonlinearity.

A domain is a region with some neurons held to a part of their range. Splitting one gives two domains whose relaxations
are tighter at that neuron; the split itself enters the bound with a multiplier.

Source: Shi et al. 2025, arXiv 2405.21063 (GenBaB); Wang et al. 2021, arXiv 2103.06624 (beta-CROWN).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from corollary.graph import Node, evaluate
from corollary.verify.branching import (
    InputLines,
    Neurons,
    PointRule,
    Rule,
    best_of_ranks,
    constant_scores,
    gap_scores,
    input_lines,
    shortcut_scores,
    splittable,
    table_points,
)
from corollary.verify.domains import Pool, constraints, halved, together
from corollary.verify.jumps import Cut
from corollary.verify.known import Known
from corollary.verify.layout import Rows, pack, sample_shape
from corollary.verify.leaves import Constraints, multipliers_and_point
from corollary.verify.limit import OutOfTime
from corollary.verify.linear_bounds import Bounded, Free, lower_bounds
from corollary.verify.prepared import Prepared
from corollary.verify.queries import Queries
from corollary.verify.search import Margin, Outcome
from corollary.verify.sets import Ball, Box, Region

PATIENCE = 20
"""Rounds in which domains with nothing to split are bounded again before the search gives up."""


TOGETHER = 2**17
"""Domains are split so many together that their neurons are about so many."""


@dataclass(frozen=True)
class Branching:
    """How domains are split and bounded.

    Args:
        rule: the score that orders neurons: "bbps", "babsr" (constant terms only), "gap" (area of the relaxations),
            "mixed" (the best of bbps and of gap), "random"; "auto": "babsr" where every nonlinearity is piecewise
            linear, "mixed" elsewhere.
        candidates: neurons whose children are bounded once before the best is split; 1 takes the score's word.
        batch: domains split together; by the number of neurons where None.
        iterations: steps of the optimiser for each child.
        slope_rate, multiplier_rate: its learning rates; `decay` a step.
        points: where a neuron is split: `table_points` or `middle_points`.
        most: domains after which the search stops; None: no limit.
    """

    rule: Rule | Literal["auto"] = "auto"
    candidates: int = 8
    batch: int | None = None
    iterations: int = 6
    slope_rate: float = 0.2
    multiplier_rate: float = 0.7
    decay: float = 0.98
    points: PointRule = table_points
    most: int | None = None


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


def split_neurons(
    network: Prepared,
    query: Queries,
    root: Root,
    margin: Margin,
    *,
    deadline: float,
    branching: Branching | None = None,
    generator: torch.Generator | None = None,
    confirm: Callable[[Tensor], bool] | None = None,
) -> Outcome:
    """Prove every open disjunct of one query, or find a point that is unsafe, by splitting neurons.

    Args:
        query: of one region.
        deadline: by `time.monotonic`.
        generator: for the rule "random".
        confirm: whether a point (1, *input) that is unsafe by the graph's arithmetic counts; others are passed over.
    """
    return _Search(network, query, root, margin, deadline, branching or Branching(), generator, confirm).run()


class _Search:
    def __init__(
        self,
        network: Prepared,
        query: Queries,
        root: Root,
        margin: Margin,
        deadline: float,
        branching: Branching,
        generator: torch.Generator | None,
        confirm: Callable[[Tensor], bool] | None,
    ):
        self.network, self.query, self.root, self.margin = network, query, root, margin
        self.deadline, self.how, self.generator, self.confirm = deadline, branching, generator, confirm
        self.neurons = Neurons(network)
        self.output = network.graph.outputs[0]
        self.region: Region = query.region
        self.lower, self.upper = self.neurons.ends(root.known)
        self.lines: InputLines | None = None
        self.rule = branching.rule
        if branching.rule == "auto":
            self.rule = "mixed" if bool(self.neurons.bends.any()) else "babsr"
        self.only_products = self.neurons.only_products
        if self.rule in ("bbps", "mixed"):
            self.lines = input_lines(network, self.neurons, root.known, self.region)
        self.parts = [
            (node, side)
            for node in network.nonlinear
            for side, part in enumerate(root.known.defaults(node))
            if part is not None and node in network.upstream(self.output)
        ]
        self.kept = frozenset(node for node in network.nonlinear if node in network.upstream(self.output))
        self.starts = torch.tensor(list(self.neurons.first.values()), device=network.device)
        self.batch_size = branching.batch or max(32, min(1024, TOGETHER // max(1, len(self.neurons))))
        self.pool = Pool()
        self.count = 0
        self.idle = 0
        self.met: Tensor | None = None

    def run(self) -> Outcome:
        start = self._start()
        self.count += len(start["disjunct"])
        found = self._enter(start, torch.full((len(start["disjunct"]),), -torch.inf, dtype=self.network.dtype))
        while found is None and len(self.pool):
            if time.monotonic() > self.deadline or (self.how.most is not None and self.count >= self.how.most):
                return Outcome("timeout", None, self.count, self.pool.worst)
            taken = self.pool.take(self.batch_size)
            worst = float(taken["priority"].min())
            try:
                self.idle = self.idle + 1 if bool((taken["split"] < 0).all()) else 0
                if self.idle > PATIENCE:
                    return Outcome("stuck", None, self.count, worst)
                children, parents = self._children(taken)
                self.count += len(children["disjunct"])
                found = self._enter(children, parents) if self.met is None else self.met
            except OutOfTime:
                return Outcome("timeout", None, self.count, worst)
        if found is not None:
            return Outcome("found", found, self.count, self.pool.worst)
        return Outcome("proved", None, self.count, 0.0)

    def _start(self) -> dict[str, Tensor]:
        """One domain for each open disjunct."""
        disjunct = self.query.open[0].nonzero()[:, 0]
        count = len(disjunct)
        rows = self._rows_of(disjunct)
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

    def _rows_of(self, disjunct: Tensor) -> Tensor:
        """The rows of each disjunct, (domains, most rows of any); short ones repeat their first."""
        member = self.query.disjunct[0][None] == disjunct[:, None]
        order = member.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        most = int(torch.bincount(self.query.disjunct[0]).max())
        counts = member.sum(1, keepdim=True)
        place = torch.arange(most, device=disjunct.device)[None].expand(len(disjunct), most)
        return order.gather(1, torch.where(place < counts, place, 0))

    # ------------------------------------------------------------------------------------------------- bounding

    def _known(self, domain: dict[str, Tensor]) -> tuple[Known, Tensor]:
        """Bounds of the neurons in each domain; and which domains are empty."""
        count = len(domain["disjunct"])
        lower, upper = self.lower.expand(count, -1).clone(), self.upper.expand(count, -1).clone()
        below = torch.where(domain["sign"] > 0, domain["point"], torch.inf)
        above = torch.where(domain["sign"] < 0, domain["point"], -torch.inf)
        upper.scatter_reduce_(1, domain["entry"], below, "amin")
        lower.scatter_reduce_(1, domain["entry"], above, "amax")
        empty = (lower > upper).any(1)
        return self.neurons.known(torch.minimum(lower, upper), upper), empty

    def _pass(
        self, domain: dict[str, Tensor], known: Known, free: Free, multiplier: Tensor | None, keep: bool = False
    ) -> Bounded:
        rows = self._rows_of(domain["disjunct"])
        values = self.query.rows[0][rows]
        count, each = rows.shape
        start = Rows(pack(self.output, values.reshape(count, each, *sample_shape(self.output))), count, each)
        splits = {} if multiplier is None else constraints(domain, self.neurons, multiplier)
        region = self._region(count)
        bound = lower_bounds(
            self.network, self.output, start, [region], known, free=free, splits=splits,
            keep=self.kept if keep else (),
        )  # fmt: skip
        bound.lower = self.margin.below(bound, self.query.offsets[0][rows])
        return bound

    def _region(self, count: int) -> Region:
        region = self.region
        if isinstance(region, Box):
            return Box.trusted(
                region.lower.expand(count, *region.lower.shape[1:]), region.upper.expand(count, *region.upper.shape[1:])
            )
        return Ball(region.center.expand(count, *region.center.shape[1:]), region.radii.expand(count), region.norm)

    def _free(self, tensors: Sequence[Tensor]) -> Free:
        pairs: dict[Node, list[Tensor | None]] = {}
        for (node, side), tensor in zip(self.parts, tensors, strict=True):
            pairs.setdefault(node, [None, None])[side] = tensor
        return {node: (pair[0], pair[1]) for node, pair in pairs.items()}

    def _bound(self, domain: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Lower bounds of the rows of each domain, (domains, rows), and the domains with their best parameters."""
        known, empty = self._known(domain)
        names = [f"free{i}" for i in range(len(self.parts))]
        best = self._pass(domain, known, self._free([domain[name] for name in names]), domain["multiplier"]).lower
        best = torch.where(empty[:, None], torch.inf, best)
        open_ = ~(best.amax(1) > 0)
        if not bool(open_.any()) or self.how.iterations == 0:
            return best, domain
        index = open_.nonzero()[:, 0]
        part = {name: values[index] for name, values in domain.items()}
        known = known.at(index)
        leaves = [part[name].clone().requires_grad_() for name in names]
        multiplier = part["multiplier"].clone().requires_grad_()
        slower = 0.9**self.idle  # leaves only converge: the steps become finer
        adam = torch.optim.Adam(
            [
                {"params": leaves, "lr": slower * self.how.slope_rate},
                {"params": [multiplier], "lr": slower * self.how.multiplier_rate},
            ],
            foreach=True,
        )
        schedule = torch.optim.lr_scheduler.ExponentialLR(adam, self.how.decay)
        for step in range(self.how.iterations):
            with torch.enable_grad():
                lower = self._pass(part, known, self._free(leaves), multiplier).lower
                loss = -lower.sum()
            with torch.no_grad():
                better = lower.amax(1) > best[index].amax(1)
                best[index] = torch.maximum(best[index], lower)
                for name, leaf in [*zip(names, leaves, strict=True), ("multiplier", multiplier)]:
                    part[name][better] = leaf[better].detach()
                if bool((best[index].amax(1) > 0).all()) or time.monotonic() > self.deadline:
                    break
            if step + 1 < self.how.iterations:
                adam.zero_grad()
                loss.backward()
                adam.step()
                schedule.step()
                with torch.no_grad():
                    for leaf in leaves:
                        leaf.clamp_(0, 1)
                    multiplier.clamp_(min=0)
        for name in (*names, "multiplier"):
            domain[name] = domain[name].clone()
            domain[name][index] = part[name]
        return best, domain

    def _enter(self, domain: dict[str, Tensor], parents: Tensor) -> Tensor | None:
        """Bound domains, choose the next split of those left open and enter them; or an unsafe point that was met."""
        lower, domain = self._bound(domain)
        best = torch.maximum(lower.amax(1), parents)
        left = (~(best > 0)).nonzero()[:, 0]
        if not len(left):
            return None
        domain = {name: values[left] for name, values in domain.items()}
        known, _ = self._known(domain)
        free = self._free([domain[f"free{i}"] for i in range(len(self.parts))])
        bound = self._pass(domain, known, free, domain["multiplier"], keep=True)
        point = self._unsafe(domain, bound)
        if point is not None and (self.confirm is None or self.confirm(point)):
            return point
        domain["split"], domain["at"] = self._choices(known, free, bound)
        self.pool.put(best[left], **domain)
        return None

    def _unsafe(self, domain: dict[str, Tensor], bound: Bounded) -> Tensor | None:
        """An unsafe point among the inputs where the domains' bounds are least."""
        if not bound.slopes:
            return None
        (slopes,) = bound.slopes.values()
        count = len(domain["disjunct"])
        row = bound.lower.argmax(1)
        slopes = slopes.expand(count, *slopes.shape[1:])[torch.arange(count), row]
        if isinstance(self.region, Box):
            low, high = self.region.lower.flatten(1), self.region.upper.flatten(1)
            flat = torch.where(slopes > 0, low, high)
            points = flat.reshape(count, *self.region.lower.shape[1:])
        else:
            return None
        outputs = evaluate(self.network.graph, points).reshape(1, count, -1)
        several = self.query[torch.zeros(count, dtype=torch.long)]
        hits = several.violated(outputs)[0].nonzero()
        return points[hits[0, 0]][None] if len(hits) else None

    # ------------------------------------------------------------------------------------------------ branching

    def _choices(self, known: Known, free: Free, bound: Bounded) -> tuple[Tensor, Tensor]:
        """The neurons of best score, (domains, k), -1 where none is left to split; and where to split them."""
        lower, upper = self.neurons.ends(known)
        able = splittable(self.neurons, lower, upper)
        points = self.how.points(self.neurons, lower, upper)
        most = min(len(self.neurons), self.how.candidates)
        if self.rule == "random":
            scores = torch.rand(lower.shape, generator=self.generator, dtype=lower.dtype)
        elif self.rule == "babsr":
            scores = constant_scores(self.neurons, known, points, bound.kept, free)
        else:
            scores = gap_scores(self.neurons, known, points, bound.kept, free)
        scores = torch.where(able, scores.nan_to_num(nan=0.0), -torch.inf)
        if self.rule in ("bbps", "mixed") and self.lines is not None:
            found = shortcut_scores(
                self.neurons, known, points, bound.kept, free, self.lines, self._region(len(lower)), scores, bound.lower
            )
            if self.rule == "mixed":
                scores = torch.where(able, best_of_ranks(scores, found), -torch.inf)
            else:
                # Neurons that only products read have no shortcut: they follow, by their gaps.
                by_gap = torch.where(self.only_products, scores + bound.lower.amin(1, keepdim=True), -torch.inf)
                scores = torch.where(able, torch.maximum(found, by_gap), -torch.inf)
        top = scores.topk(most, dim=1)
        chosen = top.indices
        valid = top.values > -torch.inf
        return torch.where(valid, chosen, -1), points.gather(1, chosen)

    def _children(self, domain: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Two domains for each, split at the candidate whose worse child has the best bound."""
        split, at = domain.pop("split"), domain.pop("at")
        parents = domain.pop("priority")
        able = split[:, 0] >= 0
        rest = self._settled({name: values[~able] for name, values in domain.items()})
        rest_parents = parents[~able]
        domain = {name: values[able] for name, values in domain.items()}
        split, at, parents = split[able], at[able], parents[able]
        if not len(split):
            return rest, rest_parents
        choice = torch.zeros(len(split), dtype=torch.long, device=split.device)
        if split.shape[1] > 1:
            worse = []
            for k in range(split.shape[1]):
                trial = halved(domain, split[:, k].clamp(min=0), at[:, k])
                known, empty = self._known(trial)
                free = self._free([trial[f"free{i}"] for i in range(len(self.parts))])
                lower = self._pass(trial, known, free, trial["multiplier"]).lower.amax(1)
                lower = torch.where(empty, torch.inf, lower).reshape(2, -1)
                # the worse child decides; among equals, the sum, as far as it is short of proof
                value = lower.amin(0) + 0.1 * lower.clamp(max=0).sum(0)
                worse.append(torch.where(split[:, k] >= 0, value, -torch.inf))
            choice = torch.stack(worse).argmax(0)
        rows = torch.arange(len(split), device=split.device)
        children = halved(domain, split[rows, choice], at[rows, choice])
        return together(children, rest), torch.cat([parents, parents, rest_parents])

    def _settled(self, domain: dict[str, Tensor]) -> dict[str, Tensor]:
        """Domains with nothing to split, each once with the best multipliers; they are bounded again with these."""
        multiplier = domain["multiplier"].clone()
        for i in (~domain["settled"]).nonzero()[:, 0].tolist():
            leaf = {name: values[i : i + 1] for name, values in domain.items()}
            known, _ = self._known(leaf)
            bound = self._pass(leaf, known, self._free([leaf[f"free{k}"] for k in range(len(self.parts))]), None)
            if not bound.slopes:
                continue
            (slopes,) = bound.slopes.values()
            node = torch.bucketize(leaf["entry"][0], self.starts, right=True) - 1
            splits = Constraints(
                self.neurons.nodes, node, leaf["entry"][0] - self.starts[node], leaf["sign"][0], leaf["point"][0]
            )
            offsets = bound.offset[0] - self.query.offsets[0][self._rows_of(leaf["disjunct"])][0]
            multiplier[i], point = multipliers_and_point(
                self.network, self._region(1), known, splits, slopes[0], offsets
            )
            self._meet(point)
        return {**domain, "multiplier": multiplier, "settled": torch.ones_like(domain["settled"])}

    def _meet(self, point: Tensor) -> None:
        """Keep a flat input if it is unsafe."""
        x = point.reshape(1, *sample_shape(self.network.graph.inputs[0]))
        y = evaluate(self.network.graph, x).reshape(1, 1, -1)
        if bool(self.query.violated(y)[0, 0]) and (self.confirm is None or self.confirm(x)):
            self.met = x
