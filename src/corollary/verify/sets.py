"""The sets of inputs that a bound ranges over: boxes and balls, one a sample."""

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from corollary.base.errors import BadInput


@dataclass(frozen=True, eq=False)
class Box:
    """All x with `lower` <= x <= `upper`, entrywise; (batch, *input).

    Raises: BadInput, for shapes that differ, NaN, or a lower end above its upper end, naming the entry.
    """

    lower: Tensor
    upper: Tensor

    def __post_init__(self) -> None:
        if self.lower.shape != self.upper.shape or self.lower.ndim == 0:
            raise BadInput(
                f"a box needs ends of one shape (batch, *input), got {tuple(self.lower.shape)} "
                f"and {tuple(self.upper.shape)}"
            )
        wrong = ~(self.lower <= self.upper)
        if wrong.any():
            place = tuple(wrong.nonzero()[0].tolist())
            raise BadInput(
                f"a box needs lower <= upper in every entry; at {place} lower is {float(self.lower[place]):g} "
                f"and upper is {float(self.upper[place]):g}"
            )

    @classmethod
    def trusted(cls, lower: Tensor, upper: Tensor) -> "Box":
        """A box whose ends are known to be in order: nothing is checked."""
        box = object.__new__(cls)
        object.__setattr__(box, "lower", lower)
        object.__setattr__(box, "upper", upper)
        return box

    def __len__(self) -> int:
        return self.lower.shape[0]

    def __getitem__(self, samples: Tensor | slice) -> "Box":
        return Box(self.lower[samples], self.upper[samples])

    @property
    def center(self) -> Tensor:
        """Middle of the box, (batch, *input)."""
        return self.lower + (self.upper - self.lower) / 2

    @property
    def radius(self) -> Tensor:
        """Half the widths, (batch, *input)."""
        return (self.upper - self.lower) / 2

    def to(self, like: Tensor | torch.dtype | torch.device) -> "Box":
        """The box in the dtype (and on the device) of `like`."""
        return Box(self.lower.to(like), self.upper.to(like))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Uniform draws, (count, batch, *input)."""
        share = torch.rand(
            (count, *self.lower.shape), generator=generator, dtype=self.lower.dtype, device=self.lower.device
        )
        return torch.minimum(self.lower + share * (self.upper - self.lower), self.upper)


@dataclass(frozen=True, eq=False)
class Ball:
    """All x with ||x - center||_p <= radius, a ball for each sample, p = `norm` in [1, inf].

    Args:
        center: (batch, *input).
        radius: one number, or one for each sample (batch,).

    Raises: BadInput, for a negative or NaN radius, a norm below 1, or a radius of another length.
    """

    center: Tensor
    radius: float | Tensor
    norm: float = math.inf

    def __post_init__(self) -> None:
        radius = torch.as_tensor(self.radius)
        if not self.norm >= 1:
            raise BadInput(f"a ball needs a norm p >= 1 (1, 2, float('inf'), ...), got {self.norm}")
        if radius.ndim > 1 or (radius.ndim == 1 and len(radius) != len(self.center)):
            raise BadInput(
                f"a ball needs one radius, or one for each of {len(self.center)} samples, got {tuple(radius.shape)}"
            )
        if not bool((radius >= 0).all()) or self.center.isnan().any():
            raise BadInput(f"a ball needs a radius >= 0 and a center without NaN, got radius {self.radius}")

    def __len__(self) -> int:
        return self.center.shape[0]

    def to(self, like: Tensor | torch.dtype | torch.device) -> "Ball":
        """The ball in the dtype (and on the device) of `like`."""
        return Ball(self.center.to(like), self.radii.expand(len(self)).to(like), self.norm)

    def __getitem__(self, samples: Tensor | slice) -> "Ball":
        return Ball(self.center[samples], self.radii.expand(len(self))[samples], self.norm)

    @property
    def radii(self) -> Tensor:
        """The radius of each sample, (batch,) or (1,), in the center's dtype."""
        return torch.as_tensor(self.radius, dtype=self.center.dtype, device=self.center.device).reshape(-1)

    @property
    def dual_norm(self) -> float:
        """q with 1/p + 1/q = 1: the norm in which a linear function's slope is measured over the ball."""
        if self.norm == 1:
            return math.inf
        return 1.0 if math.isinf(self.norm) else self.norm / (self.norm - 1)

    def box(self) -> Box:
        """The smallest box around the ball; the ball itself where p is infinite."""
        radius = self.radii.reshape(-1, *(1,) * (self.center.ndim - 1))
        return Box(self.center - radius, self.center + radius)


Region: TypeAlias = Box | Ball
