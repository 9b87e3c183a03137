"""Which neuron to split, and where: scores of how much a split tightens the bound of the output.

Source: Shi et al. 2025, arXiv 2405.21063, section 3 (BBPS); Bunel et al. 2020, arXiv 1909.06588 (BaBSR).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from corollary.graph import Node
from corollary.graph.ops import Elementwise, Floor, MatMul, Max, MaxPool, Multiply
from corollary.verify.branching_points import branching_table
from corollary.verify.known import Known, interval_of
from corollary.verify.layout import sample_axis, sample_shape
from corollary.verify.linear_bounds import Free, lower_bounds
from corollary.verify.linear_functions import dot, summed_to
from corollary.verify.log_odds import LogOdds
from corollary.verify.prepared import Prepared
from corollary.verify.relaxations import Lines
from corollary.verify.sets import Box, Region
from corollary.verify.sweep import signed_positions

Rule = Literal["bbps", "babsr", "gap", "mixed", "random"]
SHORTCUTS = 2**26
"""Neurons are scored with the shortcut while they, times rows and inputs, are at most so many; those of largest gap."""
PIECE = 2**22
"""So many coefficients of them are held at once."""
LINES = 2**26
"""Beyond so many coefficients no linear bounds of the neurons in the input are held."""


@dataclass(frozen=True, eq=False)
class Neurons:
    """The entries of all nodes that nonlinear ops read, numbered one after the other."""

    network: Prepared

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes, in the order of the graph."""
        return tuple(node for node in self.network.graph if node in self.network.bounded)

    @cached_property
    def first(self) -> dict[Node, int]:
        """The number of the first entry of each node."""
        found, count = {}, 0
        for node in self.nodes:
            found[node] = count
            count += self.network.sizes[node]
        return found

    def __len__(self) -> int:
        return sum(self.network.sizes[node] for node in self.nodes)

    def of(self, node: Node) -> slice:
        """The numbers of a node's entries."""
        return slice(self.first[node], self.first[node] + self.network.sizes[node])

    @cached_property
    def readers(self) -> dict[Node, tuple[Node, ...]]:
        """The nonlinear nodes that read each."""
        return {node: tuple(r for r in self.network.nonlinear if node in r.inputs) for node in self.nodes}

    def ends(self, known: Known) -> tuple[Tensor, Tensor]:
        """All bounds, (batch, neurons) each."""
        both = [known.flat(node) for node in self.nodes]
        return torch.cat([low for low, _ in both], 1), torch.cat([high for _, high in both], 1)

    def known(self, lower: Tensor, upper: Tensor) -> Known:
        """Bounds by node from all bounds, (batch, neurons)."""
        held = {node: interval_of(node, lower[:, self.of(node)], upper[:, self.of(node)]) for node in self.nodes}
        return Known(self.network, len(lower), held)

    @cached_property
    def kinks(self) -> Tensor:
        """Points at which a split makes a reader affine, (neurons, points); NaN where there are fewer."""
        rows = []
        for node in self.nodes:
            points: list[float] = []
            for reader in self.readers[node]:
                if isinstance(reader.op, Elementwise):
                    points += reader.op.kinks
                elif isinstance(reader.op, Multiply):
                    points.append(0.0)
            points = sorted(set(points))[:4]
            row = torch.full((4,), torch.nan, dtype=self.network.dtype, device=self.network.device)
            row[: len(points)] = torch.tensor(points, dtype=self.network.dtype)
            rows.append(row.expand(self.network.sizes[node], 4))
        return torch.cat(rows)

    @cached_property
    def bends(self) -> Tensor:
        """Whether a split can help where no kink or jump lies inside: some reader is curved, (neurons,)."""
        found = []
        for node in self.nodes:
            curved = any(
                not (isinstance(r.op, Floor) or (isinstance(r.op, Elementwise) and r.op.kinks))
                for r in self.readers[node]
            )
            found.append(torch.full((self.network.sizes[node],), curved, device=self.network.device))
        return torch.cat(found)

    @cached_property
    def steps(self) -> Tensor:
        """Whether a floor reads the entry, (neurons,)."""
        some = [any(isinstance(r.op, Floor) for r in self.readers[node]) for node in self.nodes]
        return torch.tensor(some, device=self.network.device).repeat_interleave(self._sizes)

    @cached_property
    def _sizes(self) -> Tensor:
        return torch.tensor([self.network.sizes[node] for node in self.nodes], device=self.network.device)

    @cached_property
    def only_products(self) -> Tensor:
        """Whether no function of one variable reads the entry, (neurons,)."""
        none = [not any(r in self.network.relaxations for r in self.readers[node]) for node in self.nodes]
        return torch.tensor(none, device=self.network.device).repeat_interleave(self._sizes)


