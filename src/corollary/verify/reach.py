"""Where an attack may go: a ball around each input, cut to the range that inputs have, and the steps inside it."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.verify.sets import Ball

Norm: TypeAlias = float | int | Literal["linf", "l2"]
"""Infinity or 2, as a number or by name."""
Clip: TypeAlias = tuple[float | int | Tensor, float | int | Tensor]
"""The least and the greatest value of an input; tensors broadcast against a sample (one range a channel, say)."""
Rows: TypeAlias = Tensor | slice


def order_of(norm: Norm) -> float:
    """The norm as a number, infinity or 2.

    Raises: BadInput, for any other.
    """
    order = {"linf": math.inf, "l2": 2.0}.get(norm, math.nan) if isinstance(norm, str) else float(norm)
    if order not in (2.0, math.inf):
        raise BadInput(f"the norm of a perturbation is infinity ('linf', math.inf) or 2 ('l2'), got {norm!r}")
    return order


def within(points: Float[Tensor, "*shape"], clip: Clip | None) -> Float[Tensor, "*shape"]:
    """`points` with every entry moved into the range `clip`."""
    if clip is None:
        return points
    low, high = (torch.as_tensor(end, dtype=points.dtype, device=points.device) for end in clip)
    return torch.clamp(points, low, high)


def refuse_out_of_range(x: Float[Tensor, "batch *input"], clip: Clip | None) -> None:
    """Raises: BadInput, if inputs lie outside of `clip`, where an attack could not leave them."""
    if clip is None:
        return
    low, high = (torch.as_tensor(end, dtype=x.dtype, device=x.device) for end in clip)
    least, greatest = x.aminmax() if low.ndim == high.ndim == 0 else (x, x)  # one pass over x instead of several
    if bool((least < low).any() | (greatest > high).any()):
        raise BadInput(
            f"inputs run from {float(x.min()):g} to {float(x.max()):g}, out of the range clip={clip}: "
            "give the range that your inputs have, or clip=None"
        )


@final
@dataclass(frozen=True, eq=False)
class Reach:
    """Where an attack may go: a ball around each input, cut to the range that inputs have."""

    ball: Ball
    clip: Clip | None

    @property
    def radii(self) -> Tensor:
        """(batch, 1, ..., 1)."""
        return column(self.ball.radii, self.ball.center).expand(len(self.ball), *ones_of(self.ball.center))

    def repeated(self, times: int) -> "Reach":
        """All the balls, `times` over."""
        center = self.ball.center.repeat(times, *ones_of(self.ball.center))
        return Reach(Ball(center, self.radii.flatten().repeat(times), self.ball.norm), self.clip)

    @cached_property
    def box(self) -> tuple[Tensor, Tensor]:
        """The ends of the balls of the largest norm, cut to the range."""
        center = self.ball.center
        return within(center - self.radii, self.clip), within(center + self.radii, self.clip)

    def project(self, points: Tensor, rows: Rows) -> Tensor:
        """The point of the ball nearest to each of `points`, then moved into the range, which stays in the ball.

        `points` may be overwritten: fresh memory for each step of an attack would cost more than the arithmetic.
        """
        if math.isinf(self.ball.norm):
            return points.clamp_(self.box[0][rows], self.box[1][rows])
        center, radii = self.ball.center[rows], self.radii[rows]
        change = points - center
        norms = norms_of(change)
        return within(center + change * torch.where(norms > radii, radii / norms, 1), self.clip)

    def draw(self, generator: torch.Generator) -> Tensor:
        """A uniform point of each ball, moved into the range."""
        center = self.ball.center
        options: dict[str, Any] = {"generator": generator, "dtype": center.dtype, "device": center.device}
        if math.isinf(self.ball.norm):
            change = 2 * torch.rand(center.shape, **options) - 1
        else:
            change = torch.randn(center.shape, **options)
            share = torch.rand((len(center), *ones_of(center)), **options)
            change = change / norms_of(change) * share ** (1 / center[0].numel())
        return within(center + self.radii * change, self.clip)


def unit_step(gradient: Tensor, order: float) -> Tensor:
    """For each sample the change of norm 1 along which its gradient rises most; zero where the gradient is."""
    if math.isinf(order):
        return gradient.sign()
    largest = gradient.abs().amax(tuple(range(1, gradient.ndim)), keepdim=True)
    scaled = gradient / torch.where(largest > 0, largest, 1)  # squares of small gradients would round to zero
    norms = norms_of(scaled)
    return scaled / torch.where(norms > 0, norms, 1)


def norms_of(x: Tensor) -> Tensor:
    """Euclidean norm of each sample, (batch, 1, ..., 1)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).reshape(-1, *ones_of(x))


def ones_of(x: Tensor) -> tuple[int, ...]:
    """A 1 for each axis of a sample, so that one number a sample broadcasts."""
    return (1,) * (x.ndim - 1)


def column(values: float | int | Tensor, x: Tensor) -> Tensor:
    """One number, or one a sample, as (1 or batch, 1, ..., 1) in the dtype of `x`."""
    return torch.as_tensor(values, dtype=x.dtype, device=x.device).reshape(-1, *ones_of(x))
