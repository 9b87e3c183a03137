"""Where the samples lie in a node's value, and rows of linear functions beside them.

A value has the layout of the network with the samples along one of its axes. Linear functions of it, `count` for each
of `batch` samples, are the rows of a tensor in the same layout with `batch * count` in the place of the samples, so
that the network's own ops act on them. `unpack` brings both to (batch, count, *sample).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from corollary.base.errors import NoRule
from corollary.graph import Node
from corollary.graph.ops import (
    BatchSize,
    Concatenate,
    Expand,
    Flip,
    Gather,
    Op,
    Pad,
    Reshape,
    Select,
    Slice,
    Torch,
)


@dataclass(frozen=True)
class Place:
    """Where samples lie: along `axis`, which is `blocks` blocks of the samples with `side` entries of each together.

    Flattening (time, sample, feature) to one axis gives as many blocks as there are times.
    """

    axis: int
    blocks: int = 1
    side: int = 1

    @property
    def scale(self) -> int:
        """Entries of the axis that belong to one sample."""
        return self.blocks * self.side


@lru_cache(maxsize=65536)
def place(node: Node) -> Place:
    """Where the samples lie in a node's value.

    Raises: NoRule, if they lie along several axes, along none, or are mixed with one another.
    """
    found = [(axis, size) for axis, size in enumerate(node.shape) if isinstance(size, BatchSize)]
    if len(found) != 1 or found[0][1].offset:
        shape = "x".join(map(str, node.shape))
        raise NoRule(f"bounds need the samples along one axis; {node.op} ({node.where()}) has shape {shape}")
    axis, scale = found[0][0], found[0][1].scale
    if isinstance(node.op, Reshape):
        return _reshaped(node, axis, scale)
    if scale == 1:
        return Place(axis)
    sources = [source for source in node.inputs if _has_samples(source)]
    if isinstance(node.op, Expand) and not sources:
        return Place(axis, 1, scale)  # all entries are the same
    if not _moves_along(node.op, axis, len(node.shape)):
        inherited = {(p.blocks, p.side) for s in sources if not _same_for_all(s) for p in [place(s)]}
        if len(inherited) == 1 and all(place(s).scale == scale for s in sources):
            return Place(axis, *inherited.pop())
    raise NoRule(
        f"bounds cannot tell which entries of the output of {node.op} ({node.where()}) belong to one sample: its axis "
        f"{axis} has {scale} of each"
    )


def _reshaped(node: Node, axis: int, scale: int) -> Place:
    """The entries before a sample's, in row-major order, stay as many as they were."""
    source = node.inputs[0]
    before = place(source)
    ahead = before.blocks * math.prod(size for size in source.shape[: before.axis] if isinstance(size, int))
    blocks, rest = divmod(ahead, math.prod(size for size in node.shape[:axis] if isinstance(size, int)))
    if rest or blocks == 0 or scale % blocks:
        raise NoRule(
            f"bounds need samples that are not mixed with one another, as {node.op} ({node.where()}) mixes them"
        )
    return Place(axis, blocks, scale // blocks)


def _has_samples(node: Node) -> bool:
    return any(isinstance(size, BatchSize) for size in node.shape)


def _same_for_all(node: Node) -> bool:
    return isinstance(node.op, Expand) and not _has_samples(node.inputs[0])


def _moves_along(op: Op, axis: int, axes: int) -> bool:
    """Whether an op changes the order of entries along an axis, or takes some of them, or may."""
    if isinstance(op, Slice | Select | Gather | Concatenate):
        return op.axis % axes == axis
    return isinstance(op, Flip | Pad | Torch)


def batch_axis(node: Node) -> tuple[int, int]:
    """The axis along which the samples lie, and how many entries of it belong to each.

    Raises: NoRule, as `place` does.
    """
    found = place(node)
    return found.axis, found.scale


def samples_first(node: Node) -> bool:
    """Whether each sample's entries stand together, one sample after the other."""
    found = place(node)
    return found.axis == 0 and found.blocks == 1


def sample_shape(node: Node) -> tuple[int, ...]:
    """The shape of one sample's share of the value; several entries of the batch axis come first; (1,) for a number."""
    axis, scale = batch_axis(node)
    rest = tuple(size for i, size in enumerate(node.shape) if i != axis and isinstance(size, int))
    return (scale, *rest) if scale > 1 or not rest else rest


def sample_axis(node: Node, axis: int) -> int:
    """The place of an axis of the value among those of one sample, counted from the last."""
    after = len(node.shape) - 1 - axis % len(node.shape)
    return -1 - after + (batch_axis(node)[0] > axis % len(node.shape))


def sample_size(node: Node) -> int:
    """The number of entries of one sample."""
    size = 1
    for length in sample_shape(node):
        size *= length
    return size


def unpack(node: Node, value: Tensor, batch: int, count: int) -> Tensor:
    """(batch, count, *sample) from the layout of the network; a view where the samples come first."""
    at = place(node)
    if at.axis:
        value = value.movedim(at.axis, 0)
    rest = value.shape[1:]
    if at.blocks > 1:
        apart = value.reshape(at.blocks, batch * count, at.side, *rest).movedim(0, 1)
        return apart.reshape(batch, count, at.scale, *rest)
    return value.reshape(batch, count, *sample_shape(node))


def pack(node: Node, rows: Tensor) -> Tensor:
    """The layout of the network from (batch, count, *sample): the inverse of `unpack`."""
    at = place(node)
    if at.blocks > 1:
        rest = rows.shape[3:]
        value = rows.reshape(-1, at.blocks, at.side, *rest).movedim(1, 0).reshape(-1, *rest)
    else:
        value = rows.flatten(0, 1 if at.scale == 1 and len(node.shape) > 1 else 2)
    return value.movedim(0, at.axis) if at.axis else value


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
