r"""A semidefinite program with thin atoms, by a primal-dual interior-point method that uses them.

The cost of a step is the matrix $B_{jk} = \operatorname{tr}(M_j X M_k Z^{-1})$ for Z = M(y) and its multiplier X. With
$M_j = \sum_a \omega_a u_a u_a^\top$ it is a sum of entries of $(U^\top X U) \circ (U^\top Z^{-1} U)$: a few products of
matrices of the size of Z, where a solver that takes the $M_j$ for dense works on vectors of size squared. Every iterate
y is strictly feasible, so that it is a certificate already.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from corollary.verify.lipschitz.program import FIXED, Atoms

MOST_STEPS = 150
INSIDE, SHORTER = 0.95, 0.9
"""Share of the way to the boundary of the cone that a step takes; factor between the lengths that are tried."""


@dataclass(frozen=True, eq=False)
class Solution:
    """Where the method ended.

    Args:
        y: strictly feasible. gap: how far its objective lies above that of the multiplier X, which is feasible up to
            `residual`: so far it can lie above the optimum. steps: iterations made.
    """

    y: Float[Tensor, "variable"]
    gap: float
    residual: float
    steps: int


def minimise(
    atoms: Atoms,
    objective: Float[Tensor, "variable"],
    either_sign: Bool[Tensor, "variable"],
    start: Float[Tensor, "variable"],
    *,
    tolerance: float = 1e-6,
    absolute: float = 0.0,
    enough: Callable[[Tensor], bool] = lambda y: False,
) -> Solution:
    r"""Minimise $b^\top y$ over y with M(y) positive semidefinite and y >= 0 where it may not be negative.

    Predictor and corrector along the direction of Helmberg, Rendl, Vanderbei and Wolkowicz, Kojima and others, and
    Monteiro (HKM), from a strictly feasible y and any X.

    Args:
        start: a strictly feasible point.
        tolerance, absolute: gaps to the optimum, by the size of the objective and as it is, at which to end.
        enough: asked at each iterate; true ends the search there.
    Returns: the last iterate; one that rounding keeps from going on is returned with the gap it has.
    Source: Helmberg et al. 1996, SIAM J. Optim. 6; Mehrotra 1992, SIAM J. Optim. 2; thin atoms: Benson, Ye, Zhang 2000.
    """
    problem = _Problem(atoms, objective, either_sign)
    point = problem.at(start, None, None)
    assert point is not None, "the start is not strictly feasible"
    steps = 0
    while steps < MOST_STEPS:
        steps += 1
        gap = abs(point.gap(problem))
        wanted = max(absolute, tolerance * abs(float(objective @ point.y)))
        close = gap <= wanted and point.residual(problem) <= tolerance
        moved = None if close or enough(point.y) else problem.step(point)
        if moved is None:
            break
        point = moved
    return Solution(point.y, abs(point.gap(problem)), point.residual(problem), steps)


@dataclass(frozen=True, eq=False)
class _Point:
    """y and Z = M(y) with its Cholesky factor, the multiplier X of Z >= 0, and the multipliers x of y >= 0."""

    y: Float[Tensor, "variable"]
    Z: Float[Tensor, "coordinate coordinate"]
    X: Float[Tensor, "coordinate coordinate"]
    x: Float[Tensor, "variable"]
    factor: Float[Tensor, "coordinate coordinate"]

    def complementarity(self) -> float:
        """<X, Z> + x.y."""
        return float((self.X * self.Z).sum() + self.x @ self.y)

    def gap(self, problem: "_Problem") -> float:
        """b.y + <M_0, X>: no X gives a smaller optimum than its own objective."""
        return float(problem.objective @ self.y + (problem.fixed * self.X).sum())

    def residual(self, problem: "_Problem") -> float:
        """The largest violation of <M_j, X> + x_j = b_j, by the variable's size in the objective."""
        found = problem.adjoint(self.X) + self.x
        return float(((found - problem.objective) * self.y).abs().max() / abs(float(problem.objective @ self.y)))


