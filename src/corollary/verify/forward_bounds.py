"""Linear bounds carried forward: every node between two linear functions of the network's input.

One pass bounds all nodes, at a cost that grows with the number of inputs and not of neurons: the choice for networks of
few inputs. Looser than the backward pass, which chooses its lines by what they are needed for.

Both functions are held by their middle and half their distance, with one column for each input and one for the
constant. An affine op takes the middle through itself, and half the distance through its weights' absolute values.

Source: Xu et al. 2020, arXiv 2002.12920, section 3.1 (forward mode).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corollary.graph import Node
from corollary.graph.ops import Input, MatMul, Max, MaxPool, Multiply
from corollary.verify.intervals import Interval, apply_interval
from corollary.verify.known import Known, interval_of
from corollary.verify.layout import pack, sample_axis, sample_shape, unpack
from corollary.verify.limit import check_time
from corollary.verify.linear_functions import least
from corollary.verify.log_odds import LogOdds
from corollary.verify.prepared import Prepared
from corollary.verify.relaxations import largest_lines, product_lines
from corollary.verify.sets import Box, Region
from corollary.verify.sweep import check, met, within


@dataclass(frozen=True, eq=False)
class Between:
    """A value between middle - half and middle + half, which are linear in the input.

    Args: each (batch, inputs + 1, *sample); the last column is the constant.
    """

    middle: Tensor
    half: Tensor

    @property
    def lower(self) -> Tensor:
        """The function below."""
        return self.middle - self.half

    @property
    def upper(self) -> Tensor:
        """The function above."""
        return self.middle + self.half


def forward_bounds(network: Prepared, regions: Sequence[Region]) -> tuple[Known, Between]:
    """Bounds of all nodes that relaxations read, and the linear bounds of the output.

    Args: `regions`: one for each input of the network.
    Raises: BadInput, for regions that do not fit the network; NoRule.
    """
    check(network, regions)
    return _Walk(network, regions).run()


def ends_of(found: Between, regions: Sequence[Region]) -> tuple[Tensor, Tensor]:
    """The least of the function below and the largest of that above over the regions, (batch, entries) each."""

    def lowest(columns: Tensor) -> Tensor:
        flat = columns.flatten(2)
        slopes, total = flat[:, :-1].mT, flat[:, -1]
        start = 0
        for region in regions:
            size = (region.lower if isinstance(region, Box) else region.center)[0].numel()
            total = total + least(slopes[..., start : start + size], region)
            start += size
        return total

    return lowest(found.lower), -lowest(-found.upper)


class _Walk:
    def __init__(self, network: Prepared, regions: Sequence[Region]):
        self.network, self.regions, self.batch = network, regions, len(regions[0])
        self.columns = 1 + sum(network.sizes[node] for node in network.graph.inputs)
        self.known = Known(network, self.batch)
        self.found: dict[Node, Between] = {}
        self.intervals: dict[Node, Interval | Tensor] = {}

    def run(self) -> tuple[Known, Between]:
        graph = self.network.graph
        for node in graph:
            if node not in self.network.perturbed:
                if node in self.network.constants:
                    self.intervals[node] = self.network.operand(node, self.batch)
                continue
            check_time()
            self.found[node] = self._through(node)
            self.intervals[node] = self._interval(node)
            if node in self.network.bounded:
                self.known.bounds[node] = self._ends(node)
            for source in graph.last_read[node]:
                self.found.pop(source, None)
                self.intervals.pop(source, None)
        (output,) = graph.outputs
        return self.known, self.found[output]

    def _ends(self, node: Node) -> Interval:
        held = self.intervals[node]
        assert isinstance(held, Interval)
        return held

    def _interval(self, node: Node) -> Interval:
        """The bounds of a node: by intervals, and by its linear bounds."""
        if isinstance(node.op, Input):
            region = self.regions[node.op.index]
            box = region if isinstance(region, Box) else region.box()
            return Interval(box.lower, box.upper)
        values = tuple(self.intervals[source] for source in node.inputs)
        simple = apply_interval(node, node.op.at(self.batch), values)
        assert isinstance(simple, Interval)
        lower, upper = ends_of(self.found[node], self.regions)
        lower = torch.where(lower.isnan(), -torch.inf, lower)
        upper = torch.where(upper.isnan(), torch.inf, upper)
        return within(met(simple, interval_of(node, lower, upper)), self.network.ranges.get(node))

    def _through(self, node: Node) -> Between:
        if isinstance(node.op, Input):
            return self._input(node)
        if not self.network.is_nonlinear(node):
            return self._affine(node)
        if isinstance(node.op, Multiply):
            return self._product(node)
        if isinstance(node.op, MatMul):
            return self._matrix_product(node)
        if isinstance(node.op, Max | MaxPool):
            return self._largest(node)
        if isinstance(node.op, LogOdds):
            return self._odds(node)
        return self._lines(node)

    def _input(self, node: Node) -> Between:
        before = 0
        for other in self.network.graph.inputs:
            if other is node:
                break
            before += self.network.sizes[other]
        size = self.network.sizes[node]
        unit = torch.zeros(self.columns, size, dtype=self.network.dtype, device=self.network.device)
        unit[torch.arange(size) + before, torch.arange(size)] = 1
        middle = unit.reshape(1, self.columns, *sample_shape(node)).expand(self.batch, -1, *sample_shape(node))
        return Between(middle, torch.zeros_like(middle))

    def _affine(self, node: Node) -> Between:
        network, total = self.network, self.batch * self.columns
        moving, op = network.moving(node), node.op.at(total)
        offset = network.offset(node)
        shift = torch.zeros(1, 1, *sample_shape(node), dtype=network.dtype) if offset is None else offset

        def taken(parts: list[Tensor], absolute: bool) -> Tensor:
            values: list[Interval | Tensor | None] = list(network.operands(node, total))
            for i, part in zip(moving, parts, strict=True):
                value = pack(node.inputs[i], part)
                values[i] = Interval(-value, value) if absolute else value
            if not absolute:
                return unpack(node, op(*values), self.batch, self.columns) - shift
            found = apply_interval(node, op, tuple(value for value in values if value is not None))
            assert isinstance(found, Interval)
            return (unpack(node, found.upper, self.batch, self.columns) - unpack(
                node, found.lower, self.batch, self.columns)) / 2  # fmt: skip

        sources = [self.found[node.inputs[i]] for i in moving]
        middle = taken([source.middle for source in sources], absolute=False)
        middle[:, -1:] += shift
        half = taken([source.half.clamp(min=0) for source in sources], absolute=True)
        half = half - taken([(-source.half).clamp(min=0) for source in sources], absolute=True)
        return Between(middle, half)

    def _lines(self, node: Node) -> Between:
        (source,) = node.inputs
        lines = self.known.lines(node)
        shape = (self.batch, 1, *sample_shape(source))
        zero = torch.zeros_like(lines.lower_slope)
        low, low_offset, high, high_offset = (
            (zero if part is None else part).expand(self.batch, 1, -1).reshape(shape)
            for part in (lines.lower_slope, lines.lower_offset, lines.upper_slope, lines.upper_offset)
        )
        value = self.found[source]
        below = low.clamp(min=0) * value.lower + low.clamp(max=0) * value.upper
        above = high.clamp(min=0) * value.upper + high.clamp(max=0) * value.lower
        return self._between(node, below, low_offset, above, high_offset)

    def _between(self, node: Node, below: Tensor, low: Tensor, above: Tensor, high: Tensor) -> Between:
        """From both functions without, and their, constants; infinite ones give functions that say nothing."""
        below, above = below.clone(), above.clone()
        below[:, -1:] += low
        above[:, -1:] += high
        shape = sample_shape(node)
        below, above = (part.reshape(self.batch, self.columns, *shape) for part in (below, above))
        return Between((below + above) / 2, (above - below) / 2)

    def _product(self, node: Node) -> Between:
        a, b = node.inputs
        shape = sample_shape(node)
        ends = [self._wide(end, shape).expand(self.batch, 1, *shape) for s in (a, b) for end in self.known.range(s)]
        lines = product_lines(*ends)
        first, second = (
            Between(self._wide(v.middle, shape), self._wide(v.half, shape)) for v in (self.found[a], self.found[b])
        )
        below = _scaled(lines.lower_slope_a, first, below=True) + _scaled(lines.lower_slope_b, second, below=True)
        above = _scaled(lines.upper_slope_a, first, below=False) + _scaled(lines.upper_slope_b, second, below=False)
        return self._between(node, below, lines.lower_offset, above, lines.upper_offset)

    def _wide(self, value: Tensor, shape: tuple[int, ...]) -> Tensor:
        """With the axes of a value of that shape, for broadcasting."""
        missing = len(shape) - (value.ndim - 2)
        return value.reshape(*value.shape[:2], *(1,) * missing, *value.shape[2:])

    def _matrix_product(self, node: Node) -> Between:
        """McCormick planes with equal shares: both have the slopes of the middles, their constants are a gap apart."""
        a, b = node.inputs
        axes = max(len(sample_shape(a)), len(sample_shape(b)))
        fill = (1,) * axes
        (x_low, x_high), (y_low, y_high) = (
            tuple(self._wide(end, fill) for end in self.known.range(source)) for source in (a, b)
        )
        x, y = (Between(self._wide(v.middle, fill), self._wide(v.half, fill)) for v in (self.found[a], self.found[b]))
        x_middle, y_middle = (x_low + x_high) / 2, (y_low + y_high) / 2
        middle = x.middle @ y_middle + x_middle @ y.middle
        half = x.half @ y_middle.abs() + x_middle.abs() @ y.half
        low = (x_low @ y_low + x_high @ y_high) / 2
        high = (x_low @ y_high + x_high @ y_low) / 2
        return self._between(node, middle - half, -low, middle + half, -high)

    def _odds(self, node: Node) -> Between:
        assert isinstance(node.op, LogOdds)
        axis = sample_axis(node, node.op.axis)
        lines, value = self.known.odds(node), self.found[node.inputs[0]]
        low, high = (part.movedim(axis, -1) for part in (value.lower, value.upper))
        below = low - (lines.lower_weights @ high[..., None])[..., 0]
        above = high - (lines.upper_weights @ low[..., None])[..., 0]
        return self._between(
            node, *(part.movedim(-1, axis) for part in (below, lines.lower_offset, above, lines.upper_offset))
        )

    def _largest(self, node: Node) -> Between:
        (source,) = node.inputs
        lower, upper = self.known.range(source)
        assert isinstance(node.op, Max | MaxPool)
        lines = largest_lines(node.op, lower[:, 0], upper[:, 0])
        picked = lines.selected.flatten(1)[:, None].expand(-1, self.columns, -1)
        value = self.found[source]
        below, above = (part.flatten(2).gather(2, picked) for part in (value.lower, value.upper))
        exact = lines.upper_is_selected.flatten(1)[:, None]
        constant = torch.where(exact, 0.0, lines.upper_constant.flatten(1)[:, None])
        above = torch.where(exact, above, 0.0)
        return self._between(node, below, torch.zeros_like(constant), above, constant)


def _scaled(slope: Tensor, value: Between, *, below: bool) -> Tensor:
    """slope times the value, from below or from above."""
    low, high = (value.lower, value.upper) if below else (value.upper, value.lower)
    return slope.clamp(min=0) * low + slope.clamp(max=0) * high
