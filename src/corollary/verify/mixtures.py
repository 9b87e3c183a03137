"""Margins of conjunctions from means of their rows, which can be positive where no row is."""

import torch
from torch import Tensor

from corollary.verify.queries import Queries
from corollary.verify.sets import Box

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Of the other row in a mean."""


def mixed_margins(queries: Queries, slopes: Tensor, lower: Tensor) -> Tensor:
    """Margins of the disjuncts, (n, disjuncts): of their best rows, and of means of two.

    All rows of a disjunct are at most zero at an unsafe input, so every mean of them is; the best row of each disjunct
    is mixed with each of the others, in several shares.

    Args:
        queries: of boxes.
        slopes: of linear bounds of row . y - offset at the input, (n, rows, inputs); lower: their least values.
    """
    margins = queries.margins(lower)
    box, disjuncts = queries.region, queries.open.shape[1]
    assert isinstance(box, Box)
    if queries.rows.shape[1] == disjuncts:
        return margins
    best = lower.new_full((len(lower), disjuncts), -torch.inf)
    best = best.scatter_reduce(1, queries.disjunct, lower, "amax")
    rows = torch.arange(lower.shape[1], device=lower.device).expand_as(lower)
    is_best = lower >= best.gather(1, queries.disjunct)
    leader = torch.zeros_like(best, dtype=torch.long)
    leader = leader.scatter_reduce(1, queries.disjunct, torch.where(is_best, rows, 0), "amax")
    leader = leader.gather(1, queries.disjunct)
    radius = box.radius.flatten(1)[..., None]
    middle = lower + (slopes.abs() @ radius)[..., 0]  # the bounds at the middles of the boxes
    other, other_middle = slopes.gather(1, leader[..., None].expand_as(slopes)), middle.gather(1, leader)
    least = lower
    for share in SHARES:
        reach = (torch.lerp(other, slopes, share).abs() @ radius)[..., 0]
        least = torch.fmax(least, torch.lerp(other_middle, middle, share) - reach)  # infinite bounds make NaN
    found = lower.new_full((len(lower), disjuncts), -torch.inf)
    found = found.scatter_reduce(1, queries.disjunct, least, "amax")
    return torch.where(queries.open, torch.maximum(margins, found), torch.inf)
