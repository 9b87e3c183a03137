"""Where the samples lie in a node's value, and rows of linear functions beside them.

A value has the layout of the network with the samples along one of its axes. Linear functions of it, `count` for each
of `batch` samples, are the rows of a tensor in the same layout with `batch * count` in the place of the samples, so
that the network's own ops act on them. `unpack` brings both to (batch, count, *sample).
"""

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from corollary.base.errors import NoRule
from corollary.graph import Node
from corollary.graph.ops import BatchSize


@lru_cache(maxsize=65536)
def batch_axis(node: Node) -> tuple[int, int]:
    """The axis along which the samples lie, and how many entries of it belong to each.

    Raises: NoRule, if the samples lie along several axes, along none, or not side by side.
    """
    found = [(axis, size) for axis, size in enumerate(node.shape) if isinstance(size, BatchSize)]
    if len(found) != 1 or found[0][1].offset:
        shape = "x".join(map(str, node.shape))
        raise NoRule(f"bounds need the samples along one axis; {node.op} ({node.where()}) has shape {shape}")
    return found[0][0], found[0][1].scale


def sample_shape(node: Node) -> tuple[int, ...]:
    """The shape of one sample's share of the value; several entries of the batch axis come first."""
    axis, scale = batch_axis(node)
    rest = tuple(size for i, size in enumerate(node.shape) if i != axis and isinstance(size, int))
    return rest if scale == 1 else (scale, *rest)


def sample_size(node: Node) -> int:
    """The number of entries of one sample."""
    size = 1
    for length in sample_shape(node):
        size *= length
    return size


def unpack(node: Node, value: Tensor, batch: int, count: int) -> Tensor:
    """(batch, count, *sample) from the layout of the network; a view where the samples come first."""
    axis, scale = batch_axis(node)
    if axis:
        value = value.movedim(axis, 0)
    sizes = (batch, count) if scale == 1 else (batch, count, scale)
    return value.reshape(*sizes, *value.shape[1:])


def pack(node: Node, rows: Tensor) -> Tensor:
    """The layout of the network from (batch, count, *sample): the inverse of `unpack`."""
    axis, scale = batch_axis(node)
    value = rows.flatten(0, 1 if scale == 1 else 2)
    return value.movedim(0, axis) if axis else value


@dataclass(frozen=True, eq=False)
class Rows:
    """`count` linear functions of a node's value for each of `batch` samples (batch 1: shared by all samples).

    Args: `values`: coefficients in the layout of the network.
    """

    values: Tensor
    batch: int
    count: int

    def unpacked(self, node: Node) -> Tensor:
        """(batch, count, *sample)."""
        return unpack(node, self.values, self.batch, self.count)

    def widened(self, node: Node, batch: int) -> "Rows":
        """The same functions written out for each sample."""
        if self.batch == batch:
            return self
        rows = self.unpacked(node)
        return Rows(pack(node, rows.expand(batch, *rows.shape[1:])), batch, self.count)
