"""Linear bounds carried backward through a network: the pass of CROWN, and what branch and bound adds to it.

A linear function of a node's value is replaced, node by node, by one of the node's inputs that lies below it over the
whole region; at the network's inputs its minimum is known in closed form. An upper bound is minus the lower bound of
the negated function, so there is one direction only.

Source: Zhang et al. 2018, arXiv 1811.00866; Xu et al. 2020, arXiv 2002.12920; split constraints: Wang et al. 2021,
arXiv 2103.06624, equation 8.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from corollary.graph import Node, backward
from corollary.graph.ops import Add, Convolution, Input, Linear, MatMul, Max, MaxPool, Multiply
from corollary.verify.known import Known
from corollary.verify.layout import (
    Rows,
    batch_axis,
    pack,
    sample_shape,
    sample_size,
    samples_first,
    unpack,
)
from corollary.verify.limit import check_time
from corollary.verify.linear_functions import below, dot, greatest, least, summed_to
from corollary.verify.log_odds import LogOdds
from corollary.verify.prepared import Prepared
from corollary.verify.relaxations import Lines, largest_lines, product_lines
from corollary.verify.sets import Box, Region
from corollary.verify.softmax_rows import recentered, through_odds
from corollary.verify.transpose import transposed
from corollary.verify.windows import Windows, first_windows, has_windows, map_size

LARGEST = 2**25
"""Parameters of one node are shared by the rows of a pass beyond so many."""
Free = Mapping[Node, tuple[Tensor | None, Tensor | None]]
"""Free parameters of the lower and upper lines at each nonlinear node, (batch, count, entries), all in [0, 1]."""


@dataclass(frozen=True, eq=False)
class Splits:
    """Constraints z <= point (sign +1) or z >= point (sign -1) on entries of one node; sign 0 stands for none.

    Args:
        entry, sign, point: (batch, constraints).
        multiplier: nonnegative, (batch, count, constraints).
    """

    entry: Tensor
    sign: Tensor
    point: Tensor
    multiplier: Tensor

    def at(self, samples: Tensor) -> "Splits":
        """The constraints of some of the samples."""
        return Splits(self.entry[samples], self.sign[samples], self.point[samples], self.multiplier[samples])


@dataclass(eq=False)
class Bounded:
    """What a pass found.

    Args:
        lower: (batch, count).
        ends: the functions that were left at each network input.
        offset: the constant beside them, (batch or 1, count).
        size: of what was summed last, (batch or 1, count): rounding errors grow with it.
        kept: coefficients at the nodes asked for, (batch or 1, count, entries).
    """

    lower: Tensor
    ends: dict[Node, "Rows | Windows"]
    offset: Tensor
    size: Tensor
    kept: dict[Node, Tensor] = field(default_factory=dict)

    @cached_property
    def slopes(self) -> dict[Node, Tensor]:
        """Coefficients at each network input, (batch or 1, count, entries)."""
        return {node: _dense(rows).unpacked(node).flatten(2) for node, rows in self.ends.items()}


def lower_bounds(
    network: Prepared,
    start: Node,
    rows: Rows | Tensor,
    regions: Sequence[Region],
    known: Known,
    *,
    free: Free | None = None,
    splits: Mapping[Node, Splits] | None = None,
    keep: Collection[Node] = (),
    collect: dict[Node, tuple[Tensor | None, Tensor | None]] | None = None,
) -> Bounded:
    """Lower bounds of linear functions of `start` over the regions.

    Args:
        rows: the functions; or (batch, count) signed positions, entry i as i + 1 and its negative as -(i + 1).
        regions: one for each network input, all with the same number of samples.
        known: bounds of every node in `network.bounded` that `start` depends on.
        free: where missing, the default of each relaxation.
        keep: nodes whose coefficients are wanted.
        collect: where given, the default free parameters of the pass are entered here, in the shape that `free` needs.
    """
    return _Pass(network, regions, known, free or {}, splits or {}, frozenset(keep), collect).run(start, rows)


class _Pass:
    def __init__(
        self,
        network: Prepared,
        regions: Sequence[Region],
        known: Known,
        free: Free,
        splits: Mapping[Node, Splits],
        keep: frozenset[Node],
        collect: dict[Node, tuple[Tensor | None, Tensor | None]] | None,
    ):
        self.network, self.regions, self.known, self.free = network, regions, known, free
        self.splits, self.keep, self.collect = splits, keep, collect
        self.batch = len(regions[0])
        self.offset: Tensor | float = 0.0
        self.kept: dict[Node, Tensor] = {}

    def run(self, start: Node, given: Rows | Tensor) -> Bounded:
        rows: Rows | Windows
        start, rows = self._entries(start, given) if isinstance(given, Tensor) else (start, given)
        first: dict[Node, Rows | Windows] = {start: rows}
        ends = backward(self.network.graph, first, self._pull, self._add)
        lower: Tensor | float = 0.0
        size: Tensor | float = 0.0
        for node, found in ends.items():
            assert isinstance(node.op, Input)
            region = self.regions[node.op.index]
            if isinstance(found, Windows) and node not in self.splits:
                low, reach = _least_in_windows(found, region)
            else:
                found = ends[node] = self._constrained(node, _dense(found))
                flat = self._flat(node, found)
                low, reach = least(flat, region), greatest(flat, region)
            lower, size = lower + low, size + reach
        lower, size = lower + self.offset, size + abs(self.offset)  # which constraints on the inputs move, too
        count = rows.count
        offset = torch.as_tensor(self.offset, dtype=self.network.dtype, device=self.network.device)
        lower = torch.as_tensor(lower, dtype=self.network.dtype, device=self.network.device)
        lower = torch.where(lower.isnan(), -torch.inf, lower).expand(self.batch, count)
        offset = offset.expand(-1, count) if offset.ndim else offset.expand(1, count)
        return Bounded(lower, ends, offset, torch.as_tensor(size, device=lower.device).expand_as(lower), self.kept)

    def _entries(self, node: Node, positions: Tensor) -> tuple[Node, "Rows | Windows"]:
        """Rows that pick single entries; those of a layer with weights are rows of these."""
        index, sign = positions.abs() - 1, positions.sign().to(self.network.dtype)
        batch, count = positions.shape
        if has_windows(self.network, node) and node not in self.splits and node not in self.keep:
            assert isinstance(node.op, Convolution)
            _, weight, *bias = self.network.operands(node, 1)
            assert weight is not None
            if bias and bias[0] is not None:
                size = sample_shape(node)
                self.offset = bias[0][index // (size[1] * size[2])] * sign
            windows = first_windows(node, node.op, weight, index, sign)
            return node.inputs[0], windows if windows.worthwhile else windows.dense()
        simple = isinstance(node.op, Linear) and len(node.shape) == 2 and batch_axis(node) == (0, 1)
        if simple and node not in self.splits and node not in self.keep and self.network.moving(node) == (0,):
            values = self.network.operands(node, 1)
            weight = values[1]
            assert weight is not None
            if len(values) > 2 and (bias := values[2]) is not None:
                self.offset = bias[index] * sign
            return node.inputs[0], Rows((weight[index] * sign[..., None]).flatten(0, 1), batch, count)
        size = sample_size(node)
        hot = torch.zeros(batch, count, size, dtype=self.network.dtype, device=self.network.device)
        hot.scatter_(2, index[..., None], sign[..., None])
        shape = sample_shape(node)
        return node, Rows(pack(node, hot.reshape(batch, count, *shape)), batch, count)

    def _flat(self, node: Node, rows: Rows) -> Tensor:
        return rows.unpacked(node).flatten(2)

    def _add(self, a: "Rows | Windows", b: "Rows | Windows") -> "Rows | Windows":
        if isinstance(a, Windows) and isinstance(b, Windows) and a.same_place(b):
            return a.with_values(a.values + b.values)
        a, b = _dense(a), _dense(b)
        if a.batch != b.batch:  # rows shared by the samples lie along the first axis
            wide, shared = (a, b) if a.batch > b.batch else (b, a)
            values = wide.values.unflatten(0, (wide.batch, -1)) + shared.values.unflatten(0, (1, -1))
            return Rows(values.flatten(0, 1), wide.batch, wide.count)
        return Rows(a.values + b.values, a.batch, a.count)

    def _constrained(self, node: Node, rows: Rows) -> Rows:
        """The split constraints on a node, entered with their multipliers."""
        if node not in self.splits:
            return rows
        split = self.splits[node]
        rows = rows.widened(node, self.batch)
        flat = self._flat(node, rows)
        push = split.multiplier * split.sign[:, None]
        entry = split.entry[:, None].expand(push.shape)
        flat = flat.scatter_add(2, entry, push)
        self.offset = self.offset - (push @ split.point[..., None])[..., 0]
        return Rows(pack(node, flat.reshape(*flat.shape[:2], *sample_shape(node))), rows.batch, rows.count)

    def _pull(self, node: Node, rows: "Rows | Windows") -> "list[Rows | Windows | None]":
        check_time()
        if isinstance(rows, Windows):
            if node not in self.splits and node not in self.keep:
                found = self._pull_windows(node, rows)
                if found is not None:
                    return found
            rows = rows.dense()
        rows = self._constrained(node, rows)
        if node in self.keep:
            self.kept[node] = self._flat(node, rows)
        flows: list[Rows | Windows | None] = [None] * len(node.inputs)
        moving = self.network.moving(node)
        if not moving:
            if node in self.network.constants:
                value = self.network.operand(node, 1)
                self._shift(node, rows, unpack(node, value, 1, 1))
            return flows
        if self.network.is_nonlinear(node):
            for i, flow in zip(moving, self._relaxed(node, rows), strict=True):
                flows[i] = flow
            return flows
        offset = self.network.offset(node)
        if offset is not None:
            self._shift(node, rows, offset)
        total = rows.batch * rows.count
        operands = self.network.operands(node, total)
        for i, flow in zip(moving, transposed(node, moving, operands, rows.values, total), strict=True):
            source = node.inputs[i]
            moved = Rows(flow, rows.batch, rows.count)
            flows[i] = moved if samples_first(source) else moved.widened(source, self.batch)  # `_add` needs it
        return flows

    def _pull_windows(self, node: Node, rows: Windows) -> "list[Rows | Windows | None] | None":
        """The same while rows are windows of a feature map; None where the op needs the whole map."""
        moving = self.network.moving(node)
        flows: list[Rows | Windows | None] = [None] * len(node.inputs)
        if node in self.network.relaxations and len(node.shape) == 4:
            flows[moving[0]] = self._windows_through_lines(node, rows)
            return flows
        if has_windows(self.network, node):
            assert isinstance(node.op, Convolution)
            _, weight, *bias = self.network.operands(node, 1)
            assert weight is not None
            if bias and bias[0] is not None:
                shift = rows.values.sum((2, 3)) @ bias[0]
                self.offset = self.offset + shift.reshape(rows.batch, rows.count)
            found = rows.through(self.network, node, weight)
            flows[0] = found if found.worthwhile else found.dense()
            return flows
        if isinstance(node.op, Add) and all(node.inputs[i].shape == node.shape for i in moving) and len(moving) == 2:
            return [rows, rows]
        return None

    def _windows_through_lines(self, node: Node, rows: Windows) -> Windows:
        rows = rows.widened(self.batch)
        shape = (self.batch, rows.count, -1)
        source = node.inputs[0]
        channels, height, width = map_size(source)

        def taken(maps: Tensor | None) -> Tensor | None:
            return None if maps is None else rows.taken(maps.reshape(-1, channels, height, width)).reshape(shape)

        if self.collect is not None:
            self.collect[node] = tuple(taken(part) for part in self.known.defaults(node))  # type: ignore[assignment]  # a pair
        free = self.free.get(node)
        if free is None:
            lines = self.known.lines(node)
            ends = (lines.lower_slope, lines.lower_offset, lines.upper_slope, lines.upper_offset)
            lines = Lines(*(taken(end) for end in ends))  # type: ignore[arg-type]  # as many, none of None
        else:
            lower, upper = (taken(end) for end in self.known.flat(source))
            lines = self.network.relaxations[node].lines(lower, upper, *free)  # type: ignore[arg-type]  # as many, none of None
        flat, shift = below(rows.values.reshape(shape), lines)
        self.offset = self.offset + shift
        return rows.with_values(flat.reshape(rows.values.shape))

    def _collect(self, node: Node, count: int) -> None:
        """Enter the default parameters of a node, one set for each row while these are not too many."""
        if self.collect is not None:
            pair = self.known.defaults(node)
            self.collect[node] = tuple(  # type: ignore[assignment]  # a pair
                None if part is None else part.expand(-1, count if part.numel() * count <= LARGEST else 1, -1)
                for part in pair
            )

    def _shift(self, node: Node, rows: Rows, offset: Tensor) -> None:
        """Add the product of rows and (1 or batch, 1, *sample) to the constant."""
        self.offset = self.offset + dot(self._flat(node, rows), offset.flatten(1))

    def _relaxed(self, node: Node, rows: Rows) -> list[Rows]:
        self._collect(node, rows.count)
        if isinstance(node.op, Multiply):
            return self._through_product(node, rows)
        if isinstance(node.op, MatMul):
            return self._through_matrix_product(node, rows)
        if isinstance(node.op, Max | MaxPool):
            return [self._through_maximum(node, rows)]
        if isinstance(node.op, LogOdds):
            found, shift = through_odds(node, rows, self.known)
            self.offset = self.offset + shift
            return [found]
        if node in self.network.shares:
            rows, shift = recentered(node, rows, self.known)
            self.offset = self.offset + shift
        return [self._through_lines(node, rows)]

    def _through_lines(self, node: Node, rows: Rows) -> Rows:
        source = node.inputs[0]
        lines = self.known.lines(node, *self.free.get(node, (None, None)))
        flat, shift = below(self._flat(node, rows), lines)
        self.offset = self.offset + shift
        return Rows(pack(source, flat.reshape(*flat.shape[:2], *sample_shape(source))), self.batch, rows.count)

    def _through_product(self, node: Node, rows: Rows) -> list[Rows]:
        a, b = node.inputs
        wide = rows.widened(node, self.batch)
        coefficients = wide.unpacked(node)
        ends = [
            end.expand(self.batch, 1, *sample_shape(node)) for source in (a, b) for end in self._range_in(source, node)
        ]
        free = tuple(
            None if part is None else part.reshape(*part.shape[:2], *sample_shape(node))
            for part in self.free.get(node, (None, None))
        )
        lines = product_lines(*ends, *free)
        positive, negative = coefficients.clamp(min=0), coefficients.clamp(max=0)
        self.offset = self.offset + (positive * lines.lower_offset + negative * lines.upper_offset).flatten(2).sum(2)
        flows = []
        for source, low, high in (
            (a, lines.lower_slope_a, lines.upper_slope_a),
            (b, lines.lower_slope_b, lines.upper_slope_b),
        ):
            flow = positive * low + negative * high
            flows.append(Rows(pack(source, summed_to(flow, sample_shape(source))), self.batch, rows.count))
        return flows

    def _range_in(self, source: Node, node: Node) -> tuple[Tensor, Tensor]:
        """Bounds of a source with the axes of the node that reads it, for broadcasting."""
        axes = len(sample_shape(node)) - len(sample_shape(source))
        lower, upper = self.known.range(source)
        return tuple(end.reshape(*end.shape[:2], *(1,) * axes, *end.shape[2:]) for end in (lower, upper))  # type: ignore[return-value]  # two

    def _through_matrix_product(self, node: Node, rows: Rows) -> list[Rows]:
        """McCormick lines for every scalar product of X Y, summed without forming them one by one.

        With a share r for each entry (i, k) of X, sum_j A_ij (r y_l + (1 - r) y_u)_kj is two matrix products.
        """
        a, b = node.inputs
        coefficients = rows.widened(node, self.batch).unpacked(node)
        positive, negative = coefficients.clamp(min=0), coefficients.clamp(max=0)
        (x_low, x_high), (y_low, y_high) = self._range_in(a, node), self._range_in(b, node)
        low_share, high_share = (
            0.5 if part is None else part.reshape(*part.shape[:2], *x_low.shape[2:])
            for part in self.free.get(node, (None, None))
        )
        low_y, high_y = y_low.mT, y_high.mT
        # At the lower line (share r): slope of x is r y_l + (1-r) y_u, of y is r x_l + (1-r) x_u.
        positive_low, positive_high = positive @ low_y, positive @ high_y
        negative_low, negative_high = negative @ low_y, negative @ high_y
        flow_a = low_share * positive_low + (1 - low_share) * positive_high
        flow_a = flow_a + high_share * negative_high + (1 - high_share) * negative_low
        below_x = low_share * x_low + (1 - low_share) * x_high
        above_x = high_share * x_low + (1 - high_share) * x_high
        flow_b = below_x.mT @ positive + above_x.mT @ negative
        constant = low_share * x_low * positive_low + (1 - low_share) * x_high * positive_high
        constant = constant + high_share * x_low * negative_high + (1 - high_share) * x_high * negative_low
        self.offset = self.offset - constant.flatten(2).sum(2)
        return [
            Rows(pack(source, summed_to(flow, sample_shape(source))), self.batch, rows.count)
            for source, flow in ((a, flow_a), (b, flow_b))
        ]

    def _through_maximum(self, node: Node, rows: Rows) -> Rows:
        (source,) = node.inputs
        lower, upper = self.known.range(source)
        assert isinstance(node.op, Max | MaxPool)
        lines = largest_lines(node.op, lower[:, 0], upper[:, 0])
        flat = self._flat(node, rows.widened(node, self.batch))
        positive, negative = flat.clamp(min=0), flat.clamp(max=0)
        selected = lines.selected.flatten(1)[:, None]
        exact = lines.upper_is_selected.flatten(1)[:, None]
        constant = torch.where(exact, 0.0, lines.upper_constant.flatten(1)[:, None])
        self.offset = self.offset + (negative * constant).sum(2)
        picked = positive + negative * exact
        flow = flat.new_zeros(*flat.shape[:2], sample_size(source))
        flow = flow.scatter_add(2, selected.expand(picked.shape), picked)
        return Rows(pack(source, flow.reshape(*flow.shape[:2], *sample_shape(source))), self.batch, rows.count)


def _dense(rows: "Rows | Windows") -> Rows:
    return rows.dense() if isinstance(rows, Windows) else rows


def _least_in_windows(rows: Windows, region: Region) -> tuple[Tensor, Tensor]:
    """`least` and `greatest` of functions that are zero outside their windows."""
    rows = rows.widened(len(region))
    shape = (len(region), rows.count, -1)
    flat = rows.values.reshape(shape)
    box = region if isinstance(region, Box) else region.box()
    reach = rows.taken(torch.maximum(box.lower.abs(), box.upper.abs())).reshape(shape)
    size = (flat.detach().abs() * reach).sum(2)
    if isinstance(region, Box):
        center, radius = (rows.taken(part).reshape(shape) for part in (region.center, region.radius))
        return (flat * center).sum(2) - (flat.abs() * radius).sum(2), size
    steepness = torch.linalg.vector_norm(flat, ord=region.dual_norm, dim=2)
    return (flat * rows.taken(region.center).reshape(shape)).sum(2) - region.radii[:, None] * steepness, size
