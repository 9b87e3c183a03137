"""Certificates: a feasible point of a bound's program, checked in float64 with room for every rounding error."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from corollary.base.errors import CorollaryError
from corollary.verify.lipschitz.program import ROUNDING, Program

LIFTS = (1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""Relative additions to the bound that are tried until the check has room for rounding."""
MIXES = (0.0, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Shares of a point that is safely feasible, mixed into one that a solver returned."""


class NotCertified(CorollaryError):
    """No point of the program was found that passes the check."""


@dataclass(frozen=True, eq=False)
class Certificate:
    r"""A bound with its proof: M(y) is positive semidefinite.

    Args:
        program: what M is. multipliers: y.
        margin: smallest eigenvalue of M(y), its coordinates scaled to a diagonal near 1.
        roundoff: a bound of what rounding has changed in that matrix, and can hide from the check. The proof is
            complete because Cholesky's factorisation exists with more than this taken off the diagonal.
    """

    program: Program
    multipliers: Float[Tensor, "variable"]
    margin: float
    roundoff: float

    @property
    def value(self) -> float:
        """The Lipschitz bound that is proved."""
        return self.program.value(self.multipliers)

    def holds(self) -> bool:
        """Check it again, from the network's weights."""
        return _check(self.program, self.multipliers) is not None

    def __str__(self) -> str:
        return (
            f"certificate: {len(self.multipliers)} multipliers, {self.program.coordinates} coordinates, smallest "
            f"eigenvalue {self.margin:.2e}, of which rounding may have made {self.roundoff:.2e}"
        )


def certify(
    program: Program, y: Float[Tensor, "variable"], safe: Float[Tensor, "variable"], *, inside: bool = False
) -> Certificate:
    """The best certificate near a point y that a solver returned, feasible or nearly so.

    The leading variable is replaced by the least that the others allow: the largest eigenvalue of A + B D^-1 B' for
    M = [[y_0 I - A, -B], [-B', D]]. Where D is not positive definite, or barely so, a little of a point where it is
    helps: shares of `safe` are mixed in, and the best of the mixtures is taken.

    Args: `inside`: y is strictly feasible; mixtures are tried only if rounding is too large for it.
    Raises: NotCertified, if no point passes the check.
    """
    y = torch.where(program.either_sign, y, y.clamp(min=0))
    for shares in ((0.0,), MIXES) if inside else (MIXES,):
        mixtures = [(1 - share) * y + share * safe for share in shares]
        leads = [(lead, point) for point in mixtures if (lead := least_leading(program, point)) is not None]
        for lead, point in sorted(leads, key=lambda pair: pair[0]):
            for lift in LIFTS:
                lifted = torch.cat([point.new_tensor([lead * (1 + lift)]), point[1:]])
                if (found := _check(program, lifted)) is not None:
                    return Certificate(program, lifted, *found)
    raise NotCertified(
        f"no certificate was found for a program of {program.coordinates} coordinates: rounding is too large for its "
        "multipliers. Use method='product'."
    )


def least_leading(program: Program, y: Float[Tensor, "variable"]) -> float | None:
    """The least y_0 that the other variables allow, or None if they allow none."""
    without = torch.cat([y.new_zeros(1), y[1:]])
    matrix, n = program.atoms.matrix(without), program.leading
    cholesky, failed = torch.linalg.cholesky_ex(matrix[n:, n:])
    if int(failed):
        return None
    half = torch.linalg.solve_triangular(cholesky, matrix[n:, :n], upper=False)
    return float(torch.linalg.eigvalsh(half.T @ half - matrix[:n, :n])[-1])


def _check(program: Program, y: Float[Tensor, "variable"]) -> tuple[float, float] | None:
    """(smallest eigenvalue, what rounding can hide) if M(y) is proved positive definite, else None.

    Coordinates are scaled by powers of two, which is exact. That Cholesky's factorisation of a matrix in floating-point
    numbers goes through proves the matrix positive definite up to (n + 1) u / (1 - (n + 1) u) times its trace.
    Source: Rump 2006, Verification of positive definiteness, BIT 46.
    """
    if not bool(y.isfinite().all()) or bool((y[~program.either_sign] < 0).any()):
        return None
    diagonal = program.atoms.matrix(y).diagonal()
    if not bool((diagonal > 0).all()):
        return None
    atoms = program.scaled(torch.exp2((-diagonal.log2() / 2).round()))
    matrix = atoms.matrix(y)
    n = len(matrix) + 2
    hidden = atoms.roundoff(y) + 1.01 * n * ROUNDING / (1 - n * ROUNDING) * float(matrix.diagonal().sum())
    shifted = (matrix + matrix.T) / 2 - 1.01 * hidden * torch.eye(len(matrix), dtype=matrix.dtype)
    if int(torch.linalg.cholesky_ex(shifted)[1]):
        return None
    return float(torch.linalg.eigvalsh(matrix)[0]), hidden
