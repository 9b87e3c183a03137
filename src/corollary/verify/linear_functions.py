"""Linear functions, many for each sample: their least values over regions, and what lines make of them."""

import torch
from torch import Tensor

from corollary.verify.relaxations import Lines
from corollary.verify.sets import Box, Region


def below(rows: Tensor, lines: Lines) -> tuple[Tensor, Tensor]:
    """The coefficients and constant of a linear function below `rows` of the op's value, where lines bound it.

    Args: `rows`: (batch or 1, count, entries); lines: (batch, count or 1, entries).
    Returns: (batch, count, entries) and (batch, count).
    """
    negative = rows.clamp(max=0)
    flat = torch.addcmul(rows * lines.lower_slope, negative, lines.upper_slope - lines.lower_slope)
    shift = rows.new_zeros(())
    low, high = lines.lower_offset, lines.upper_offset
    if low is not None:
        shift = shift + dot(rows - negative, low)
    if high is not None:
        shift = shift + dot(negative, high)
    return flat, shift


def dot(rows: Tensor, values: Tensor) -> Tensor:
    """Sums of rows times values: (a, count, entries) with (b, count or 1, entries) or (b, entries)."""
    if values.ndim == 3 and values.shape[1] > 1:
        return (rows * values).sum(2)
    flat = values.reshape(values.shape[0], values.shape[-1])
    if rows.shape[0] == 1:
        return flat @ rows[0].T
    if flat.shape[0] == 1:
        return rows @ flat[0]
    return torch.bmm(rows, flat[..., None])[..., 0]


def least(slopes: Tensor, region: Region) -> Tensor:
    """The least value of linear functions over a region, (batch, count).

    Args: `slopes`: (batch or 1, count, entries).
    """
    if isinstance(region, Box):
        return dot(slopes, region.center.flatten(1)) - dot(slopes.abs(), region.radius.flatten(1))
    steepness = torch.linalg.vector_norm(slopes, ord=region.dual_norm, dim=2)
    return dot(slopes, region.center.flatten(1)) - region.radii[:, None] * steepness


def greatest(slopes: Tensor, region: Region) -> Tensor:
    """The largest size of the sums of linear functions over a region, (batch, count); no gradient."""
    box = region if isinstance(region, Box) else region.box()
    reach = torch.maximum(box.lower.abs(), box.upper.abs()).flatten(1)
    return dot(slopes.detach().abs(), reach)


def summed_to(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(batch, count, *wide) summed over the axes along which `shape` was broadcast."""
    extra = value.ndim - 2 - len(shape)
    if extra:
        value = value.flatten(2, 1 + extra).sum(2)
    axes = [i + 2 for i, size in enumerate(shape) if size == 1 and value.shape[i + 2] != 1]
    return value.sum(axes, keepdim=True) if axes else value