@dataclass(frozen=True, eq=False)
class _Move:
    """Changes of y, of Z = M(y), of X and of x."""

    y: Float[Tensor, "variable"]
    Z: Float[Tensor, "coordinate coordinate"]
    X: Float[Tensor, "coordinate coordinate"]
    x: Float[Tensor, "variable"]


class _Thin:
    """Atoms u_a. Most are multiples of one coordinate, and their products with a matrix are entries of it."""

    def __init__(self, rows: Float[Tensor, "atom coordinate"]):
        single = (rows != 0).sum(1) <= 1
        self.order = torch.cat([single.nonzero().flatten(), (~single).nonzero().flatten()])
        self.place = rows[single].abs().argmax(1)
        self.size = rows[single].gather(1, self.place[:, None]).flatten()
        self.dense = rows[~single].T.contiguous()

    def gram(self, matrix: Float[Tensor, "coordinate coordinate"]) -> Float[Tensor, "atom atom"]:
        """u_a' A u_b for all pairs, A symmetric."""
        through = matrix @ self.dense
        corner = self.size[:, None] * matrix[self.place[:, None], self.place] * self.size
        side = self.size[:, None] * through[self.place]
        return torch.cat([torch.cat([corner, side], 1), torch.cat([side.T, self.dense.T @ through], 1)])

    def forms(self, matrix: Float[Tensor, "coordinate coordinate"]) -> Float[Tensor, "atom"]:
        """u_a' A u_a."""
        alone = self.size**2 * matrix[self.place, self.place]
        return torch.cat([alone, ((matrix @ self.dense) * self.dense).sum(0)])

    def sum(self, factors: Float[Tensor, "atom"]) -> Float[Tensor, "coordinate coordinate"]:
        """sum_a f_a u_a u_a'."""
        alone = len(self.place)
        found = (self.dense * factors[alone:]) @ self.dense.T
        diagonal = found.new_zeros(len(found)).index_add_(0, self.place, factors[:alone] * self.size**2)
        return found + torch.diag(diagonal)


class _Problem:
    def __init__(self, atoms: Atoms, objective: Tensor, either_sign: Tensor):
        moving = atoms.owner != FIXED
        self.thin = _Thin(atoms.rows[moving])
        self.weight, self.owner = (part[moving][self.thin.order] for part in (atoms.weight, atoms.owner))
        still = Atoms(*(part[~moving] for part in (atoms.rows, atoms.weight, atoms.owner, atoms.error)))
        self.fixed = still.matrix(torch.zeros_like(objective))
        self.objective, self.bounded = objective, (~either_sign).double()
        self.order = len(self.fixed) + int(self.bounded.sum())

    def adjoint(self, matrix: Float[Tensor, "coordinate coordinate"]) -> Float[Tensor, "variable"]:
        """<M_j, A> for each variable."""
        return torch.zeros_like(self.objective).index_add(0, self.owner, self.weight * self.thin.forms(matrix))

    def linear(self, y: Float[Tensor, "variable"]) -> Float[Tensor, "coordinate coordinate"]:
        """sum_j y_j M_j."""
        return self.thin.sum(self.weight * y[self.owner])

    def at(self, y: Tensor, X: Tensor | None, x: Tensor | None) -> _Point | None:
        """The point, or None if it is not strictly feasible; without X and x, that of a centre of this objective."""
        Z = self.fixed + self.linear(y)
        factor, failed = torch.linalg.cholesky_ex(Z)
        if int(failed) or bool((y * self.bounded < 0).any()):
            return None
        mu = max(abs(float(self.objective @ y)), 1e-8) / self.order
        X = mu * torch.cholesky_inverse(factor) if X is None else X
        return _Point(y, Z, X, mu * self.bounded / y if x is None else x, factor)

    def step(self, point: _Point) -> _Point | None:
        """Predict with no centring, correct with as much as the prediction calls for; None if rounding stops it."""
        directions = _Directions(self, point)
        mu = point.complementarity() / self.order
        predicted = directions.towards(0.0, None)
        primal, dual = self._lengths(point, predicted)
        y, x = point.y + dual * predicted.y, point.x + primal * predicted.x
        ahead = float(((point.X + primal * predicted.X) * (point.Z + dual * predicted.Z)).sum() + x @ y) / self.order
        centring = min(1.0, max(ahead, 0.0) / mu) ** 3 if min(primal, dual) > 0.1 else 0.5
        corrected = directions.towards(centring * mu, predicted)
        return self._moved(point, corrected, *self._lengths(point, corrected))

    def _lengths(self, point: _Point, move: _Move) -> tuple[float, float]:
        """How far X and x, and Z and y, can go along a direction: most of the way to their boundaries, 1 at most."""
        bounded = self.bounded > 0
        of_x, of_y = (_to_zero(a[bounded], c[bounded]) for a, c in ((point.x, move.x), (point.y, move.y)))
        return _to_boundary(point.X, move.X, of_x), _to_boundary(point.Z, move.Z, of_y)

    def _moved(self, point: _Point, move: _Move, primal: float, dual: float) -> _Point | None:
        while min(primal, dual) > 1e-6:
            X = point.X + primal * move.X
            found = self.at(point.y + dual * move.y, X, point.x + primal * move.x)
            if found is not None and not int(torch.linalg.cholesky_ex(X)[1]):
                return found
            primal, dual = primal * 0.7, dual * 0.7
        return None


