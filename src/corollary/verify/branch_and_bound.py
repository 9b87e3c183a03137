"""Branch and bound on neurons of any nonlinearity.

A domain is a region with some neurons held to a part of their range. Splitting one gives two domains whose relaxations
are tighter at that neuron; the split itself enters the bound with a multiplier.

Source: Shi et al. 2025, arXiv 2405.21063 (GenBaB); Wang et al. 2021, arXiv 2103.06624 (beta-CROWN).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from corollary.graph import evaluate
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
from corollary.verify.domain_bounds import Bounder, Root, Steps
from corollary.verify.domains import Pool, halved, together
from corollary.verify.known import Known
from corollary.verify.layout import sample_shape
from corollary.verify.leaves import Constraints, multipliers_and_point
from corollary.verify.limit import OutOfTime
from corollary.verify.linear_bounds import Bounded, Free
from corollary.verify.prepared import Prepared
from corollary.verify.queries import Queries
from corollary.verify.search import Margin, Outcome
from corollary.verify.sets import Box

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
    multiplier_rate: float = 0.2
    decay: float = 0.98
    points: PointRule = table_points
    most: int | None = None


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
    return Search(network, query, root, margin, deadline, branching or Branching(), generator, confirm).run()


class Search:
    """The state of `split_neurons`; its arguments are explained there."""

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
        steps = Steps(branching.iterations, branching.slope_rate, branching.multiplier_rate, branching.decay)
        self.bounder = Bounder(network, self.neurons, query, root, margin, steps, deadline)
        self.rule = branching.rule
        if branching.rule == "auto":
            self.rule = "mixed" if bool(self.neurons.bends.any()) else "babsr"
        self.only_products = self.neurons.only_products
        self.lines: InputLines | None = None
        if self.rule in ("bbps", "mixed"):
            self.lines = input_lines(network, self.neurons, root.known, query.region)
        self.starts = torch.tensor(list(self.neurons.first.values()), device=network.device)
        self.batch_size = branching.batch or max(32, min(1024, TOGETHER // max(1, len(self.neurons))))
        self.pool = Pool()
        self.count = 0
        self.idle = 0
        self.met: Tensor | None = None

    def run(self) -> Outcome:
        """Search, or go on, until nothing is open, a point was met, time or domains are used up."""
        found = self.begin() if not self.count else None
        while found is None and len(self.pool):
            worst = self.pool.worst
            if self.is_over():
                return Outcome("timeout", None, self.count, worst)
            if self.idle > PATIENCE:
                return Outcome("stuck", None, self.count, worst)
            try:
                found = self.advance()
            except OutOfTime:
                return Outcome("timeout", None, self.count, worst)
        if found is not None:
            return Outcome("found", found, self.count, self.pool.worst)
        return Outcome("proved", None, self.count, 0.0)

    def go_on(self, known: Known, deadline: float) -> None:
        """Have the next run use these bounds, tighter ones than before, and end at another deadline."""
        self.bounder.lower, self.bounder.upper = self.neurons.ends(known)
        self.deadline = self.bounder.deadline = deadline

    def is_over(self) -> bool:
        """Whether the time or the domains are used up."""
        return time.monotonic() > self.deadline or self.used_up

    @property
    def used_up(self) -> bool:
        """Whether the domains are used up."""
        return self.how.most is not None and self.count >= self.how.most

    def begin(self) -> Tensor | None:
        """Bound one domain for each disjunct; an unsafe point if one was met."""
        start = self.bounder.start()
        self.count += len(start["disjunct"])
        return self._enter(start, torch.full((len(start["disjunct"]),), -torch.inf, dtype=self.network.dtype))

    def advance(self) -> Tensor | None:
        """Split the next domains and bound their children; an unsafe point if one was met."""
        taken = self.taken()
        self.idle = self.idle + 1 if bool((taken["split"] < 0).all()) else 0
        children, parents = self._children(taken)
        self.count += len(children["disjunct"])
        return self._enter(children, parents) if self.met is None else self.met

    def taken(self) -> dict[str, Tensor]:
        """The domains to split next: those of the least bounds."""
        return self.pool.take(self.batch_size)

    def _enter(self, domain: dict[str, Tensor], parents: Tensor) -> Tensor | None:
        """Bound domains, choose the next split of those left open and enter them; or an unsafe point that was met."""
        # where leaves only converge, the steps become finer
        lower, domain = self.bounder.bound(domain, 0.9**self.idle)
        best = torch.maximum(lower.amax(1), parents)
        left = (~(best > 0)).nonzero()[:, 0]
        if not len(left):
            return None
        domain = {name: values[left] for name, values in domain.items()}
        known, _ = self.bounder.known(domain)
        free = self.bounder.free_of(domain)
        bound = self.bounder.carried(domain, known, free, domain["multiplier"], keep=True)
        point = self.unsafe(domain, bound)
        if point is not None and (self.confirm is None or self.confirm(point)):
            return point
        domain["split"], domain["at"] = self._choices(known, free, bound)
        self.pool.put(best[left], **domain)
        return None

    def unsafe(self, domain: dict[str, Tensor], bound: Bounded) -> Tensor | None:
        """An unsafe point among the inputs where the domains' bounds are least."""
        if not bound.slopes:
            return None
        (slopes,) = bound.slopes.values()
        count = len(domain["disjunct"])
        row = bound.lower.argmax(1)
        slopes = slopes.expand(count, *slopes.shape[1:])[torch.arange(count), row]
        if isinstance(self.query.region, Box):
            low, high = self.query.region.lower.flatten(1), self.query.region.upper.flatten(1)
            flat = torch.where(slopes > 0, low, high)
            points = flat.reshape(count, *self.query.region.lower.shape[1:])
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
                self.neurons,
                known,
                points,
                bound.kept,
                free,
                self.lines,
                self.bounder.region(len(lower)),
                scores,
                bound.lower,
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
        rest = self.settled({name: values[~able] for name, values in domain.items()})
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
                known, empty = self.bounder.known(trial)
                free = self.bounder.free_of(trial)
                lower = self.bounder.carried(trial, known, free, trial["multiplier"]).lower.amax(1)
                lower = torch.where(empty, torch.inf, lower).reshape(2, -1)
                # the worse child decides; among equals, the sum, as far as it is short of proof
                value = lower.amin(0) + 0.1 * lower.clamp(max=0).sum(0)
                worse.append(torch.where(split[:, k] >= 0, value, -torch.inf))
            choice = torch.stack(worse).argmax(0)
        rows = torch.arange(len(split), device=split.device)
        children = halved(domain, split[rows, choice], at[rows, choice])
        return together(children, rest), torch.cat([parents, parents, rest_parents])

    def settled(self, domain: dict[str, Tensor]) -> dict[str, Tensor]:
        """Domains with nothing to split, each once with the best multipliers; they are bounded again with these."""
        multiplier = domain["multiplier"].clone()
        for i in (~domain["settled"]).nonzero()[:, 0].tolist():
            leaf = {name: values[i : i + 1] for name, values in domain.items()}
            known, _ = self.bounder.known(leaf)
            bound = self.bounder.carried(leaf, known, self.bounder.free_of(leaf), None)
            if not bound.slopes:
                continue
            (slopes,) = bound.slopes.values()
            node = torch.bucketize(leaf["entry"][0], self.starts, right=True) - 1
            splits = Constraints(
                self.neurons.nodes, node, leaf["entry"][0] - self.starts[node], leaf["sign"][0], leaf["point"][0]
            )
            offsets = bound.offset[0] - self.query.offsets[0][self.bounder.rows_of(leaf["disjunct"])][0]
            multiplier[i], point = multipliers_and_point(
                self.network, self.bounder.region(1), known, splits, slopes[0], offsets
            )
            self.meet(point)
        return {**domain, "multiplier": multiplier, "settled": torch.ones_like(domain["settled"])}

    def meet(self, point: Tensor) -> None:
        """Keep a flat input if it is unsafe."""
        x = point.reshape(1, *sample_shape(self.network.graph.inputs[0]))
        y = evaluate(self.network.graph, x).reshape(1, 1, -1)
        if bool(self.query.violated(y)[0, 0]) and (self.confirm is None or self.confirm(x)):
            self.met = x
