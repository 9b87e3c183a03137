"""The whole spectrum of a symmetric operator: its outliers one by one, and the density of everything else.

A Hessian has a few large eigenvalues and thousands of small ones. Random probes of the whole are noisy because of the
few; with those found first and projected out, what is left is nearly flat, and few probes measure it well.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.linalg import SYMMETRIC, Eigenpairs, Estimate, Operator, SpectralDensity, eigenpairs, spectral_density


@final
@dataclass(frozen=True)
class OutliersAndBulk:
    """Eigenvalues of largest magnitude with their residuals, and the spectral density of the rest.

    Args:
        outliers: eigenpairs, largest magnitude first.
        bulk: of the operator with each outlier moved to `place`, a value in the midst of the rest.
    """

    outliers: Eigenpairs
    bulk: SpectralDensity
    place: float

    @property
    def size(self) -> int:
        """The side of the operator."""
        return self.bulk.size

    @property
    def products(self) -> int:
        """Operator-vector products used."""
        return self.outliers.products + self.bulk.products + 1

    @property
    def values(self) -> Float[Tensor, "k"]:
        """The outliers, in float64 on the processor."""
        return self.outliers.values.double().cpu()

    def trace(self, f: Callable[[Tensor], Tensor] = lambda x: x) -> Estimate:
        r"""$\operatorname{tr} f(A)$ with f applied to eigenvalues; only the share of the bulk has an error."""
        moved = float(f(torch.full_like(self.values, self.place)).sum())
        rest = self.bulk.trace(f)
        return Estimate(float(f(self.values).sum()) - moved + rest.value, rest.standard_error, self.products)

    def moment(self, p: int) -> Estimate:
        r"""$\frac1n \operatorname{tr} A^p$ for p up to twice the steps of the bulk."""
        whole = self.trace(lambda x: x**p)
        return Estimate(whole.value / self.size, whole.standard_error / self.size, whole.products)

    def pdf(self, grid: Float[Tensor, "x"], width: float) -> Float[Tensor, "x"]:
        """The density of all eigenvalues on `grid`, each smoothed by a Gaussian of standard deviation `width`."""
        places = torch.cat([self.values, torch.full_like(self.values, self.place)])
        bumps = torch.exp(-0.5 * ((grid.double()[:, None] - places) / width) ** 2)
        bumps = bumps[:, : len(self.values)].sum(1) - bumps[:, len(self.values) :].sum(1)
        smooth = bumps / (width * (2 * torch.pi) ** 0.5 * self.size)
        return (self.bulk.pdf(grid.double(), width) + smooth).clamp(min=0).to(grid)

    def edges(self) -> tuple[float, float]:
        """The smallest and the largest eigenvalue seen."""
        edges = self.bulk.edges()
        return min(edges.lower, float(self.values.min())), max(edges.upper, float(self.values.max()))


def outliers_and_bulk(
    op: Operator,
    outliers: int = 10,
    steps: int = 30,
    probes: int = 5,
    *,
    search_steps: int | None = None,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
) -> OutliersAndBulk:
    """The eigenvalues of largest magnitude by Lanczos, and the density of the rest by stochastic Lanczos quadrature.

    Args:
        outliers: how many eigenvalues to find one by one.
        steps, probes: of the quadrature; moments up to 2 steps - 1 are exact for each probe.
        search_steps: at most so many Lanczos steps for the outliers. tolerance: as for `eigenpairs`.
    Raises: BadInput, if the operator is not symmetric or has no room for a bulk beside so many outliers.
    Source: Ghorbani, Krishnan and Xiao 2019, arXiv:1901.10159; that a deflated trace needs fewer probes: Gambhir et al.
        2017, arXiv:1603.05988.
    """
    if not 1 <= outliers < op.shape[0]:
        raise BadInput(f"an operator of shape {op.shape} has between 1 and {op.shape[0] - 1} outliers; got {outliers}")
    found = eigenpairs(op, outliers, "magnitude", tolerance=tolerance, steps=search_steps, generator=generator)
    rows = found.vectors.T.contiguous()

    def inside(columns: Tensor) -> Tensor:
        return rows.T @ (rows @ columns)

    # A Rayleigh quotient outside the outliers lies within the rest: there the outliers do not widen its edges.
    noise = torch.randn(op.shape[0], generator=generator, dtype=torch.float64).to(op.device, op.dtype)
    vector = noise - inside(noise)
    place = float(vector @ (op @ vector) / (vector @ vector))

    def moved(columns: Tensor) -> Tensor:
        within = inside(columns)
        image = op @ (columns - within)
        return image - inside(image) + place * within

    rest = Operator(op.shape, moved, None, {SYMMETRIC}, op.dtype, op.device)
    return OutliersAndBulk(found, spectral_density(rest, steps, probes, generator=generator), place)
