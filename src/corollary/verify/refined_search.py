"""Branch and bound in turns with the refinement of inner bounds: what the one cannot do in short time the other may."""

import time
from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor

from corollary.graph import Node
from corollary.verify.branch_and_bound import Branching, Search
from corollary.verify.domain_bounds import Root
from corollary.verify.jumps import Cut
from corollary.verify.linear_bounds import lower_bounds
from corollary.verify.prepared import Prepared
from corollary.verify.queries import Queries
from corollary.verify.refinement import BRANCHING, Refinement
from corollary.verify.search import Margin, Outcome
from corollary.verify.slopes import Ascent, optimised
from corollary.verify.sweep import Sweep

FIRST = 1 / 20
"""The share of the time that the first turn gets: a quarter of it the search on the outputs, the rest refinement."""
GROWTH = 2
"""Each turn is so many times as long as the one before: what a turn has to begin again costs little."""
BEGIN_AGAIN = 0.2
"""The search on the outputs begins again, with fewer splits to need, where refinement closed this part of the gap."""
LEAST = 0.05
"""The part of the gap that each way is credited with in any case."""


def rooted(
    network: Prepared, query: Queries, found: Sweep, margin: Margin, ascent: Ascent, cuts: tuple[Cut, ...] = ()
) -> tuple[Queries, Root, Tensor]:
    """The optimised bounds of a query of one region, with those of its disjuncts, (1, disjuncts); these stay open.

    Args: `cuts`: constraints that the bounds found stand on.
    """
    output = network.graph.outputs[0]
    query = query.only_open()
    regions = [query.region]
    best = optimised(network, output, query.on(output), regions, found, ascent=ascent, goal=query.offsets + 1e-3)
    bound = lower_bounds(network, output, query.on(output), regions, best.known, free=best.free)
    lower = margin.below(bound, query.offsets)
    margins = query.margins(lower)
    return replace(query, open=query.open & ~(margins > 0)), Root(best.known, best.free, lower, cuts), margins


def refined_search(
    network: Prepared,
    query: Queries,
    root: Root,
    margin: Margin,
    *,
    refinable: Collection[Node],
    ascent: Ascent,
    deadline: float,
    branching: Branching,
    generator: torch.Generator | None = None,
    confirm: Callable[[Tensor], bool] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """As `split_neurons`, in turns with a refinement of inner bounds.

    Args:
        refinable: the nodes whose bounds came from backward passes.
        ascent: of the bounds after each refinement.
        say: told of each refinement.
    """
    refinement = Refinement(network, query.region, refinable, margin, ascent, replace(BRANCHING, batch=branching.batch))
    search: Search | None = None
    turn, share, domains = FIRST * (deadline - time.monotonic()), 0.5, 0
    while True:
        until = deadline if refinement.is_spent(root.known) else min(deadline, time.monotonic() + share * turn)
        if search is None:
            gap = reached = max(-float(query.margins(root.lower).min()), 1e-9)
            search = Search(network, query, root, margin, until, branching, generator, confirm)
        search.go_on(root.known, until)
        outcome = search.run()
        if outcome.status in ("proved", "found") or until == deadline or search.used_up:
            return replace(outcome, domains=domains + search.count + refinement.domains)
        known = refinement.refined(root.known, min((1 - share) * turn, deadline - time.monotonic()))
        query, root, margins = rooted(network, query, Sweep(known, {}), margin, ascent, root.cuts)
        worst = float(margins.min())
        left = int(query.open.sum())
        say(f"refined inner bounds: {left} disjuncts left, smallest margin {worst:.4g}, {outcome.worst:.4g} by splits")
        if not left:
            return Outcome("proved", None, domains + search.count + refinement.domains, worst)
        # Each way gets time by the part of the gap that it closed in a second of its last turn.
        searched = (max(outcome.worst + reached, 0.0) / gap + LEAST) / share
        refined = (max(worst + gap, 0.0) / gap + LEAST) / (1 - share)
        share = min(max(searched / (searched + refined), 0.15), 0.85)
        reached, turn = max(-outcome.worst, 1e-9), GROWTH * turn
        if worst + gap > BEGIN_AGAIN * gap:
            domains, search = domains + search.count, None
