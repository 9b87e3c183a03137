"""Bounds of inner nodes, and the lines drawn from them, for a batch of regions."""

from collections.abc import Mapping

import torch
from torch import Tensor

from corollary.graph import Node
from corollary.graph.ops import MatMul, Multiply
from corollary.verify.intervals import Interval
from corollary.verify.layout import pack, sample_axis, sample_shape, unpack
from corollary.verify.log_odds import LogOdds
from corollary.verify.prepared import Prepared
from corollary.verify.relaxations import Lines, OddsLines, odds_lines


class Known:
    """Bounds of nodes, entered as a sweep finds them; lines with default parameters are drawn once from each.

    Args:
        batch: number of regions.
        bounds: those known at the start.
    """

    def __init__(self, network: Prepared, batch: int, bounds: Mapping[Node, Interval] | None = None):
        self.network, self.batch = network, batch
        self.bounds: dict[Node, Interval] = dict(bounds or {})
        self._lines: dict[Node, Lines] = {}
        self._odds: dict[Node, OddsLines] = {}

    def range(self, node: Node) -> tuple[Tensor, Tensor]:
        """The bounds of a node, (batch, 1, *sample)."""
        bounds = self.bounds[node]
        return unpack(node, bounds.lower, self.batch, 1), unpack(node, bounds.upper, self.batch, 1)

    def flat(self, node: Node) -> tuple[Tensor, Tensor]:
        """The bounds of a node, (batch, entries)."""
        lower, upper = self.range(node)
        return lower.flatten(1), upper.flatten(1)

    def lines(self, node: Node, lower_free: Tensor | None = None, upper_free: Tensor | None = None) -> Lines:
        """The lines of a nonlinear node of one variable, (batch, 1 or count, entries)."""
        if lower_free is None and upper_free is None and node in self._lines:
            return self._lines[node]
        lower, upper = (end.flatten(2) for end in self.range(node.inputs[0]))
        lines = self.network.relaxations[node].lines(lower, upper, lower_free, upper_free)
        if lower_free is None and upper_free is None:
            self._lines[node] = lines
        return lines

    def looseness(self, node: Node) -> tuple[Tensor, Tensor]:
        """How far the lines of a function of one variable are from it, at the middle of its range, (batch, 1, *sample).

        Returns: of the lower and of the upper lines.
        """
        lower, upper = self.flat(node.inputs[0])
        middle = (lower + (upper - lower) / 2)[:, None]
        lines, value = self.lines(node), node.op(middle)
        low, high = lines.lower_slope * middle, lines.upper_slope * middle
        low = low if lines.lower_offset is None else low + lines.lower_offset
        high = high if lines.upper_offset is None else high + lines.upper_offset
        shape = (self.batch, 1, *sample_shape(node))
        return (value - low).clamp(min=0).reshape(shape), (high - value).clamp(min=0).reshape(shape)

    def odds(self, node: Node) -> OddsLines:
        """The lines of log-odds along the last axis of samples whose axis of entries was moved there."""
        if node not in self._odds:
            assert isinstance(node.op, LogOdds)
            axis = sample_axis(node, node.op.axis)
            self._odds[node] = odds_lines(*(end.movedim(axis, -1) for end in self.range(node.inputs[0])))
        return self._odds[node]

    def defaults(self, node: Node) -> tuple[Tensor | None, Tensor | None]:
        """The free parameters that a relaxation starts from, (batch, 1, entries); None where a line has none."""
        network = self.network
        if node in network.relaxations:
            return network.relaxations[node].defaults(*(end.detach()[:, None] for end in self.flat(node.inputs[0])))
        if isinstance(node.op, Multiply | MatMul):
            size = network.sizes[node.inputs[0]] if isinstance(node.op, MatMul) else network.sizes[node]
            half = torch.full((self.batch, 1, size), 0.5, dtype=network.dtype, device=network.device)
            return half, half
        return None, None

    def at(self, samples: Tensor) -> "Known":
        """The same for some of the regions."""
        part = Known(
            self.network, len(samples), {node: take(node, b, samples, self.batch) for node, b in self.bounds.items()}
        )
        part._lines = {
            node: Lines(*(None if end is None else end[samples] for end in _ends(lines)))  # type: ignore[arg-type]  # as many as Lines has
            for node, lines in self._lines.items()
        }
        return part


def take(node: Node, bounds: Interval, samples: Tensor, batch: int) -> Interval:
    """The bounds of some of the samples."""
    return Interval(*(pack(node, unpack(node, end, batch, 1)[samples]) for end in (bounds.lower, bounds.upper)))


def interval_of(node: Node, lower: Tensor, upper: Tensor) -> Interval:
    """An interval in the layout of the network from ends (batch, entries)."""
    shape = (len(lower), 1, *sample_shape(node))
    return Interval(pack(node, lower.reshape(shape)), pack(node, upper.reshape(shape)))


def _ends(lines: Lines) -> tuple[Tensor | None, ...]:
    return lines.lower_slope, lines.lower_offset, lines.upper_slope, lines.upper_offset
