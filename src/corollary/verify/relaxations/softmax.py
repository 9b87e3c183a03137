r"""Planes that hold a softmax between them on a box, all entries read at once.

With chords $\kappa_i x_i + \beta_i \ge e^{x_i}$ and their sum SE(x), the function $L_k(x) = e^{x_k} / SE(x)$ is convex
and below softmax k. With constants $p_- \le p_k \le p_+$ on the box, the chord $a + c \log p$ of p as a convex function
of log p gives $U_k(x) = a + c (x_k - \mathrm{logsumexp}(x))$, concave and above. The planes are tangents of both.

Source: Shi et al. 2025, arXiv 2405.21063; bounds of this form: Wei et al. 2023, arXiv 2303.01713.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from corollary.verify.relaxations.lines import rounded_down, rounded_up, smallest_width


@dataclass(frozen=True, eq=False)
class SoftmaxLines:
    """lower_slope x + lower_offset <= softmax(x) <= upper_slope x + upper_offset; slopes (..., output, input)."""

    lower_slope: Tensor
    lower_offset: Tensor
    upper_slope: Tensor
    upper_offset: Tensor


def softmax_range(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the smallest and of the largest value of each entry of a softmax on boxes: each is attained.

    Args: `lower`, `upper`: (..., k), as what is returned.
    """
    return -_log_one_plus_others(upper, lower), -_log_one_plus_others(lower, upper)


def _log_one_plus_others(others: Tensor, own: Tensor) -> Tensor:
    """log(1 + sum over i != k of exp(others_i - own_k))."""
    differences = others[..., None, :] - own[..., :, None]
    itself = torch.eye(own.shape[-1], dtype=torch.bool, device=own.device)
    return torch.logsumexp(torch.where(itself, 0.0, differences), dim=-1)


def softmax_lines(lower: Tensor, upper: Tensor, position: Tensor | None = None) -> SoftmaxLines:
    """Planes below and above each entry of the softmax over the last axis, on finite boxes.

    Args:
        lower, upper: (..., k).
        position: of the point of tangency in the box, in [0, 1], broadcasting against it; None: the middle.
    """
    share = torch.full_like(lower, 0.5) if position is None else position
    point = torch.lerp(lower, upper, share)
    below, below_offset = _tangents_below(lower, upper, point)
    above, above_offset = _tangents_above(lower, upper, point)
    return SoftmaxLines(below, below_offset, above, above_offset)


def _tangents_below(lower: Tensor, upper: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """Tangents of e^{x_k} / SE(x) at the point; all exponents are taken less the largest upper end, which cancels."""
    top = upper.detach().amax(-1, keepdim=True)
    low, high, x = lower - top, upper - top, point - top
    at_low, at_high = torch.exp(low), torch.exp(high)
    chord = (at_high - at_low) / (high - low).clamp_min(smallest_width(low.dtype))
    chord = torch.minimum(torch.maximum(chord, at_low), at_high)
    constant = torch.maximum(at_low - chord * low, at_high - chord * high)
    total = (chord * x + constant).sum(-1, keepdim=True)
    value = torch.exp(x) / total
    slope = torch.diag_embed(value) - (value / total)[..., :, None] * chord[..., None, :]
    return slope, _offset(slope, point, value, lower, upper, down=True)


def _tangents_above(lower: Tensor, upper: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """Tangents of a + c log softmax(x) at the point."""
    log_least, log_most = softmax_range(lower, upper)
    least, most = torch.exp(log_least), torch.exp(log_most)
    chord = (most - least) / (log_most - log_least).clamp_min(smallest_width(lower.dtype))
    chord = torch.minimum(torch.maximum(chord, least), most)
    constant = torch.maximum(least - chord * log_least, most - chord * log_most)
    log_value = torch.log_softmax(point, dim=-1)
    slope = torch.diag_embed(chord) - chord[..., :, None] * torch.exp(log_value)[..., None, :]
    value = constant + chord * log_value
    return slope, _offset(slope, point, value, lower, upper, down=False)


def _offset(slope: Tensor, point: Tensor, value: Tensor, lower: Tensor, upper: Tensor, *, down: bool) -> Tensor:
    """value - slope point, moved outward by the rounding error of the sum."""
    farthest = torch.maximum(lower.abs(), upper.abs())
    size = (slope.abs() @ farthest[..., None])[..., 0] * 4
    offset = value - (slope @ point[..., None])[..., 0]
    # The values themselves come from sums and exponentials of a few roundings each.
    return (
        rounded_down(offset, size, 16 * value) if down else rounded_up(offset, size, 16 * value, torch.ones_like(value))
    )
