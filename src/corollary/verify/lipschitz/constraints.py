r"""What is known of a nonlinearity between two inputs, as quadratic constraints, and how each method encodes it.

Everything is about differences: z and w stand for z - z' and phi(z) - phi(z') of two inputs. An encoding writes
w = C z + V s with free directions s, and quadratic forms in (z, s) that are never negative. Two pieces of knowledge
give them: how far slopes may go (ReLU and its kin), and that a group is mapped without stretching while a part of it is
kept (GroupSort keeps sums; Householder keeps what is orthogonal to its direction).
"""

import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from corollary.base.errors import BadInput

Method: TypeAlias = Literal["eliminate", "group", "chain", "residual-relu"]
Norm: TypeAlias = Literal["l2", "linf"]
MOST_ORDERS = 5040
"""Orders of one sorted group that are listed: those of seven entries."""


@dataclass(frozen=True, eq=False)
class Encoding:
    r"""$w = C z + V s$, and $q_j = \sum_{a \in j} \omega_a (\alpha_a^\top z + \beta_a^\top s)^2 \ge 0$ for each j.

    Args:
        center: C, (output, input). push: V, (output, free).
        from_input, from_free: the rows alpha_a and beta_a, (term, input) and (term, free).
        weight: omega_a, (term,). owner: the multiplier j that each term belongs to, (term,).
        either_sign: multipliers that may be negative, because their form is zero.
        steady: multipliers that hold down the free directions when they are made large.
    """

    center: Float[Tensor, "output input"]
    push: Float[Tensor, "output free"]
    from_input: Float[Tensor, "term input"]
    from_free: Float[Tensor, "term free"]
    weight: Float[Tensor, "term"]
    owner: Int[Tensor, "term"]
    either_sign: Bool[Tensor, "multiplier"]
    steady: Bool[Tensor, "multiplier"]


class Nonlinearity(ABC):
    """A nonlinearity of a network, as far as its Lipschitz constant is concerned."""

    name: str

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Number of entries that come out."""

    @abstractmethod
    def encoding(self, method: Method) -> Encoding:
        """The constraints between two inputs.

        Raises: BadInput, if the method has none for this nonlinearity.
        """

    @abstractmethod
    def gain(self, norm: Norm) -> float:
        """A Lipschitz constant by itself."""

    @property
    @abstractmethod
    def selections(self) -> Float[Tensor, "choice free free"] | None:
        """The matrices that take a group's gauge P z to its s on the pieces of a piecewise-linear one, else None."""


@final
@dataclass(frozen=True, eq=False)
class Slopes(Nonlinearity):
    r"""Entrywise, with slopes between `low` and `high`: $w = \frac{l + h}{2} z + s$, $|s| \le \frac{h - l}{2} |z|$.

    The last is the constraint $(w - l z)(h z - w) \ge 0$ of LipSDP, with its middle moved to zero.

    Args: `pieces`: whether it has these two slopes and no others (ReLU, LeakyReLU, absolute value).
    Source: Fazlyab et al. 2019, arXiv 1906.04893, lemma 1.
    """

    name: str
    low: Float[Tensor, "entry"]
    high: Float[Tensor, "entry"]
    pieces: bool = False

    @property
    def outputs(self) -> int:
        """Number of entries."""
        return len(self.low)

    def encoding(self, method: Method) -> Encoding:
        """One multiplier for each entry; `chain` knows only the largest absolute slope."""
        middle, half = (self.high + self.low) / 2, (self.high - self.low) / 2
        if method == "chain":
            middle, half = torch.zeros_like(middle), torch.maximum(self.high.abs(), self.low.abs())
        each = torch.arange(self.outputs)
        return ball(torch.diag(middle), torch.eye(len(half), dtype=half.dtype), torch.diag(half), each, each)

    def gain(self, norm: Norm) -> float:
        """The largest absolute slope."""
        return float(torch.maximum(self.high.abs(), self.low.abs()).max())

    @property
    def selections(self) -> Float[Tensor, "choice free free"] | None:
        """The two ends of the slopes."""
        return torch.tensor([[[1.0]], [[-1.0]]], dtype=self.low.dtype) if self.pieces else None


