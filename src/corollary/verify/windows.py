"""Rows that are zero outside a small window of a feature map: those of one neuron of a convolutional layer.

Carried back through a convolution a window stays a window, only wider, so that a row costs what its receptive field
holds and not what the map holds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from corollary.graph import Node
from corollary.graph.ops import Convolution, Elementwise
from corollary.verify.layout import Rows
from corollary.verify.prepared import Prepared

MATRIX = 2**19
"""A convolution of windows is written out as a matrix of up to so many entries."""


@dataclass(frozen=True, eq=False)
class Windows:
    """`count` linear functions of a feature map for each of `batch` samples, each within a window.

    Args:
        values: (batch * count, channels, height, width) of the windows; zero where a window lies outside the map.
        origin: row and column of each window's first entry in the map, (batch * count, 2).
        size: (channels, height, width) of the map.
    """

    values: Tensor
    origin: Tensor
    size: tuple[int, int, int]
    batch: int
    count: int

    def dense(self) -> Rows:
        """The same functions on the whole map."""
        values = self.values
        for axis in (0, 1):
            length, window = self.size[1 + axis], values.shape[2 + axis]
            place = torch.arange(length, device=values.device) - self.origin[:, axis, None]
            inside = (place >= 0) & (place < window)
            shape = (len(place), 1, length, 1) if axis == 0 else (len(place), 1, 1, length)
            index = place.clamp(0, window - 1).reshape(shape)
            wide = list(values.shape)
            wide[2 + axis] = length
            values = values.gather(2 + axis, index.expand(wide)) * inside.reshape(shape)
        return Rows(values, self.batch, self.count)

    def taken(self, maps: Tensor) -> Tensor:
        """The part of maps (batch or 1, channels, height, width) under each window; zero outside the map."""
        height, width = self.values.shape[2:]
        padded = F.pad(maps, (width, width, height, height)).flatten(2)
        across = self.size[2] + 2 * width
        row = (self.origin[:, 0] + height).clamp(0, self.size[1] + height)
        column = (self.origin[:, 1] + width).clamp(0, self.size[2] + width)
        within = torch.arange(height, device=maps.device)[:, None] * across + torch.arange(width, device=maps.device)
        index = ((row * across + column)[:, None] + within.flatten()).reshape(self.batch, self.count, 1, height * width)
        shape = (self.batch, self.count, self.size[0], height * width)
        source = padded[:, None].expand(self.batch, self.count, -1, -1)
        return source.gather(3, index.expand(shape)).reshape(-1, self.size[0], height, width)

    def with_values(self, values: Tensor) -> "Windows":
        """Other values in the same windows."""
        return Windows(values, self.origin, self.size, self.batch, self.count)

    def same_place(self, other: "Windows") -> bool:
        """Whether the windows of both lie at the same places."""
        return self.values.shape == other.values.shape and torch.equal(self.origin, other.origin)

    def widened(self, batch: int) -> "Windows":
        """The same functions written out for each sample."""
        if self.batch == batch:
            return self
        return Windows(self.values.repeat(batch, 1, 1, 1), self.origin.repeat(batch, 1), self.size, batch, self.count)

    def through(self, network: Prepared, node: Node, weight: Tensor) -> "Windows":
        """The functions of a convolution's output as ones of its input."""
        op, size = node.op, map_size(node.inputs[0])
        assert isinstance(op, Convolution)
        channels, height, width = self.values.shape[1:]
        entries = channels * height * width
        wide = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(
            (height, width), op.stride, op.dilation, weight.shape[2:], strict=True)]  # fmt: skip
        if entries * size[0] * wide[0] * wide[1] <= MATRIX:  # one product of matrices is faster on small windows
            key = (node, height, width)
            if key not in network.matrices:
                unit = torch.eye(entries, dtype=weight.dtype, device=weight.device)
                unit = unit.reshape(-1, channels, height, width)
                network.matrices[key] = _transposed(unit, op, weight).flatten(1)
            matrix = network.matrices[key]
            values = (self.values.flatten(1) @ matrix).reshape(-1, size[0], *wide)
        else:
            values = _transposed(self.values, op, weight)
        stride, padding = torch.tensor([op.stride, op.padding], device=self.origin.device)
        return Windows(values, self.origin * stride - padding, size, self.batch, self.count).inside()

    def inside(self) -> "Windows":
        """The windows with zeros where they lie outside the map."""
        values = self.values
        for axis in (0, 1):
            length, window = self.size[1 + axis], values.shape[2 + axis]
            first = self.origin[:, axis]
            if bool((first >= 0).all()) and bool((first + window <= length).all()):
                continue
            place = first[:, None] + torch.arange(window, device=values.device)
            kept = ((place >= 0) & (place < length)).to(values.dtype)
            values = values * (kept[:, None, :, None] if axis == 0 else kept[:, None, None, :])
        return self.with_values(values)

    @property
    def worthwhile(self) -> bool:
        """Whether the windows are smaller than the map."""
        return self.values[0].numel() * 4 <= 3 * self.size[0] * self.size[1] * self.size[2]


