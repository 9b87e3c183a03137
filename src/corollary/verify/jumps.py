"""Where a floor jumps inside a region: no line follows it there, so the region is taken in two parts."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from corollary.graph import Node
from corollary.graph.ops import Floor
from corollary.verify.intervals import Interval
from corollary.verify.known import Known, interval_of
from corollary.verify.prepared import Prepared


@dataclass(frozen=True, eq=False)
class Cut:
    """A constraint on an entry of a node: at most `point` (sign +1), or at least (sign -1)."""

    node: Node
    entry: int
    sign: float
    point: float


@dataclass(frozen=True, eq=False)
class Part:
    """What lies on one side of a jump: all bounds there, and the constraint itself."""

    bounds: dict[Node, Interval]
    cut: Cut


def parts_at_jump(network: Prepared, known: Known, relevant: Mapping[Node, Tensor]) -> tuple[Part, Part] | None:
    """All bounds of one region with an entry below a jump, and with it at or above; None where no floor jumps inside.

    The first floor in the order of the graph comes first, as the bounds of later ones stand on it. Below the jump at n
    the entry ends at the number before n: what lies between is rounding.

    Args: `relevant`: the entries worth it, (1, entries); nodes that are not there have none.
    """
    for reader in network.nonlinear:
        node = reader.inputs[0]
        if not isinstance(reader.op, Floor) or node not in relevant:
            continue
        lower, upper = known.flat(node)
        inside = (torch.floor(lower) < torch.floor(upper)) & lower.isfinite() & upper.isfinite()
        if not bool((inside & relevant[node]).any()):
            continue
        entry = int(torch.where(inside & relevant[node], upper - lower, -1.0)[0].argmax())
        low, high = lower[0, entry], upper[0, entry]
        jump = torch.round(low + (high - low) / 2).clamp(torch.floor(low) + 1, torch.floor(high))
        below, above = upper.clone(), lower.clone()
        below[0, entry] = torch.nextafter(jump, torch.full_like(jump, -torch.inf))
        above[0, entry] = jump
        return (
            Part({**known.bounds, node: interval_of(node, lower, below)}, Cut(node, entry, 1.0, float(jump))),
            Part({**known.bounds, node: interval_of(node, above, upper)}, Cut(node, entry, -1.0, float(jump))),
        )
    return None
