"""Upper bounds of a network's Lipschitz constant, each with the certificate that proves it."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import call, evaluating
from corollary.evidence import Source
from corollary.graph import Graph
from corollary.verify.lipschitz.certificate import Certificate, certify
from corollary.verify.lipschitz.conic import solve_conic
from corollary.verify.lipschitz.constraints import Method, Norm
from corollary.verify.lipschitz.interior import minimise
from corollary.verify.lipschitz.program import Program, program
from corollary.verify.lipschitz.reading import system_of
from corollary.verify.lipschitz.start import strictly_feasible
from corollary.verify.lipschitz.system import System

Solver: TypeAlias = Literal["structured", "clarabel", "scs"]
PAULI = Source(
    "pauli2024",
    (
        "Patricia Pauli",
        "Aaron Havens",
        "Alexandre Araujo",
        "Siddharth Garg",
        "Farshad Khorrami",
        "Frank Allgöwer",
        "Bin Hu",
    ),
    "Novel Quadratic Constraints for Extending LipSDP beyond Slope-Restricted Activations",
    2024,
    arxiv="2401.14033",
    venue="ICLR",
)
FAZLYAB = Source(
    "fazlyab2019",
    ("Mahyar Fazlyab", "Alexander Robey", "Hamed Hassani", "Manfred Morari", "George Pappas"),
    "Efficient and Accurate Estimation of Lipschitz Constants for Deep Neural Networks",
    2019,
    arxiv="1906.04893",
    venue="NeurIPS",
)


@dataclass(frozen=True, eq=False)
class LipschitzBound:
    """An upper bound of a Lipschitz constant.

    Attributes:
        value: no larger slope is possible between any two inputs, in the norm given.
        certificate: what proves it; None for products of norms, which need no more than norms.
        status: what the solver says of itself; the proof does not rest on it.
        gap: how far, relatively, the value may lie above the best of its method; None where the solver does not say.
        seconds: time from network to certificate.
    """

    value: float
    norm: Norm
    method: str
    solver: str
    status: str
    seconds: float
    gap: float | None = None
    certificate: Certificate | None = None

    @property
    def multipliers(self) -> Float[Tensor, "variable"] | None:
        """The feasible point that proves the bound."""
        return None if self.certificate is None else self.certificate.multipliers

    @property
    def lmi_min_eig(self) -> float | None:
        """Smallest eigenvalue of the matrix that the certificate shows to be positive definite."""
        return None if self.certificate is None else self.certificate.margin

    def __str__(self) -> str:
        text = f"{self.norm} Lipschitz constant at most {self.value:.6g} ({self.method}, {self.solver}: {self.status})"
        return text if self.certificate is None else f"{text}\n{self.certificate}"


def lipschitz_bound(
    model: nn.Module | Graph | System,
    norm: Norm = "l2",
    method: Method | Literal["product"] = "eliminate",
    output: int | Float[Tensor, "output"] | None = None,
    *,
    solver: Solver | None = None,
    example: Tensor | None = None,
    tolerance: float = 1e-6,
    options: Mapping[str, Any] | None = None,
) -> LipschitzBound:
    r"""A certified global bound: $\|f(x) - f(x')\| \le L \|x - x'\|$ for all inputs x, x'.

    For "l2" both norms are Euclidean. For "linf" the output is one number, $|f(x) - f(x')| \le L \|x - x'\|_\infty$.
    Linear maps may be any affine operations and may skip nonlinearities (residual blocks); nonlinearities may be
    entrywise ones of bounded slope, sorts (GroupSort, MaxMin), maxima, Householder, and others with a known Euclidean
    constant; `Equilibrium` layers too, the certificate then also proving that their equation has exactly one solution.

    Args:
        model: a module whose program can be captured, a graph, or the `System` of one (to bound it several times).
        method: "eliminate" puts in what an activation keeps, exactly: the tightest. "group" multiplies it instead, as
            the paper does; "chain" leaves layers uncoupled; "residual-relu" writes MaxMin with two ReLUs, as LipSDP
            must; "product" multiplies norms.
        output: for "linf" the index of an output or a weight for each; for "l2" optional.
        solver: "structured" is our own and the default; "clarabel" and "scs" solve the same program by cvxpy (extra
            `convex`), the default for "group".
        example: an input batch, where the input's shape is not that of the first linear layer.
        tolerance: relative gap to the optimum at which our solver ends.
        options: passed on to cvxpy's solver.
    Returns: the bound, with a certificate that was checked in float64 with room for rounding. It is for the linear maps
        between nonlinearities as float64 has them: where several affine layers follow one another, their product.
    Raises: UnsupportedLayer (a TypeError), naming a layer that no bound passes. BadInput, for l-infinity without an
        output. NotWellPosed, for an implicit layer that is not proved to have one solution.
    Source: Pauli et al. 2024, arXiv 2401.14033, theorems 1 to 3; Fazlyab et al. 2019, arXiv 1906.04893.
    """
    start = time.perf_counter()
    system = _one_output(system_of(model, example), norm, output)
    product = system.gains(norm)[-1] * (1 + 1e-12 * (len(system.units) + 1))
    if method == "product" or not system.units or product == 0:
        status = "exact" if not system.units or product == 0 else "norms multiplied"
        return LipschitzBound(product, norm, "product", "norms", status, time.perf_counter() - start)
    solver = solver or ("clarabel" if method == "group" else "structured")
    if method == "group" and (solver == "structured" or any(map(system.is_implicit, range(len(system.units))))):
        raise BadInput(
            "method 'group' has multipliers that grow without limit: it needs solver='clarabel' or 'scs' and no "
            "implicit layers. method='eliminate' gives the same bound or a better one, and has neither limit."
        )
    system = system.balanced()
    problem = program(system, method, norm)
    # Inputs that nothing reads make the search slow and change none of its variables; the proof is of the whole.
    narrowed = system.narrowed() if norm == "l2" else system
    narrow = problem if narrowed is system else program(narrowed, method, norm)
    safe = strictly_feasible(narrow)
    y, status, gap = _solve(narrow, safe, solver, tolerance, options)
    proof = certify(problem, y, safe, inside=solver == "structured")
    return LipschitzBound(proof.value, norm, method, solver, status, time.perf_counter() - start, gap, proof)


def robust_radius(
    model: nn.Module, x: Float[Tensor, "batch *input"], lip: float | LipschitzBound
) -> Float[Tensor, "batch"]:
    r"""The Euclidean distance within which no sample can change class: $m(x) / (\sqrt2 L)$ with the margin m.

    The margin is the largest output less the second; the difference of two outputs of a map with constant L has
    constant $\sqrt2 L$.
    Raises: BadInput, for a bound that is not an l2 bound of all outputs, or fewer than two of these.
    Source: Tsuzuku, Sato and Sugiyama 2018, arXiv 1802.04034, proposition 1.
    """
    if isinstance(lip, LipschitzBound) and lip.norm != "l2":
        raise BadInput("robust_radius needs an l2 bound of the whole output; this one is for l-infinity and one output")
    value = lip.value if isinstance(lip, LipschitzBound) else lip
    with torch.no_grad(), evaluating(model):
        outputs = call(model, x).flatten(1)
    if outputs.shape[1] < 2:
        raise BadInput(f"a margin needs at least two outputs, got {outputs.shape[1]}")
    best = outputs.topk(2, dim=1).values
    return (best[:, 0] - best[:, 1]) / (math.sqrt(2) * value)


def _one_output(system: System, norm: Norm, output: int | Tensor | None) -> System:
    count = len(system.output)
    if output is None:
        if norm == "linf" and count != 1:
            raise BadInput(
                f"an l-infinity bound is for one output, and the network has {count}: pass output=, an index or weights"
            )
        return system
    if isinstance(output, int):
        if not -count <= output < count:
            raise BadInput(f"output {output} does not exist: the network has {count}")
        output = torch.eye(count, dtype=torch.float64)[output]
    if output.shape != (count,):
        raise BadInput(f"output needs an index or one weight for each of {count} outputs, got {tuple(output.shape)}")
    return system.row(output)


def _solve(
    problem: Program, safe: Tensor, solver: Solver, tolerance: float, options: Mapping[str, Any] | None
) -> tuple[Tensor, str, float | None]:
    if solver != "structured":
        return *solve_conic(problem, solver, dict(options or {})), None
    path = minimise(problem.atoms, problem.objective, problem.either_sign, safe, tolerance=tolerance)
    relative = path.gap / float(problem.objective @ path.y)
    gap = relative / 2 if problem.norm == "l2" else relative
    return path.y, f"{path.steps} steps, gap {gap:.0e}", gap