PointRule = Callable[["Neurons", Tensor, Tensor], Tensor]


def middle_points(neurons: Neurons, lower: Tensor, upper: Tensor) -> Tensor:
    """A kink inside where there is one, the middle elsewhere; (batch, neurons)."""
    middle = lower + (upper - lower) / 2
    kinks = neurons.kinks
    inside = (kinks > lower[..., None]) & (kinks < upper[..., None])
    distance = torch.where(inside, (kinks - middle[..., None]).abs(), torch.inf)
    nearest, place = distance.min(-1)
    kink = kinks.expand(*lower.shape, kinks.shape[1]).gather(-1, place[..., None])[..., 0]
    return torch.where(nearest < torch.inf, kink, middle)


def table_points(neurons: Neurons, lower: Tensor, upper: Tensor) -> Tensor:
    """Where the area between the lines is least after the split, for neurons that curved functions alone read.

    For the others, as `middle_points`; (batch, neurons).
    Source: Shi et al. 2025, arXiv 2405.21063, pre-optimised branching points.
    """
    points = middle_points(neurons, lower, upper)
    for node in neurons.nodes:
        readers = neurons.readers[node]
        if all(r in neurons.network.relaxations and not getattr(r.op, "kinks", ()) for r in readers):
            place = neurons.of(node)
            table = branching_table(tuple(sorted({r.op for r in readers}, key=str)))
            points[:, place] = table.point(lower[:, place], upper[:, place])
    return points


def splittable(neurons: Neurons, lower: Tensor, upper: Tensor) -> Tensor:
    """Whether a split can tighten anything, (batch, neurons)."""
    inside = ((neurons.kinks > lower[..., None]) & (neurons.kinks < upper[..., None])).any(-1)
    size = torch.maximum(lower.abs(), upper.abs()).clamp(min=1.0)
    curved = neurons.bends | (neurons.steps & (torch.floor(lower) < torch.floor(upper)))
    return inside | (curved & (upper - lower > 1e-4 * size))


def gap_scores(neurons: Neurons, known: Known, points: Tensor, kept: dict[Node, Tensor], free: Free) -> Tensor:
    """By how much a split of each neuron raises the lines that the bound stands on, on average over its range.

    Args:
        kept: coefficients at the outputs of the nonlinear nodes, (batch, count, entries).
    Returns: (batch, neurons), summed over rows.
    """
    lower, upper = neurons.ends(known)
    left, right = neurons.known(lower, points), neurons.known(points, upper)
    share = (points - lower) / (upper - lower).clamp(min=1e-30)
    scores = torch.zeros_like(lower)
    for node in neurons.nodes:
        place = neurons.of(node)
        for reader in neurons.readers[node]:
            if reader not in kept:
                continue
            weight = kept[reader].expand(known.batch, *kept[reader].shape[1:])
            if reader in neurons.network.relaxations:
                parent = known.lines(reader, *free.get(reader, (None, None)))
                gain = torch.zeros_like(weight)
                for side, part in ((left, share[:, place]), (right, 1 - share[:, place])):
                    ends = side.flat(node)
                    gain = gain + part[:, None] * _gain(weight, parent, side.lines(reader), (ends[0] + ends[1]) / 2)
                scores[:, place] += gain.clamp(min=0).nan_to_num(posinf=0).sum(1)
            else:
                scores[:, place] += _product_gain(node, reader, known, weight)
    return scores


def _gain(weight: Tensor, parent: Lines, child: Lines, middle: Tensor) -> Tensor:
    """How much higher the lines that carry `weight` are at the middle of a child's range, (batch, count, entries)."""

    def at(slope: Tensor, offset: Tensor | None) -> Tensor:
        value = slope * middle[:, None]
        return value if offset is None else value + offset

    rise = at(child.lower_slope, child.lower_offset) - at(parent.lower_slope, parent.lower_offset)
    fall = at(parent.upper_slope, parent.upper_offset) - at(child.upper_slope, child.upper_offset)
    return weight.clamp(min=0) * rise - weight.clamp(max=0) * fall


