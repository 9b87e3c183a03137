r"""Planes that hold the product of two numbers between them on a box (McCormick 1976).

Below, $x y \ge y_l x + x_l y - x_l y_l$ and $x y \ge y_u x + x_u y - x_u y_u$; any mean of the two holds, and its
share is the free parameter. Above, the same with the ends of x exchanged.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from corollary.verify.relaxations.lines import rounded_down, rounded_up


@dataclass(frozen=True, eq=False)
class ProductLines:
    """lower_slope_a a + lower_slope_b b + lower_offset <= a b <= upper_slope_a a + upper_slope_b b + upper_offset."""

    lower_slope_a: Tensor
    lower_slope_b: Tensor
    lower_offset: Tensor
    upper_slope_a: Tensor
    upper_slope_b: Tensor
    upper_offset: Tensor


def product_lines(
    lower_a: Tensor,
    upper_a: Tensor,
    lower_b: Tensor,
    upper_b: Tensor,
    lower_free: Tensor | None = None,
    upper_free: Tensor | None = None,
) -> ProductLines:
    """Planes below and above a b for a in [lower_a, upper_a] and b in [lower_b, upper_b], entrywise.

    Args:
        lower_a, ...: ends of the boxes, of shapes that broadcast; a box with an infinite end gets constants.
        lower_free, upper_free: shares in [0, 1] of the plane through the corner (lower_a, lower_b), and of that through
            (lower_a, upper_b); None: 1/2, with which both are as tight at the middle of the box as any.
    """
    ends = torch.broadcast_tensors(lower_a, upper_a, lower_b, upper_b)
    finite = torch.stack([torch.isfinite(end) for end in ends]).all(0)
    everywhere = bool(finite.all())
    a_low, a_high, b_low, b_high = ends if everywhere else (torch.where(finite, end, 0.0) for end in ends)
    low = torch.full((), 0.5, dtype=a_low.dtype, device=a_low.device) if lower_free is None else lower_free
    high = torch.full((), 0.5, dtype=a_low.dtype, device=a_low.device) if upper_free is None else upper_free
    size = torch.maximum(a_low.abs(), a_high.abs()) * torch.maximum(b_low.abs(), b_high.abs())
    below = -torch.lerp(a_high * b_high, a_low * b_low, low)
    above = -torch.lerp(a_high * b_low, a_low * b_high, high)
    below, above = rounded_down(below, 4 * size), rounded_up(above, 4 * size)
    if not everywhere:
        corners = torch.stack([(a * b).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
                               for a in ends[:2] for b in ends[2:]])  # fmt: skip
        below, above = torch.where(finite, below, corners.amin(0)), torch.where(finite, above, corners.amax(0))
    return ProductLines(
        lower_slope_a=torch.lerp(b_high, b_low, low),
        lower_slope_b=torch.lerp(a_high, a_low, low),
        lower_offset=below,
        upper_slope_a=torch.lerp(b_low, b_high, high),
        upper_slope_b=torch.lerp(a_high, a_low, high),
        upper_offset=above,
    )
