"""Branch and bound in turns with the refinement of inner bounds: what the one cannot do in short time the other may."""

import time
from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor

from corollary.graph import Node
from corollary.verify.branch_and_bound import Branching, split_neurons
from corollary.verify.domain_bounds import Root
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
LEAST = 0.05
"""The part of the gap that each way is credited with in any case."""


def rooted(
    network: Prepared, query: Queries, found: Sweep, margin: Margin, ascent: Ascent
) -> tuple[Queries, Root, Tensor]:
    """The optimised bounds of a query of one region, with those of its disjuncts, (1, disjuncts); these stay open."""
    output = network.graph.outputs[0]
    rows = query.open[0][query.disjunct[0]].nonzero()[:, 0]
    query = replace(query, rows=query.rows[:, rows], offsets=query.offsets[:, rows], disjunct=query.disjunct[:, rows])
    regions = [query.region]
    best = optimised(network, output, query.on(output), regions, found, ascent=ascent, goal=query.offsets + 1e-3)
    bound = lower_bounds(network, output, query.on(output), regions, best.known, free=best.free)
    lower = margin.below(bound, query.offsets)
    margins = query.margins(lower)
    return replace(query, open=query.open & ~(margins > 0)), Root(best.known, best.free, lower), margins


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
    """As `split_neurons`, begun again whenever inner bounds became tighter.

    Args:
        refinable: the nodes whose bounds came from backward passes.
        ascent: of the bounds after each refinement.
        say: told of each refinement.
    """
    refinement = Refinement(network, query.region, refinable, margin, ascent, replace(BRANCHING, batch=branching.batch))
    turn, share, domains = FIRST * (deadline - time.monotonic()), 0.25, 0
    reached = -float(query.margins(root.lower).min())
    while True:
        gap = max(-float(query.margins(root.lower).min()), 1e-9)
        until = deadline if refinement.is_spent(root.known) else min(deadline, time.monotonic() + share * turn)
        outcome = split_neurons(
            network, query, root, margin, deadline=until, branching=branching, generator=generator, confirm=confirm
        )
        domains += outcome.domains
        used_up = branching.most is not None and domains >= branching.most
        if outcome.status in ("proved", "found") or used_up or until == deadline:
            return replace(outcome, domains=domains + refinement.domains)
        known = refinement.refined(root.known, min((1 - share) * turn, deadline - time.monotonic()))
        query, root, margins = rooted(network, query, Sweep(known, {}), margin, ascent)
        worst = float(margins.min())
        say(f"refined inner bounds: {int(query.open.sum())} disjuncts left, smallest margin {worst:.4g}")
        if not bool(query.open.any()):
            return Outcome("proved", None, domains + refinement.domains, worst)
        # Each way gets time by the part of the gap that it closed in a second of its last turn.
        searched = (max(outcome.worst + reached, 0.0) / gap + LEAST) / share
        refined = (max(worst + gap, 0.0) / gap + LEAST) / (1 - share)
        share = min(max(searched / (searched + refined), 0.1), 0.6)
        reached, turn = -max(worst, outcome.worst), GROWTH * turn