def _product_gain(node: Node, reader: Node, known: Known, weight: Tensor) -> Tensor:
    """The same for products, whose planes lie (x_u - x_l)(y_u - y_l) / 4 apart in the middle; half of it by a split."""
    size = weight.abs().sum(1)
    size = size.reshape(len(size), 1, *sample_shape(reader))
    if isinstance(reader.op, LogOdds):
        return _odds_gain(node, reader, known, size)
    ends = {source: known.range(source) for source in reader.inputs if source in known.bounds}
    width = {source: high - low for source, (low, high) in ends.items()}
    if isinstance(reader.op, Max | MaxPool):
        spread = width[node].flatten(1)
        return spread * size.flatten(1).mean(1, keepdim=True)
    other = width[reader.inputs[1] if node is reader.inputs[0] else reader.inputs[0]]
    own = width[node]
    if isinstance(reader.op, MatMul):
        gain = own * (size @ other.mT if node is reader.inputs[0] else other.mT @ size)
        return gain.flatten(1) / 8
    spread = torch.ones_like(size) * other.reshape(len(other), 1, *(1,) * (size.ndim - other.ndim), *other.shape[2:])
    return (own * summed_to(size * spread, sample_shape(node))).flatten(1) / 8


def best_of_ranks(*scores: Tensor) -> Tensor:
    """The better rank of each neuron, as a number that rises with it, (batch, neurons): candidates of every score.

    The shortcut sees how a neuron stands with others of its node, the gap how much its own lines can move; where paths
    run in parallel, as in formulas written out, only the gap is right.
    """
    ranks = [score.argsort(dim=1, descending=True).argsort(dim=1) for score in scores]
    return -torch.stack(ranks).amin(0).to(scores[0].dtype)


def _odds_gain(node: Node, reader: Node, known: Known, size: Tensor) -> Tensor:
    """The same for log-odds: a chord of exp lies width squared / 8 of its share above it; a half of it a quarter."""
    assert isinstance(reader.op, LogOdds)
    axis = sample_axis(reader, reader.op.axis)
    lower, upper = known.range(node)
    carried = (known.odds(reader).lower_weights.mT @ size.movedim(axis, -1)[..., None])[..., 0]
    return ((upper - lower).square() * carried.movedim(-1, axis)).flatten(1) * 3 / 32


@dataclass(frozen=True, eq=False)
class InputLines:
    """Linear bounds of every neuron in the network's input, over one region: lower and upper slopes and offsets.

    Args: `slopes`: (2, neurons, inputs); `offsets`: (2, neurons).
    """

    slopes: Tensor
    offsets: Tensor


def input_lines(network: Prepared, neurons: Neurons, known: Known, region: Region) -> InputLines | None:
    """The bounds of the neurons that root bounds came from; None where they are too many to hold."""
    (source,) = network.graph.inputs
    inputs = network.sizes[source]
    if len(neurons) * inputs * 2 > LINES:
        return None
    slopes, offsets = [], []
    for node in neurons.nodes:
        size = network.sizes[node]
        positions = signed_positions(torch.ones(1, size, dtype=torch.bool, device=network.device))
        found = lower_bounds(network, node, positions, [region], known)
        slope = found.slopes.get(source, torch.zeros(1, 2 * size, inputs, dtype=network.dtype))[0]
        slopes.append(torch.stack([slope[:size], -slope[size:]]))
        offset = found.offset[0]
        offsets.append(torch.stack([offset[:size], -offset[size:]]))
    return InputLines(torch.cat(slopes, 1), torch.cat(offsets, 1))


