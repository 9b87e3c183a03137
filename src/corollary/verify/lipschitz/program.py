r"""The semidefinite program of a Lipschitz bound.

Every bound is: minimise $b^\top y$ with $M(y) = \sum_a \omega_a y_{j(a)} u_a u_a^\top \succeq 0$ (some y fixed to 1).
The atoms $u_a$ are coordinates, and rows of the maps from the free coordinates xi to what each nonlinearity reads.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from corollary.verify.lipschitz.constraints import Encoding, Method, Norm
from corollary.verify.lipschitz.implicit import NotWellPosed
from corollary.verify.lipschitz.system import System, operator_norm

FIXED = -1
"""Owner of the atoms that no variable multiplies."""
ROUNDING = torch.finfo(torch.float64).eps / 2


@dataclass(frozen=True, eq=False)
class Atoms:
    """The atoms u_a of a program.

    Args:
        rows: (atom, coordinate). weight: omega_a. owner: the variable j(a), or FIXED.
        error: for each atom, a bound of the length of the rounding errors in its row.
    """

    rows: Float[Tensor, "atom coordinate"]
    weight: Float[Tensor, "atom"]
    owner: Int[Tensor, "atom"]
    error: Float[Tensor, "atom"]

    def factors(self, y: Float[Tensor, "variable"]) -> Float[Tensor, "atom"]:
        """omega_a y_{j(a)}."""
        return self.weight * torch.cat([y, y.new_ones(1)])[self.owner]

    def matrix(self, y: Float[Tensor, "variable"]) -> Float[Tensor, "coordinate coordinate"]:
        """M(y)."""
        return (self.rows.T * self.factors(y)) @ self.rows

    def roundoff(self, y: Float[Tensor, "variable"]) -> float:
        """A bound of the norm of what rounding has changed in `matrix(y)`."""
        factors, lengths = self.factors(y).abs(), self.rows.norm(dim=1)
        size = self.rows.abs()
        of_sum = ROUNDING * (len(size) + 4) * float(((size.T * factors) @ size).norm())
        return 1.01 * (of_sum + float((factors * self.error * (2 * lengths + self.error)).sum()))


@dataclass(frozen=True, eq=False)
class Program:
    r"""Minimise $b^\top y$ with M(y) positive semidefinite.

    For l2, the coordinates are (x, free directions) and y = (rho, multipliers): the squared Lipschitz constant is at
    most $\rho$. For l-infinity, the coordinates are (1, x, free directions) and y = (2 rho, mu of each input,
    multipliers): the Lipschitz constant of the one output is at most $\rho$. In both, $y_0$ multiplies the identity on
    the first `leading` coordinates.

    Args:
        system: the network, best balanced. encodings: of each of its units.
        atoms: in the coordinates' own scale.
        objective: b. either_sign: variables that may be negative.
        distance: how far from the network's output each multiplier works, from 1; 0 where a large value does not help.
    """

    norm: Norm
    system: System
    encodings: tuple[Encoding, ...]
    atoms: Atoms
    objective: Float[Tensor, "variable"]
    either_sign: Bool[Tensor, "variable"]
    distance: Int[Tensor, "variable"]
    leading: int

    @property
    def coordinates(self) -> int:
        """Size of the matrix inequality."""
        return self.atoms.rows.shape[1]

    def ranges(self, index: int) -> tuple[slice, slice]:
        """The variables and the coordinates of one unit."""
        first = self.leading + (self.system.inputs if self.norm == "linf" else 0)
        before = self.encodings[:index]
        variable = len(self.objective) - sum(len(e.steady) for e in self.encodings[index:])
        coordinate = first + sum(e.push.shape[1] for e in before)
        encoding = self.encodings[index]
        return (
            slice(variable, variable + len(encoding.steady)),
            slice(coordinate, coordinate + encoding.push.shape[1]),
        )

    def scaled(self, columns: Float[Tensor, "coordinate"]) -> Atoms:
        """The atoms with each coordinate multiplied by a number (a power of two, to be exact)."""
        return _atoms(self.system, self.encodings, self.norm, columns)

    def value(self, y: Float[Tensor, "variable"]) -> float:
        """The Lipschitz bound that y stands for."""
        objective = float(self.objective @ y)
        return self.system.scale * (max(objective, 0.0) ** 0.5 if self.norm == "l2" else objective)


def program(system: System, method: Method, norm: Norm) -> Program:
    """The program of a (balanced) network; for l-infinity the network has one output.

    Raises: BadInput, if the method has no constraints for one of its nonlinearities.
    """
    encodings = tuple(unit.nonlinearity.encoding(method) for unit in system.units)
    inputs = 1 if norm == "l2" else 1 + system.inputs
    free = sum(encoding.push.shape[1] for encoding in encodings)
    steady = [encoding.steady * (len(encodings) - k) for k, encoding in enumerate(encodings)]
    heads = torch.zeros(inputs, dtype=torch.long)
    heads[1:] = len(encodings) + 1
    coordinates = torch.ones(system.inputs + free + (norm == "linf"), dtype=torch.float64)
    objective = torch.zeros(inputs + sum(map(len, steady)), dtype=torch.float64)
    objective[0] = 1.0 if norm == "l2" else 0.5
    return Program(
        norm=norm,
        system=system,
        encodings=encodings,
        atoms=_atoms(system, encodings, norm, coordinates),
        objective=objective,
        either_sign=torch.cat([torch.zeros(inputs, dtype=torch.bool), *(e.either_sign for e in encodings)]),
        distance=torch.cat([heads, *steady]),
        leading=system.inputs if norm == "l2" else 1,
    )


def _atoms(system: System, encodings: tuple[Encoding, ...], norm: Norm, columns: Float[Tensor, "coordinate"]) -> Atoms:
    n, own = system.inputs, torch.diag(columns)
    if norm == "l2":
        inputs = own[:n]
        heads = [(inputs, columns.new_ones(n), torch.zeros(n, dtype=torch.long), columns.new_zeros(n))]
    else:  # rho and mu: rho - sum(mu) stands with the constant, mu with each input
        one, inputs = own[:1], own[1 : 1 + n]
        mu, sign = torch.arange(1, n + 1), columns.new_ones(n)
        heads = [
            (one, columns.new_ones(1), torch.zeros(1, dtype=torch.long), columns.new_zeros(1)),
            (inputs, sign, mu, columns.new_zeros(n)),
            (one.expand(n, -1), -sign, mu, columns.new_zeros(n)),
        ]
    maps = _Maps(system, inputs, own[len(own) - sum(e.push.shape[1] for e in encodings) :])
    first = 1 if norm == "l2" else 1 + n
    for index, encoding in enumerate(encodings):
        rows, error = maps.through(index, encoding)
        heads.append((rows, -encoding.weight, encoding.owner + first, error))
        first += len(encoding.steady)
    output, error = maps.of(system.output)
    fixed = torch.full((len(output),), FIXED)
    if norm == "l2":
        heads.append((output, -columns.new_ones(len(output)), fixed, error))
    else:  # -2 c y as a difference of squares
        half = columns.new_full((1,), 0.5)
        heads += [(own[:1] - output, half, fixed, error), (own[:1] + output, -half, fixed, error)]
    return Atoms(*(torch.cat(part) for part in zip(*heads, strict=True)))


class _Maps:
    """The sources by the coordinates, unit by unit, with bounds of the rounding errors in them (Euclidean norms)."""

    def __init__(
        self, system: System, inputs: Float[Tensor, "input coordinate"], free: Float[Tensor, "free coordinate"]
    ):
        self.system = system
        self.free = free
        self.sources = [inputs]
        self.errors = [0.0]

    def of(self, rows: Float[Tensor, "row source"]) -> tuple[Float[Tensor, "row coordinate"], Float[Tensor, "row"]]:
        """A map after all sources, with a bound of the error of each row."""
        found, rounded = self._product(rows)
        lengths = (part.norm(dim=1) * error for part, error in zip(self.system.parts(rows), self.errors, strict=True))
        return found, rounded + sum(lengths)

    def through(self, index: int, encoding: Encoding) -> tuple[Float[Tensor, "term coordinate"], Float[Tensor, "term"]]:
        """The rows of a unit's constraints, with a bound of the error of each; its output becomes a source."""
        size = encoding.push.shape[1]
        free, self.free = self.free[:size], self.free[size:]
        parts = self.system.parts(self.system.units[index].map)
        read, rounded = self._product(self.system.units[index].map)
        # What is inherited counts by operator norms here, far less than row by row.
        inherited = (operator_norm(part, "l2") * e for part, e in zip(parts, self.errors, strict=False))
        error = float(rounded.norm()) + sum(inherited)
        if self.system.is_implicit(index):
            read, error = _solved(parts[index + 1], encoding, read, free, error)
        rounding = ROUNDING * (len(encoding.center[0]) + size + 4)
        terms = encoding.from_input @ read + encoding.from_free @ free
        spread = encoding.from_input.abs() @ read.abs() + encoding.from_free.abs() @ free.abs()
        self.sources.append(encoding.center @ read + encoding.push @ free)
        moved = encoding.center.abs() @ read.abs() + encoding.push.abs() @ free.abs()
        self.errors.append(operator_norm(encoding.center, "l2") * error + rounding * float(moved.norm()))
        return terms, encoding.from_input.norm(dim=1) * error + rounding * spread.norm(dim=1)

    def _product(
        self, rows: Float[Tensor, "row source"]
    ) -> tuple[Float[Tensor, "row coordinate"], Float[Tensor, "row"]]:
        """A map after the sources known so far, with the rounding of each row in this product alone."""
        stack = torch.cat(self.sources)
        rows = rows[:, : len(stack)]
        return rows @ stack, ROUNDING * (len(stack) + 2) * (rows.abs() @ stack.abs()).norm(dim=1)


def _solved(
    loop: Float[Tensor, "entry output"],
    encoding: Encoding,
    read: Float[Tensor, "entry coordinate"],
    free: Float[Tensor, "free coordinate"],
    error: float,
) -> tuple[Float[Tensor, "entry coordinate"], float]:
    """z = read + L (C z + V s) solved for z; the error follows from the residual and the inverse.

    Raises: NotWellPosed, if the equation has no solution.
    """
    forced = read + loop @ encoding.push @ free
    equation = torch.eye(len(loop), dtype=loop.dtype) - loop @ encoding.center
    inverse, singular = torch.linalg.inv_ex(equation)
    if int(singular) or not bool(inverse.isfinite().all()):
        raise NotWellPosed("the linear part of an implicit layer has no solution: I - W C is singular")
    solution = inverse @ forced
    residual = float((forced - equation @ solution).norm())
    size = sum(map(len, (loop, free, encoding.center[0]))) + 8
    made = (loop.abs() @ encoding.push.abs() @ free.abs()).norm() + forced.norm()
    made = made + (loop.abs() @ encoding.center.abs() @ solution.abs()).norm() + solution.norm()
    stretch = operator_norm(inverse, "l2")
    return solution, stretch * (error + residual + 2 * ROUNDING * size * float(made))
