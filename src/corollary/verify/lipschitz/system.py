"""A network as linear maps between nonlinearities: what every Lipschitz bound starts from."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from corollary.verify.lipschitz.constraints import Nonlinearity, Norm


@dataclass(frozen=True, eq=False)
class Unit:
    """One nonlinearity and what it reads; the sources of `map` are the network's input, then each unit's output."""

    nonlinearity: Nonlinearity
    map: Float[Tensor, "entry source"]


@dataclass(frozen=True, eq=False)
class System:
    r"""A network up to its biases: $z_k = T_k (x, w_1, w_2, \dots)$, $w_k = \phi_k(z_k)$, $y = T (x, w_1, \dots)$.

    Args:
        inputs: size of x.
        units: in the order of evaluation. A unit that reads its own output is implicit: w = phi(T w + ...).
        output: T, (output, source).
        scale: the network is `scale` times this.
    """

    inputs: int
    units: tuple[Unit, ...]
    output: Float[Tensor, "output source"]
    scale: float = 1.0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Entries of each source: the input, then each unit's output."""
        return (self.inputs, *(unit.nonlinearity.outputs for unit in self.units))

    @property
    def hidden(self) -> int:
        """Entries of all units together."""
        return sum(self.sizes[1:])

    def parts(self, rows: Float[Tensor, "row source"]) -> tuple[Float[Tensor, "row part"], ...]:
        """The columns of a map, by source."""
        return rows.split(self.sizes, dim=1)

    def is_implicit(self, index: int) -> bool:
        """Whether a unit reads its own output."""
        return bool(self.parts(self.units[index].map)[index + 1].any())

    def gains(self, norm: Norm) -> tuple[float, ...]:
        r"""Lipschitz constants by products of norms: of each source, and last of the output, by the network's input.

        Over all paths, $L_k = g_k \sum_j \|T_{kj}\| L_j$, and for an implicit unit $g_k / (1 - g_k \|T_{kk}\|)$ in the
        place of $g_k$; infinite where that is not positive.
        """
        found = [1.0]
        for index, unit in enumerate(self.units):
            parts = self.parts(unit.map)
            gain = unit.nonlinearity.gain(norm)
            reach = gain * _through(parts[: index + 1], found, norm)
            loop = gain * operator_norm(parts[index + 1], norm)
            found.append(reach / (1 - loop) if loop < 1 else math.inf)
        return (*found, self.scale * _through(self.parts(self.output), found, norm))

    def row(self, weights: Float[Tensor, "output"]) -> "System":
        """The network with one output, `weights` times this one's."""
        return replace(self, output=weights.to(self.output)[None] @ self.output)

    def balanced(self) -> "System":
        """The same network with each unit, and the output, scaled to a gain near 1 by a power of two (exactly)."""
        powers = [1.0]
        for index, unit in enumerate(self.units):
            reach = _through(self.parts(unit.map)[: index + 1], powers, "l2")
            powers.append(_power_of_two(unit.nonlinearity.gain("l2") * reach))
        size = _power_of_two(_through(self.parts(self.output), powers, "l2"))
        columns = torch.cat([torch.full((n,), p) for n, p in zip(self.sizes, powers, strict=True)]).to(self.output)
        units = (replace(unit, map=unit.map * columns / p) for unit, p in zip(self.units, powers[1:], strict=True))
        return System(self.inputs, tuple(units), self.output * columns / size, self.scale * size)

    def narrowed(self) -> "System":
        """The same network up to a rotation of its input, without the directions that nothing reads.

        Its l2 constant is the same, its maps are rounded anew: good for finding multipliers, not for proving with them.
        """
        maps = (*(unit.map for unit in self.units), self.output)
        read = torch.cat([rows[:, : self.inputs] for rows in maps])
        read = read[read.any(dim=1)]
        if len(read) >= self.inputs:
            return self
        basis = torch.linalg.qr(read.T).Q
        *before, direct = (torch.cat([rows[:, : self.inputs] @ basis, rows[:, self.inputs :]], dim=1) for rows in maps)
        units = (replace(unit, map=rows) for unit, rows in zip(self.units, before, strict=True))
        return replace(self, inputs=basis.shape[1], units=tuple(units), output=direct)

    def then(self, second: "System") -> "System":
        """This network followed by another."""
        more = second.hidden

        def later(rows: Tensor) -> Tensor:
            return torch.cat([self.scale * rows[:, : second.inputs] @ self.output, rows[:, second.inputs :]], dim=1)

        first = tuple(replace(unit, map=F.pad(unit.map, (0, more))) for unit in self.units)
        after = tuple(replace(unit, map=later(unit.map)) for unit in second.units)
        return System(self.inputs, first + after, later(second.output), second.scale)


def operator_norm(matrix: Float[Tensor, "row column"], norm: Norm) -> float:
    """The largest singular value, or the largest absolute row sum."""
    if not matrix.any():  # also where there are no entries
        return 0.0
    return float(torch.linalg.matrix_norm(matrix, 2) if norm == "l2" else matrix.abs().sum(1).max())


def _through(parts: tuple[Tensor, ...], gains: list[float], norm: Norm) -> float:
    """A bound of the sum of maps after sources of these gains; a map that is zero passes nothing on."""
    sizes = [operator_norm(part, norm) for part in parts]
    return sum(size * gain for size, gain in zip(sizes, gains, strict=True) if size)


def _power_of_two(value: float) -> float:
    return 2.0 ** round(math.log2(value)) if 0 < value < math.inf else 1.0
