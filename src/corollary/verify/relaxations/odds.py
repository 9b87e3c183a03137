r"""Lines of log-odds $x_k - \log \sum_{i \neq k} e^{x_i}$ on a box.

The logarithm of a sum of exponentials is convex: its tangent at the middle of the box lies below it. Above it lies the
logarithm of the sum of their chords, which is concave, and so below its own tangent at the middle.

Source: Wei et al. 2023, arXiv 2303.01713, which bounds the softmax by such sums.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from corollary.verify.relaxations.lines import rounded_down, rounded_up, smallest_width


@dataclass(frozen=True, eq=False)
class OddsLines:
    """x_k - lower_weights_k . x + lower_offset_k <= z_k <= x_k - upper_weights_k . x + upper_offset_k.

    Args: weights: (..., n, n), zero on the diagonal; offsets: (..., n), infinite where a box is not finite.
    """

    lower_weights: Tensor
    lower_offset: Tensor
    upper_weights: Tensor
    upper_offset: Tensor


def odds_lines(lower: Tensor, upper: Tensor) -> OddsLines:
    """Lines of the log-odds of entries along the last axis, on boxes (..., n)."""
    finite = (torch.isfinite(lower) & torch.isfinite(upper)).all(-1, keepdim=True)
    low, high = torch.where(finite, lower, 0.0), torch.where(finite, upper, 0.0)
    radius = (high - low) / 2
    middle = low + radius
    own = torch.eye(middle.shape[-1], dtype=torch.bool, device=middle.device)
    others = middle[..., None, :].expand(*middle.shape, -1).masked_fill(own, -torch.inf)
    total = others.logsumexp(-1)
    tangent = (others - total[..., None]).exp()
    chord, level = _chords(middle, others, tangent, radius)
    reach = torch.maximum(low.abs(), high.abs())
    below, above = (
        at_middle - (weights @ middle[..., None])[..., 0]
        for weights, at_middle in ((tangent, total), (chord, level))
    )  # fmt: skip
    sizes = (tangent + chord.abs()) @ (reach + (1 + reach) * radius)[..., None]
    size = 4 * (1 + level.abs() + reach + sizes[..., 0])
    return OddsLines(
        chord,
        torch.where(finite, rounded_down(-above, size), -torch.inf),
        tangent,
        torch.where(finite, rounded_up(-below, size), torch.inf),
    )


def _chords(middle: Tensor, others: Tensor, share: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    r"""A plane above $\log \sum_i e^{x_i}$ for each row: its weights (..., n, n) and its value at the middle (..., n).

    With y = m share . x, the sum is $e^y \sum_i e^{x_i - y}$ for every m, and the chords are those of the differences.
    Their boxes are narrower than those of x where one entry makes up most of the sum; m is the best to second order.

    Args: `others`: the middles, (..., n, n), minus infinity where left out; `share`: of the sum, zero there.
    """
    half = radius[..., None, :]
    mean = (share * half).sum(-1, keepdim=True)
    change = mean - 2 * share * half
    spread = (share * change.square()).sum(-1, keepdim=True)
    part = (-(share * half * change).sum(-1, keepdim=True) / spread.clamp_min(smallest_width(half.dtype))).clamp(0, 1)
    y = part * share
    width = (half + part * change).clamp_min(0) + 4 * torch.finfo(half.dtype).eps * (half + mean)
    y_middle = y @ middle[..., None]
    center = others - y_middle
    # A chord at the middle is e^c cosh(w), and its slope e^c sinh(w) / w: both by their logarithms.
    height = center + width + torch.log1p(torch.exp(-2 * width)) - math.log(2)
    twice = torch.where(width > 0, 2 * width, 1.0)
    ratio = torch.where(width > 0, -torch.expm1(-twice) / twice, 1.0)
    level = height.logsumexp(-1, keepdim=True)
    slope = (center + width + ratio.log() - level).exp()
    return y * (1 - slope.sum(-1, keepdim=True)) + slope, (level + y_middle)[..., 0]
