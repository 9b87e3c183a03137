"""A strictly feasible point of a bound's program, from which an interior-point method can start."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from corollary.verify.lipschitz.certificate import least_leading
from corollary.verify.lipschitz.implicit import NotWellPosed
from corollary.verify.lipschitz.interior import minimise
from corollary.verify.lipschitz.program import Atoms, Program

ROOM = 0.05
"""Least eigenvalue that the start has in the block without the leading variable, scaled to a unit diagonal."""
FEASIBLE = 1e-6
"""Eigenvalue that multipliers up to 1 must give an implicit unit's own block."""


def strictly_feasible(program: Program) -> Float[Tensor, "variable"]:
    """Multipliers that grow geometrically from the network's output to its input.

    What a unit passes on is then paid for by itself. An implicit unit needs multipliers that pay for its loop first.

    Raises: NotWellPosed, if there are none for an implicit unit.
    """
    steady, n = program.distance > 0, program.leading
    base, room = torch.ones_like(program.objective), ROOM
    for index in range(len(program.encodings)):
        if program.system.is_implicit(index):
            variables, _ = program.ranges(index)
            base[variables], own = _of_loop(program, index)
            room = min(room, ROOM * own)
    for doubling in range(120):
        ratio = 2.0 ** (1 + doubling / 2)
        y = torch.where(steady, base * ratio ** program.distance.double(), 0.0)
        y[0] = 0.0
        block = program.atoms.matrix(y)[n:, n:]
        if bool((block.diagonal() > 0).all()) and _least_scaled_eigenvalue(block) > room:
            lead = least_leading(program, y)
            assert lead is not None  # the block is positive definite
            y[0] = 2 * lead + 1e-6
            return y
    raise NotWellPosed("no multipliers were found that hold down what the network's nonlinearities may do")


def _of_loop(program: Program, index: int) -> tuple[Float[Tensor, "variable"], float]:
    r"""Multipliers of an implicit unit with a positive definite block of its own, and that block's least eigenvalue.

    Minimises tau over $M(\lambda) + \tau I \succeq 0$, $0 \le \lambda \le 1$: the same kind of program.
    """
    variables, coordinates = program.ranges(index)
    inside = (program.atoms.owner >= variables.start) & (program.atoms.owner < variables.stop)
    rows = program.atoms.rows[inside, coordinates]
    (size,), count = rows[0].shape, variables.stop - variables.start
    corner = torch.eye(size + count, dtype=rows.dtype)
    free, slack = corner[:size], corner[size:]
    atoms = Atoms(
        rows=torch.cat([F.pad(rows, (0, count)), free, slack, slack]),
        weight=torch.cat(
            [program.atoms.weight[inside], rows.new_ones(size), -rows.new_ones(count), rows.new_ones(count)]
        ),
        owner=torch.cat(
            [
                program.atoms.owner[inside] - variables.start + 1,
                torch.zeros(size, dtype=torch.long),
                torch.arange(count) + 1,
                torch.full((count,), -1),
            ]
        ),
        error=rows.new_zeros(len(rows) + size + 2 * count),
    )
    either_sign = torch.arange(count + 1) < 1
    start = rows.new_full((count + 1,), 0.5)
    start[0] = 1.0
    start[0] = 2.0 - 2.0 * min(0.0, float(torch.linalg.eigvalsh(atoms.matrix(start)[:size, :size])[0]))
    found = minimise(
        atoms,
        either_sign.double(),
        either_sign,
        start,
        absolute=FEASIBLE / 10,
        enough=lambda y: float(y[0]) < -FEASIBLE,
    ).y
    if float(found[0]) >= -FEASIBLE:
        raise NotWellPosed(
            "no multipliers prove that the equation of an implicit layer with the activation "
            f"{program.system.units[index].nonlinearity.name} has exactly one solution: its weights W are too large"
        )
    block = atoms.matrix(torch.cat([found.new_zeros(1), found[1:]]))[:size, :size]
    return found[1:], _least_scaled_eigenvalue(block)


def _least_scaled_eigenvalue(block: Float[Tensor, "n n"]) -> float:
    """The smallest eigenvalue of a matrix scaled to a unit diagonal; 1 for one of no rows."""
    scale = block.diagonal().rsqrt()
    return float(torch.linalg.eigvalsh(scale[:, None] * block * scale)[0]) if len(block) else 1.0