@final
@dataclass(frozen=True, eq=False)
class Groups(Nonlinearity):
    """Groups of entries, each mapped with Lipschitz constant 1 by a sort or a reflection that keeps a part of it.

    Args:
        index: places of each group's entries, (group, size).
        turned: orthonormal directions that are not kept, (group, size, free).
        kept: orthonormal directions that are, (group, size, size - free).
        sorts: whether groups are sorted, else reflected.
    Source: Pauli et al. 2024, arXiv 2401.14033, lemmas 1 and 2.
    """

    name: str
    index: Int[Tensor, "group size"]
    turned: Float[Tensor, "group size free"]
    kept: Float[Tensor, "group size kept"]
    sorts: bool

    @property
    def outputs(self) -> int:
        """Number of entries."""
        return self.index.numel()

    def encoding(self, method: Method) -> Encoding:
        """One multiplier a group; `chain` has one more for what is kept, `group` two more, of either sign."""
        turned, kept = self._spread(self.turned), self._spread(self.kept)
        owner = _owners(self.turned)
        match method:
            case "eliminate":
                return ball(kept @ kept.T, turned, turned.T, owner, owner)
            case "chain":
                both, owner = torch.cat([turned, kept], dim=1), torch.cat([owner, len(owner) + _owners(self.kept)])
                owner = torch.unique(owner, return_inverse=True)[1]
                return ball(torch.zeros_like(both), both, both.T, owner, owner)
            case "group":
                return self._with_equalities(kept.T)
            case "residual-relu":
                return self._as_two_relus(kept)

    def _spread(self, basis: Float[Tensor, "group size k"]) -> Float[Tensor, "entry column"]:
        """The columns of all groups in the space of all entries."""
        groups, size, k = basis.shape
        spread = basis.new_zeros(groups * size, groups * k)
        columns = torch.arange(groups * k).reshape(groups, 1, k)
        spread[self.index[:, :, None], columns] = basis
        return spread

    def _with_equalities(self, keep: Float[Tensor, "kept entry"]) -> Encoding:
        r"""s = w; $\|z\|^2 - \|w\|^2$, and, being zero, $2 w^\top J (z - w)$ and $2 z^\top J (w - z)$.

        J projects on what is kept. Products are written as differences of squares. The lemma's third free multiplier,
        of $z^\top J z - w^\top J w$, is half the difference of the other two and adds nothing.
        """
        groups, (kept, n) = len(self.index), keep.shape
        one, none, nothing = torch.eye(n, dtype=keep.dtype), torch.zeros(n, n, dtype=keep.dtype), torch.zeros_like(keep)
        entry = torch.empty(n, dtype=torch.long)
        entry[self.index.flatten()] = torch.arange(groups).repeat_interleave(self.index.shape[1])
        kept_owner, half = _owners(self.kept), keep.new_full((kept,), 0.5)
        return Encoding(
            center=none,
            push=one,
            from_input=torch.cat([one, none, keep, -keep, nothing, 2 * keep]),
            from_free=torch.cat([none, one, nothing, 2 * keep, keep, -keep]),
            weight=torch.cat([torch.ones_like(one[0]), -torch.ones_like(one[0]), half, -half, half, -half]),
            owner=torch.cat([entry, entry, *(kept_owner + i * groups for i in (1, 1, 2, 2))]),
            either_sign=torch.arange(3 * groups) >= groups,
            steady=torch.arange(3 * groups) < 2 * groups,
        )

    def _as_two_relus(self, kept: Float[Tensor, "entry kept"]) -> Encoding:
        """(max, min) = (b + relu(a - b), b - relu(b - a)), the ReLUs taken for unrelated: LipSDP's own way."""
        if not self.sorts or self.index.shape[1] != 2:
            raise BadInput(
                f"residual-relu writes a sort of two entries with two ReLUs; {self.name} has groups of "
                f"{self.index.shape[1]} and {'sorts' if self.sorts else 'reflects'} them. Use method='eliminate'."
            )
        n = self.outputs
        push, gauge = kept.new_zeros(n, n), kept.new_zeros(n, n)
        first, second = self.index.T
        push[first, first], push[second, second] = 1.0, -1.0
        gauge[first, first], gauge[first, second] = 0.5, -0.5
        gauge[second, first], gauge[second, second] = -0.5, 0.5
        return ball(kept @ kept.T, push, gauge, torch.arange(n), torch.arange(n))

    def gain(self, norm: Norm) -> float:
        """1; for a reflection in the largest absolute entry, its largest absolute row sum."""
        if norm == "l2" or self.sorts:
            return 1.0
        reflection = torch.eye(self.index.shape[1], dtype=self.turned.dtype) - 2 * self.turned @ self.turned.mT
        return max(1.0, float(reflection.abs().sum(2).max()))

    @property
    def selections(self) -> Float[Tensor, "choice free free"] | None:
        """The orders of a group as they act on what is not kept, or both sides of a reflection."""
        size, basis = self.index.shape[1], self.turned[0]
        if not self.sorts:
            return torch.tensor([[[1.0]], [[-1.0]]], dtype=basis.dtype)
        if math.factorial(size) > MOST_ORDERS:
            return None
        orders = torch.tensor(list(itertools.permutations(range(size))))
        return basis.T @ torch.eye(size, dtype=basis.dtype)[orders] @ basis