def _transposed(values: Tensor, op: Convolution, weight: Tensor) -> Tensor:
    return F.conv_transpose2d(values, weight, stride=op.stride, dilation=op.dilation, groups=op.groups)


def has_windows(network: Prepared, node: Node) -> bool:
    """Whether a neuron of the node reads a window of a feature map."""
    return (
        isinstance(node.op, Convolution)
        and len(node.op.stride) == 2
        and network.moving(node) == (0,)
        and node.inputs[1] not in network.perturbed
        and len(node.shape) == 4
    )


def map_size(node: Node) -> tuple[int, int, int]:
    """(channels, height, width) of a feature map."""
    channels, height, width = (size for size in node.shape[1:] if isinstance(size, int))
    return channels, height, width


def first_windows(node: Node, op: Convolution, weight: Tensor, index: Tensor, sign: Tensor) -> Windows:
    """Signed single entries of a convolution's output as windows of its input; `index`, `sign`: (batch, count)."""
    _, height, width = map_size(node)
    flat = index.reshape(-1)
    channel, place = flat // (height * width), flat % (height * width)
    position = torch.stack([place // width, place % width], 1)
    values = weight[channel] * sign.reshape(-1, 1, 1, 1)
    if op.groups > 1:  # the channels of other groups are not read
        each, out = weight.shape[1], weight.shape[0] // op.groups
        full = values.new_zeros(len(flat), each * op.groups, *values.shape[2:])
        taken = (channel // out * each)[:, None] + torch.arange(each, device=flat.device)
        values = full.scatter(1, taken[:, :, None, None].expand_as(values), values)
    if any(step > 1 for step in op.dilation):
        spread = [step * (k - 1) + 1 for step, k in zip(op.dilation, values.shape[2:], strict=True)]
        full = values.new_zeros(*values.shape[:2], *spread)
        full[:, :, :: op.dilation[0], :: op.dilation[1]] = values
        values = full
    stride, padding = torch.tensor([op.stride, op.padding], device=flat.device)
    batch, count = index.shape
    return Windows(values, position * stride - padding, map_size(node.inputs[0]), batch, count).inside()


def row_width(network: Prepared, start: Node) -> int:
    """The most coefficients that one row from an entry of `start` takes on its way back."""
    widest = max(network.sizes[node] for node in network.perturbed if node in network.upstream(start))
    if not has_windows(network, start):
        return widest
    node, reach, most = start, (1, 1), 1
    while True:
        if isinstance(node.op, Convolution) and has_windows(network, node):
            op, kernel = node.op, node.inputs[1].shape[2:]
            reach = tuple(
                (r - 1) * s + d * (int(k) - 1) + 1  # type: ignore[arg-type]  # sizes of a feature map are numbers
                for r, s, d, k in zip(reach, op.stride, op.dilation, kernel, strict=True)
            )
            channels, height, width = map_size(node.inputs[0])
            most = max(most, channels * min(reach[0], height) * min(reach[1], width))
        elif not isinstance(node.op, Elementwise):
            return most if not node.inputs else widest
        node = node.inputs[0]
        if not node.inputs:
            return most