def _to_zero(values: Float[Tensor, "n"], change: Float[Tensor, "n"]) -> float:
    """The largest step that leaves positive values above a twentieth of their size, at most 1."""
    rate = float((change / values).min())
    return min(1.0, INSIDE / -rate) if rate < 0 else 1.0


def _to_boundary(matrix: Float[Tensor, "n n"], change: Float[Tensor, "n n"], most: float) -> float:
    """A step that keeps a positive definite matrix so: tried by Cholesky's factorisation, cheaper than eigenvalues."""
    length = most / INSIDE
    while length > 1e-8 and int(torch.linalg.cholesky_ex(matrix + length * change)[1]):
        length *= SHORTER
    return min(most, INSIDE * length)


class _Directions:
    """Newton's directions at a point, all from one factorisation."""

    def __init__(self, problem: _Problem, point: _Point):
        self.problem, self.point = problem, point
        self.inverse = torch.cholesky_inverse(point.factor)
        inner, weight, size = problem.thin.gram(self.inverse), problem.weight, len(point.y)
        products = weight[:, None] * problem.thin.gram(point.X) * inner * weight
        schur = products.new_zeros(size, len(products)).index_add_(0, problem.owner, products)
        schur = products.new_zeros(size, size).index_add_(1, problem.owner, schur)
        self.solve = _solver((schur + schur.T) / 2 + torch.diag(point.x / point.y * problem.bounded))
        self.centre = problem.bounded / point.y
        self.centre = self.centre.index_add(0, problem.owner, weight * inner.diagonal())

    def towards(self, mu: float, predicted: _Move | None) -> _Move:
        """To X Z = mu I and x y = mu, with the second-order terms of a predicted move."""
        problem, point = self.problem, self.point
        right, bend, bend_x = mu * self.centre - problem.objective, torch.zeros(()), torch.zeros(())
        if predicted is not None:
            bend, bend_x = predicted.X @ predicted.Z @ self.inverse, predicted.x * predicted.y
            right = right - problem.adjoint(bend) - bend_x / point.y * problem.bounded
        y = self.solve(right)
        Z = problem.linear(y)
        X = mu * self.inverse - point.X - point.X @ Z @ self.inverse - bend
        x = (mu - bend_x - point.x * y) / point.y * problem.bounded - point.x
        return _Move(y, Z, (X + X.T) / 2, x)


def _solver(schur: Float[Tensor, "n n"]) -> Callable[[Tensor], Tensor]:
    """b -> B^-1 b. Variables differ by orders of magnitude: B is scaled to a unit diagonal, and kept regular."""
    scale = schur.diagonal().clamp(min=1e-300).rsqrt()
    matrix = scale[:, None] * schur * scale
    ridge = 1e-15
    while True:
        factor, failed = torch.linalg.cholesky_ex(matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype))
        if not int(failed):
            return lambda b: scale * torch.cholesky_solve((scale * b)[:, None], factor).flatten()
        ridge *= 100