def shortcut_scores(
    neurons: Neurons,
    known: Known,
    points: Tensor,
    kept: dict[Node, Tensor],
    free: Free,
    lines: InputLines,
    region: Region,
    preferred: Tensor,
    margin: Tensor,
) -> Tensor:
    """BBPS: the worse child's bound, had the bound stopped at the neurons of one node and used their linear bounds.

    Every neuron of a node is scored; where that would take too long, those with the largest entries in `preferred`.

    Args:
        preferred: (batch, neurons).
        margin: the bound of each row, (batch, count).
    Returns: (batch, neurons); minus infinity for neurons that are not scored, such as those that only products read.
    """
    ends = _center_radius(region)
    lower, upper = neurons.ends(known)
    left, right = neurons.known(lower, points), neurons.known(points, upper)
    readers = {
        node: [r for r in neurons.readers[node] if r in neurons.network.relaxations and r in kept]
        for node in neurons.nodes
    }
    each = margin.numel() * ends[0].shape[1]
    most = max(16, SHORTCUTS // (each * max(1, sum(bool(curves) for curves in readers.values()))))
    scores = torch.full_like(lower, -torch.inf)
    for node, curves in readers.items():
        if not curves:
            continue
        place = neurons.of(node)
        index = preferred[:, place].topk(min(most, place.stop - place.start), dim=1).indices
        stopped = _Stopped.at(_contribution(known, curves, kept, free), lines, place, ends)
        sides = [_contribution(side, curves, kept, {}) for side in (left, right)]
        for piece in index.split(max(1, PIECE // each), dim=1):
            worse = torch.minimum(*(stopped.with_child(side, piece) + margin[..., None] for side in sides)).amin(1)
            scores[:, place] = scores[:, place].scatter(1, piece, worse)
    return scores


@dataclass(frozen=True, eq=False)
class _Stopped:
    """H(x) = total . x + constant: what all neurons of a node contribute to the bound, by their bounds in the input.

    Args:
        slope, offset: with which each neuron enters, (batch, count, entries).
        slopes, offsets: the bounds of the neurons in the input, (2, entries, inputs) and (2, entries).
        base: the least value of H over the region.
    """

    slope: Tensor
    offset: Tensor
    slopes: Tensor
    offsets: Tensor
    center: Tensor
    radius: Tensor
    total: Tensor
    constant: Tensor
    base: Tensor

    @classmethod
    def at(
        cls, contribution: tuple[Tensor, Tensor], lines: InputLines, place: slice, ends: tuple[Tensor, Tensor]
    ) -> "_Stopped":
        slope, offset = contribution
        slopes, offsets = lines.slopes[:, place], lines.offsets[:, place]
        positive, negative = slope.clamp(min=0), slope.clamp(max=0)
        total = positive @ slopes[0] + negative @ slopes[1]
        constant = positive @ offsets[0] + negative @ offsets[1] + offset.sum(2)
        base = dot(total, ends[0]) + constant - dot(total.abs(), ends[1])
        return cls(slope, offset, slopes, offsets, *ends, total, constant, base)

    def with_child(self, child: tuple[Tensor, Tensor], index: Tensor) -> Tensor:
        """By how much the least value of H rises if one neuron contributes as in a child, (batch, count, k).

        Args: `index`: which neuron, (batch, k).
        """
        slope, offset, new_slope, new_offset = (_picked(part, index) for part in (self.slope, self.offset, *child))
        (low_slope, high_slope), (low_offset, high_offset) = self.slopes[:, index], self.offsets[:, index]
        positive = new_slope.clamp(min=0) - slope.clamp(min=0)
        negative = new_slope.clamp(max=0) - slope.clamp(max=0)
        change = positive[..., None] * low_slope[:, None] + negative[..., None] * high_slope[:, None]
        shift = positive * low_offset[:, None] + negative * high_offset[:, None] + new_offset - offset
        moved = self.total[:, :, None] + change
        least = (moved @ self.center[:, None, :, None])[..., 0] - (moved.abs() @ self.radius[:, None, :, None])[..., 0]
        return least + (self.constant - self.base)[..., None] + shift


def _contribution(known: Known, readers: list[Node], kept: dict[Node, Tensor], free: Free) -> tuple[Tensor, Tensor]:
    """Slope and constant with which each neuron of a node enters the bound, (batch, count, entries)."""
    slope: Tensor | float = 0.0
    constant: Tensor | float = 0.0
    for reader in readers:
        weight, lines = kept[reader], known.lines(reader, *free.get(reader, (None, None)))
        positive, negative = weight.clamp(min=0), weight.clamp(max=0)
        slope = slope + positive * lines.lower_slope + negative * lines.upper_slope
        for part, offset in ((positive, lines.lower_offset), (negative, lines.upper_offset)):
            constant = constant + part * offset if offset is not None else constant + torch.zeros_like(part)
    assert isinstance(slope, Tensor)
    assert isinstance(constant, Tensor)
    return slope, constant


def _picked(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(2, index[:, None].expand(-1, values.shape[1], -1))


def _center_radius(region: Region) -> tuple[Tensor, Tensor]:
    box = region if isinstance(region, Box) else region.box()
    return box.center.flatten(1), box.radius.flatten(1)


def constant_scores(neurons: Neurons, known: Known, points: Tensor, kept: dict[Node, Tensor], free: Free) -> Tensor:
    """The score of BaBSR, carried over to any nonlinearity: only the constant terms of the bound count.

    The change of the constant, and the change of the slope times the bias of the affine layer before.
    """
    lower, upper = neurons.ends(known)
    left, right = neurons.known(lower, points), neurons.known(points, upper)
    scores = torch.zeros_like(lower)
    for node in neurons.nodes:
        curves = [r for r in neurons.readers[node] if r in neurons.network.relaxations and r in kept]
        if not curves:
            continue
        bias = None if neurons.network.is_nonlinear(node) or not node.inputs else neurons.network.offset(node)
        slope, constant = _contribution(known, curves, kept, free)
        sides = []
        for side in (left, right):
            new_slope, new_constant = _contribution(side, curves, kept, {})
            change = new_constant - constant
            if bias is not None:
                change = change + (new_slope - slope) * bias.flatten(2)
            sides.append(change.sum(1))
        scores[:, neurons.of(node)] = torch.minimum(*sides)
    return scores
