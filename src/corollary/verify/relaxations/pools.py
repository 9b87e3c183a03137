"""What holds the largest of several entries on a box: one of the entries, or a constant above all."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from corollary.graph.ops import AdaptiveMaxPool, Max, MaxPool


@dataclass(frozen=True, eq=False)
class MaxLines:
    """Lines of the largest of several entries, for each output.

    The entry `selected` is below the largest everywhere. Above, it is the largest itself where `upper_is_selected`,
    and elsewhere there is the constant.

    Args: each (batch, *output).
        selected: position of the entry among those of one sample, flattened.
        upper_is_selected: whether the entry is never below another of its window.
        upper_constant: largest of the upper ends.
    """

    selected: Tensor
    upper_is_selected: Tensor
    upper_constant: Tensor


def largest_lines(op: Max | MaxPool | AdaptiveMaxPool, lower: Tensor, upper: Tensor) -> MaxLines:
    """Lines of a maximum over axes or windows, on boxes (batch, *sample); the batch is the first axis of the op too.

    The entry selected is the one with the largest lower end.
    """
    windows = _windows(op, tuple(lower.shape[1:])).to(lower.device)
    padding = windows < 0
    least, most = (
        torch.where(padding, -torch.inf, end.flatten(1)[:, windows.clamp_min(0)]) for end in (lower, upper)
    )  # (batch, *output, window)
    best, place = least.max(-1)
    others = most.scatter(-1, place[..., None], -torch.inf).amax(-1)
    selected = windows.expand(place.shape + windows.shape[-1:]).gather(-1, place[..., None])[..., 0]
    return MaxLines(selected, best >= others, most.amax(-1))


@cache
def _windows(op: Max | MaxPool | AdaptiveMaxPool, shape: tuple[int, ...]) -> Tensor:
    """Positions of the entries of each window in a flattened sample, (*output, window); -1 for padding."""
    positions = torch.arange(torch.Size(shape).numel()).reshape(shape)
    if isinstance(op, Max):
        axes = sorted(axis % (len(shape) + 1) - 1 for axis in op.axes)
        others = [axis for axis in range(len(shape)) if axis not in axes]
        windows = positions.permute(*others, *axes).flatten(len(others))
        return windows.reshape(*(1 if i in axes else n for i, n in enumerate(shape)), -1) if op.keep_axes else windows
    spatial = len(op.output) if isinstance(op, AdaptiveMaxPool) else len(op.kernel)
    sizes = op(torch.zeros(1, *shape)).shape[-spatial:]
    windows = positions
    for axis, size in enumerate(sizes):  # each spatial axis becomes (output, window), the window last
        index = _along_axis(op, axis, shape[len(shape) - spatial + axis], size)
        taken = windows.movedim(len(shape) - spatial + axis, -1)[..., index.clamp_min(0)]
        taken = torch.where(index < 0, -1, taken)
        windows = taken.movedim(-2, len(shape) - spatial + axis)
    return windows.flatten(len(shape))


def _along_axis(op: MaxPool | AdaptiveMaxPool, axis: int, length: int, size: int) -> Tensor:
    """Places of the windows along one spatial axis, (output, window); -1 outside."""
    output = torch.arange(size)[:, None]
    if isinstance(op, AdaptiveMaxPool):
        start, stop = output * length // size, -(-(output + 1) * length // size)
        places = start + torch.arange(int((stop - start).max()))
        return torch.where(places < stop, places, -1)
    steps = torch.arange(op.kernel[axis]) * op.dilation[axis]
    places = output * op.stride[axis] - op.padding[axis] + steps
    return torch.where((places >= 0) & (places < length), places, -1)
