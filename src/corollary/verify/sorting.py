"""Activations that permute or reflect small groups of entries, and so keep every gradient's length."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corollary.base.errors import BadInput


class GroupSort(nn.Module):
    """Sorts each group of `size` consecutive channels, largest first; (batch, channel, *position).

    A sort only permutes its entries: it has Lipschitz constant 1 in every p-norm, keeps the sum of each group, and its
    Jacobian is orthogonal almost everywhere.

    Raises: BadInput, for a size below 1, or inputs whose channels do not divide into groups.
    Source: Anil, Lucas and Grosse 2019, arXiv 1811.05381.
    """

    def __init__(self, size: int):
        super().__init__()
        if size < 1:
            raise BadInput(f"GroupSort needs groups of at least one channel, got size {size}")
        self.size = size

    def forward(self, x: Float[Tensor, "batch channel *position"]) -> Float[Tensor, "batch channel *position"]:
        """The channels, each group in descending order."""
        groups = x.unflatten(1, (grouped(x.shape[1], self.size, type(self).__name__), self.size))
        return groups.sort(dim=2, descending=True).values.flatten(1, 2)

    def extra_repr(self) -> str:
        """The group size."""
        return f"size={self.size}"


class MaxMin(GroupSort):
    """(max(a, b), min(a, b)) of the channels (a, b) = (2i, 2i + 1): GroupSort in pairs.

    Source: Anil, Lucas and Grosse 2019, arXiv 1811.05381; Chernodub and Nowicki 2016, arXiv 1604.02313.
    """

    def __init__(self) -> None:
        super().__init__(2)

    def extra_repr(self) -> str:
        """Nothing to choose."""
        return ""


class Householder(nn.Module):
    r"""Reflects each group z of consecutive channels into the half space $v^\top z \ge 0$; (batch, channel, *position).

    $\phi(z) = z$ where $v^\top z > 0$, and $(I - 2 v v^\top) z$ elsewhere, with v of length 1. The direction is learnt;
    it is normalised in each pass, so that a step of training cannot change the Lipschitz constant, 1. In pairs with
    v = (1, -1) / sqrt(2) it is MaxMin, which is where training starts if only the channels are given.

    Args:
        direction: the number of channels (pairs, each with a direction of its own), or directions: (size,) shared by
            all groups, or (group, size).
    Raises: BadInput, for an odd number of channels, directions of length zero or of another shape, or inputs whose
        channels do not divide into groups.
    Source: Singla, Singla and Feizi 2022, arXiv 2108.04062.
    """

    def __init__(self, direction: int | Tensor):
        super().__init__()
        if isinstance(direction, int):
            pair = torch.tensor([1.0, -1.0]) / math.sqrt(2)
            direction = pair.expand(grouped(direction, 2, "Householder"), 2).clone()
        if direction.ndim not in (1, 2) or not direction.is_floating_point():
            raise BadInput(
                "Householder needs the number of channels, or real directions of shape (size,) or (group, size), got "
                f"{direction.dtype} of shape {tuple(direction.shape)}"
            )
        if not bool((direction.norm(dim=-1) > 0).all()):
            raise BadInput("Householder needs directions of positive length; one of those given is zero")
        self.direction = nn.Parameter(direction.detach().clone())

    @property
    def size(self) -> int:
        """Channels of a group."""
        return self.direction.shape[-1]

    def unit(self) -> Float[Tensor, "*group size"]:
        """The directions, of length 1."""
        return self.direction / torch.linalg.vector_norm(self.direction, dim=-1, keepdim=True)

    def forward(self, x: Float[Tensor, "batch channel *position"]) -> Float[Tensor, "batch channel *position"]:
        """The groups, reflected where they point away from their direction."""
        groups = grouped(x.shape[1], self.size, "Householder")
        v = self.unit()
        if v.ndim == 2 and len(v) not in (1, groups):
            raise BadInput(f"Householder has {len(v)} directions and got {groups} groups of {self.size} channels")
        v = v.reshape(1, -1, self.size, *(1,) * (x.ndim - 2))
        z = x.unflatten(1, (groups, self.size))
        away = torch.relu(-(z * v).sum(dim=2, keepdim=True))
        return (z + 2 * away * v).flatten(1, 2)

    def extra_repr(self) -> str:
        """The group size."""
        return f"size={self.size}"


def grouped(channels: int, size: int, name: str) -> int:
    """How many groups of `size` there are in `channels`.

    Raises: BadInput, if they do not come out even.
    """
    if channels % size:
        raise BadInput(f"{name} works on groups of {size} channels, and {channels} channels do not divide into them")
    return channels // size
