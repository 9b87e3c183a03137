"""The same semidefinite program given to a general conic solver, by cvxpy."""

import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from corollary.base.optional import optional
from corollary.verify.lipschitz.certificate import NotCertified
from corollary.verify.lipschitz.program import FIXED, Program

cvxpy: Any = optional("cvxpy", extra="convex", purpose="solving a semidefinite program with a conic solver")


def solve_conic(
    program: Program, solver: str, options: dict[str, Any] | None = None
) -> tuple[Float[Tensor, "variable"], str]:
    """A point of the program that is feasible and optimal up to the solver's accuracy, and the status it reports.

    Args: `solver`: "clarabel" (interior point) or "scs" (first order). `options`: passed on to it.
    Raises: MissingExtra, if cvxpy is not installed. NotCertified, if the solver returns no point.
    """
    y = cvxpy.Variable(len(program.objective))
    n = program.coordinates
    matrix = cvxpy.reshape(_coefficients(program) @ y + _fixed(program), (n, n), order="C")
    constraints = [matrix >> 0, y[(~program.either_sign).nonzero().flatten().numpy()] >= 0]
    problem = cvxpy.Problem(cvxpy.Minimize(program.objective.numpy() @ y), constraints)
    name = {"clarabel": cvxpy.CLARABEL, "scs": cvxpy.SCS}[solver]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "the solution may be inaccurate": the certificate is what counts
        problem.solve(solver=name, **(options or {}))
    if y.value is None:
        raise NotCertified(f"{solver} ended with the status {problem.status!r} and returned no point")
    return torch.from_numpy(y.value).double(), str(problem.status)


def _coefficients(program: Program) -> Any:
    """The matrices M_j as columns, (coordinate^2, variable)."""
    atoms, n = program.atoms, program.coordinates
    moving = atoms.owner != FIXED
    rows, owner = atoms.rows[moving], atoms.owner[moving]
    squares = (atoms.weight[moving, None, None] * rows[:, :, None] * rows[:, None, :]).flatten(1)
    columns = squares.new_zeros(len(program.objective), n * n).index_add_(0, owner, squares)
    return columns.T.numpy()


def _fixed(program: Program) -> Any:
    return program.atoms.matrix(torch.zeros_like(program.objective)).flatten().numpy()