@final
@dataclass(frozen=True, eq=False)
class Bounded(Nonlinearity):
    """A nonlinearity of which only a Euclidean Lipschitz constant is known: ||w|| <= constant ||z||."""

    name: str
    inputs: int
    size: int
    constant: float

    @property
    def outputs(self) -> int:
        """Number of entries that come out."""
        return self.size

    def encoding(self, method: Method) -> Encoding:
        """One multiplier."""
        center = torch.zeros(self.size, self.inputs, dtype=torch.float64)
        push, gauge = (torch.eye(n, dtype=torch.float64) for n in (self.size, self.inputs))
        owners = (torch.zeros(n, dtype=torch.long) for n in (self.size, self.inputs))
        return ball(center, push, self.constant * gauge, *owners)

    def gain(self, norm: Norm) -> float:
        """The constant, times sqrt(inputs) for the largest absolute entry."""
        return self.constant * (1.0 if norm == "l2" else math.sqrt(self.inputs))

    @property
    def selections(self) -> None:
        """It has no pieces that are known."""
        return None


def ball(
    center: Float[Tensor, "output input"],
    push: Float[Tensor, "output free"],
    gauge: Float[Tensor, "row input"],
    free_owner: Int[Tensor, "free"],
    gauge_owner: Int[Tensor, "row"],
) -> Encoding:
    r"""$w = C z + V s$ with $\|s_j\|^2 \le \|P_j z\|^2$ for each group j of free directions and rows of P (`gauge`)."""
    rows, free = len(gauge), push.shape[1]
    multipliers = int(free_owner.max()) + 1
    return Encoding(
        center=center,
        push=push,
        from_input=torch.cat([gauge, gauge.new_zeros(free, gauge.shape[1])]),
        from_free=torch.cat([gauge.new_zeros(rows, free), torch.eye(free, dtype=gauge.dtype)]),
        weight=torch.cat([gauge.new_ones(rows), -gauge.new_ones(free)]),
        owner=torch.cat([gauge_owner, free_owner]),
        either_sign=torch.zeros(multipliers, dtype=torch.bool),
        steady=torch.ones(multipliers, dtype=torch.bool),
    )


def sorted_groups(name: str, index: Int[Tensor, "group size"]) -> Groups:
    """GroupSort: the mean of each group is kept."""
    groups, size = index.shape
    mean = torch.full((size, 1), 1 / math.sqrt(size), dtype=torch.float64)
    return Groups(name, index, _complement(mean).expand(groups, size, size - 1), mean.expand(groups, size, 1), True)


def reflected_groups(name: str, index: Int[Tensor, "group size"], direction: Float[Tensor, "group size"]) -> Groups:
    """Householder with unit directions: what is orthogonal to them is kept."""
    v = direction.double()
    v = (v / v.norm(dim=1, keepdim=True))[:, :, None]
    return Groups(name, index, v, _complement(v), False)


def _complement(basis: Float[Tensor, "*batch size k"]) -> Float[Tensor, "*batch size other"]:
    """Orthonormal directions orthogonal to orthonormal ones."""
    return torch.linalg.qr(basis, mode="complete").Q[..., basis.shape[-1] :]


def _owners(basis: Float[Tensor, "group size k"]) -> Int[Tensor, "column"]:
    return torch.arange(len(basis)).repeat_interleave(basis.shape[2])
