"""Bounds of every node that a relaxation reads: intervals forward, sharpened by linear bounds node by node."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.graph import Node
from corollary.graph.ops import Elementwise, Input
from corollary.verify.intervals import Interval, apply_interval
from corollary.verify.known import Known, interval_of
from corollary.verify.layout import unpack
from corollary.verify.limit import check_time
from corollary.verify.linear_bounds import Splits, lower_bounds
from corollary.verify.planes import Planes
from corollary.verify.prepared import Prepared
from corollary.verify.sets import Box, Region
from corollary.verify.windows import row_width

COEFFICIENTS = 2**18
"""Rows are carried back in parts of so many coefficients at the widest node: 1 MB in float32, which a cache holds."""


@dataclass(frozen=True, eq=False)
class Sweep:
    """Bounds of the nodes that relaxations read, and which entries' bounds came from a backward pass.

    Args: `positions`: signed, (batch, count), as `lower_bounds` takes them.
    """

    known: Known
    positions: dict[Node, Tensor]


def sweep(
    network: Prepared,
    regions: Sequence[Region],
    *,
    linear: bool = True,
    held: Mapping[Node, Interval] | None = None,
    only: Collection[Node] | None = None,
    planes: Mapping[Node, Planes] | None = None,
    collect: dict[Node, Planes] | None = None,
) -> Sweep:
    """Bounds of all nodes in `network.bounded` over the regions.

    Args:
        linear: sharpen intervals by a backward pass from each node, where an interval leaves anything open.
        held: bounds that hold, to intersect with.
        only: nodes to sharpen; all where None.
        planes: linear bounds that hold, of networks with one input.
        collect: where given, the linear bounds found are entered here.
    """
    check(network, regions)
    batch = len(regions[0])
    values: dict[Node, Interval | Tensor] = {}
    known = Known(network, batch)
    positions: dict[Node, Tensor] = {}
    boxes = all(isinstance(region, Box) or region.norm == float("inf") for region in regions)
    graph = network.graph
    for node in graph:
        if isinstance(node.op, Input):
            region = regions[node.op.index]
            box = region if isinstance(region, Box) else region.box()
            value = Interval(box.lower, box.upper)
        elif node not in network.perturbed:
            if node in network.constants:
                values[node] = network.operand(node, batch)
            continue
        else:
            check_time()
            found = apply_interval(node, node.op.at(batch), tuple(values[source] for source in node.inputs))
            assert isinstance(found, Interval)
            value = within(found, network.ranges.get(node))
        if held is not None and node in held:
            value = met(value, held[node])
        if node in network.bounded:
            known.bounds[node] = value
            if planes is not None and node in planes:
                least = planes[node].least(regions[0])
                known.bounds[node] = value = entered(node, known.flat(node), planes[node].positions, least)
            settled = (boxes and node in network.exact) or _is_image(node, positions)
            if linear and (only is None or node in only) and not settled:
                needed = open_entries(network, node, known)
                if bool(needed.any()):
                    positions[node] = signed_positions(needed)
                    known.bounds[node] = value = sharpened(network, node, needed, regions, known, collect=collect)
        values[node] = value
        for source in graph.last_read[node]:
            values.pop(source, None)
    return Sweep(known, positions)


def _is_image(node: Node, positions: Collection[Node]) -> bool:
    """Whether the bounds are those of a sharpened node under a monotone function: no line of it gives better ones."""
    op = node.op
    return isinstance(op, Elementwise) and op.monotone != 0 and not op.kinks and node.inputs[0] in positions


def open_entries(network: Prepared, node: Node, known: Known) -> Tensor:
    """The entries whose relaxation is not exact, (batch, entries)."""
    lower, upper = known.flat(node)
    needed = torch.zeros_like(lower, dtype=torch.bool)
    for reader in network.nonlinear:
        if node not in reader.inputs:
            continue
        kinks = reader.op.kinks if isinstance(reader.op, Elementwise) else ()
        if kinks:
            for kink in kinks:
                needed |= (lower < kink) & (upper > kink)
        else:
            needed |= lower < upper
    return needed


def signed_positions(needed: Tensor) -> Tensor:
    """The entries needed, both signs, as `lower_bounds` takes them; short lists are filled up with other entries."""
    most = int(needed.sum(1).max())
    if most == needed.shape[1]:
        chosen = torch.arange(most, device=needed.device).expand(len(needed), most)
    else:
        chosen = needed.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return torch.cat([chosen + 1, -(chosen + 1)], dim=1)


def sharpened(
    network: Prepared,
    node: Node,
    needed: Tensor,
    regions: Sequence[Region],
    known: Known,
    splits: Mapping[Node, Splits] | None = None,
    collect: dict[Node, Planes] | None = None,
) -> Interval:
    """The bounds of a node met with those of backward passes from the entries needed.

    Samples with about as many of these are taken together, so many at a time as a cache holds rows of.
    """
    lower, upper = (end.clone() for end in known.flat(node))
    widest = row_width(network, node)
    counts = needed.sum(1)
    order = counts.argsort(descending=True)
    order = order[: int((counts > 0).sum())]
    start = 0
    if collect is not None:
        inputs = network.sizes[network.graph.inputs[0]]
        collect[node] = Planes.none(signed_positions(needed), inputs, network.dtype)
    while start < len(order):
        rows = 2 * int(counts[order[start]])
        samples = order[start : start + max(1, COEFFICIENTS // (rows * widest))]
        start += len(samples)
        whole = len(samples) == known.batch
        if whole:
            samples = torch.arange(known.batch, device=needed.device)
        positions = signed_positions(needed[samples])
        part = known if whole else known.at(samples)
        some = regions if whole else [region[samples] for region in regions]
        chosen = None if splits is None else {key: split.at(samples) for key, split in splits.items()}
        found = [
            lower_bounds(network, node, piece, some, part, splits=chosen)
            for piece in positions.split(max(1, COEFFICIENTS // (len(samples) * widest)), dim=1)
        ]
        if collect is not None:
            collect[node].put(samples, rows // 2, network.graph.inputs[0], found)
        lower_ends = torch.cat([bound.lower for bound in found], dim=1)
        ends = entered(node, part.flat(node), positions, lower_ends)
        low, high = (unpack(node, end, len(samples), 1).flatten(1) for end in (ends.lower, ends.upper))
        lower[samples], upper[samples] = low, high
    return interval_of(node, lower, upper)


def entered(node: Node, ends: tuple[Tensor, Tensor], positions: Tensor, found: Tensor) -> Interval:
    """Bounds (batch, entries) met with lower bounds found of signed entries, (batch, count)."""
    half = positions.shape[1] // 2
    entries = positions[:, :half] - 1
    lower, upper = ends
    low = torch.maximum(lower.gather(1, entries), found[:, :half])
    high = torch.minimum(upper.gather(1, entries), -found[:, half:])
    low, high = torch.minimum(low, high), torch.maximum(low, high)  # they can cross by a rounding error only
    return interval_of(node, lower.scatter(1, entries, low), upper.scatter(1, entries, high))


def within(value: Interval, ends: tuple[float, float] | None) -> Interval:
    """An interval cut to values that a node cannot leave."""
    if ends is None:
        return value
    return Interval(value.lower.clamp(*ends), value.upper.clamp(*ends))


def met(a: Interval, b: Interval) -> Interval:
    """The intersection of two intervals that both hold."""
    low, high = torch.maximum(a.lower, b.lower), torch.minimum(a.upper, b.upper)
    return Interval(torch.minimum(low, high), torch.maximum(low, high))  # they cross by a rounding error only


def check(network: Prepared, regions: Sequence[Region]) -> None:
    """Refuse regions that do not fit the network.

    Raises: BadInput, for another number of regions than inputs, another shape or unlike numbers of samples.
    """
    inputs = network.graph.inputs
    if len(regions) != len(inputs):
        raise BadInput(f"the network takes {len(inputs)} inputs, got {len(regions)} regions")
    for node, region in zip(inputs, regions, strict=True):
        given = region.lower if isinstance(region, Box) else region.center
        if tuple(given.shape[1:]) != tuple(size for size in node.shape[1:]):
            shape = "x".join(map(str, node.shape))
            raise BadInput(f"input {node.name} has shape {shape}; the region given is of {tuple(given.shape)}")
        if len(region) != len(regions[0]):
            raise BadInput(f"regions of {len(region)} and {len(regions[0])} samples: one number of samples is wanted")
