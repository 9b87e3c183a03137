"""Moves on pixels: the finite grid of images that they reach, and how far from the original an image on it is."""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int64, Num
from torch import Tensor

from corollary.base.errors import BadInput

Manipulation: TypeAlias = Literal["max", "white"] | int | float
"""What a move does to a pixel: "max" takes each channel to the farther of 0 and 1, "white" all channels to 1, and a
number tau moves them by +tau or -tau, never beyond 0 and 1."""
Norm: TypeAlias = int | float
NORMS = (0, 1, 2, math.inf)


@dataclass(frozen=True, eq=False)
class PixelGrid:
    """The images that moves reach, each told by one whole number a pixel: its level, 0 for the original.

    At level k a pixel is the original plus k tau, cut off at 0 and 1; for "max" and "white", level 1 is the far end.
    Counting levels makes undoing a move exact, also where a move was cut off.

    Args:
        images: originals, (image, channel, height, width).
        lowest, highest: ends of the levels, (image, pixel); beyond them nothing changes any more.
        target: images at level 1, for "max" and "white"; None for a step.
    """

    images: Float[Tensor, "image channel height width"]
    manipulation: Manipulation
    lowest: Int64[Tensor, "image pixel"]
    highest: Int64[Tensor, "image pixel"]
    target: Float[Tensor, "image channel height width"] | None

    @staticmethod
    def of(images: Float[Tensor, "image channel height width"], manipulation: Manipulation) -> "PixelGrid":
        """The grid around each of `images`. Raises: BadInput, for an unknown manipulation or tau outside (0, 1]."""
        if isinstance(manipulation, str):
            if manipulation not in ("max", "white"):
                raise BadInput(f"a manipulation is 'max', 'white' or a step tau, got {manipulation!r}")
            farther = (images < 0.5).to(images)
            target = farther if manipulation == "max" else torch.ones_like(images)
            highest = (target != images).any(1).flatten(1).long()
            return PixelGrid(images, manipulation, torch.zeros_like(highest), highest, target)
        refuse_step(manipulation)
        highest = _steps(1 - images, manipulation).amax(1).flatten(1)
        lowest = -_steps(images, manipulation).amax(1).flatten(1)
        return PixelGrid(images, manipulation, lowest, highest, None)

    def at(
        self, levels: Int64[Tensor, "row pixel"], numbers: Int64[Tensor, "row"]
    ) -> Float[Tensor, "row channel height width"]:
        """The images at `levels`; `numbers` says on whose grid each row is."""
        originals = self.images[numbers]
        shaped = levels.reshape(len(levels), 1, *originals.shape[2:])
        if self.target is not None:
            return torch.where(shaped != 0, self.target[numbers], originals)
        moved = (originals + shaped.to(originals) * float(self.manipulation)).clamp(0, 1)
        return torch.where(shaped != 0, moved, originals)

    @property
    def is_one_way(self) -> bool:
        """Whether pixels can only be moved one way, once."""
        return self.target is not None


def refuse_step(tau: Norm) -> None:
    """Raises: BadInput, for a step outside (0, 1]."""
    if not 0 < tau <= 1:
        raise BadInput(f"a step tau lies in (0, 1], since pixels lie in [0, 1]; got {tau}")


def refuse_norm(norm: Norm, *, allowed: tuple[Norm, ...] = NORMS) -> None:
    """Raises: BadInput, for a norm that is not among `allowed`."""
    if norm not in allowed:
        raise BadInput(f"the norm is one of {', '.join(map(str, allowed))}, got {norm!r}")


def severity(
    images: Float[Tensor, "row channel height width"], originals: Float[Tensor, "row channel height width"], norm: Norm
) -> Float[Tensor, "row"]:
    """The distance of images from their originals in an L-norm; norm 0 counts pixels, not channels."""
    change = (images - originals).abs()
    if norm == 0:
        return (change > 0).any(1).flatten(1).sum(1).to(images)
    return torch.linalg.vector_norm(change.flatten(1), ord=float(norm), dim=1)


def _steps(room: Num[Tensor, "*shape"], tau: Norm) -> Int64[Tensor, "*shape"]:
    """Steps of `tau` that it takes to cover `room`; rounding errors are no step of their own."""
    return torch.ceil(room.double() / tau - 1e-6).long()
