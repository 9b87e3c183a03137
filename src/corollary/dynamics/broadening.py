"""How far noise pushes extreme eigenvalues out: the spiked Wigner and Wishart laws, their fit, and the rates they give.

The Hessian of a batch is that of all data plus noise. Where the noise is a symmetric matrix of independent entries, an
eigenvalue of the mean that is large enough shifts outwards, and one that is too small drowns in the noise.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar

from corollary.base.errors import BadInput
from corollary.dynamics.batch_curvature import BatchCurvature, effective_batch
from corollary.evidence import PALETTE, Figure

OptimizerName: TypeAlias = Literal["sgd", "adam"]
KAPPA_GRID = 400
"""Values of kappa, evenly spaced in logarithms, among which the fit looks before it refines."""
RESAMPLINGS = 50
"""Of the batches, for the error of kappa."""
TINY = 1e-300
"""What stands for eigenvalues that are not positive, in logarithms."""


def spiked_wigner(eigenvalue: ArrayLike, kappa: ArrayLike, effective: ArrayLike) -> np.ndarray:
    r"""Where noise of scale $\kappa / \sqrt b$ puts an outlying eigenvalue of a symmetric matrix.

    $\lambda \to \lambda + \kappa^2 / (b \lambda)$ while $|\lambda| > \kappa / \sqrt b$; else it is lost in the noise,
    whose semicircle ends at $\pm 2 \kappa / \sqrt b$ (the lower end for negative ones). Both agree at the switch.

    Args:
        eigenvalue: $\lambda$ of the matrix without noise. All arguments broadcast.
        kappa: $\kappa \ge 0$, with $\kappa^2$ = P times the variance of an entry at b = 1.
        effective: $b > 0$, the effective batch; infinite for no noise.
    Raises: BadInput, if kappa is negative or b is not positive.
    Source: Granziol, Zohren and Roberts 2022, arXiv 2006.09092, main theorem; for noise
            of independent entries first Capitaine, Donati-Martin and Feral 2009, arXiv 0706.0136.
    """
    spike, noise = np.asarray(eigenvalue, dtype=np.float64), _noise(kappa, effective)
    sign = np.where(spike < 0, -1.0, 1.0)
    outlying = np.abs(spike) > noise
    shift = np.divide(noise**2, spike, out=np.zeros(np.broadcast(spike, noise).shape), where=outlying)
    return np.where(outlying, spike + shift, 2 * sign * noise)


def wigner_overlap(eigenvalue: ArrayLike, kappa: ArrayLike, effective: ArrayLike) -> np.ndarray:
    r"""Squared overlap of the noisy eigenvector with the true one: $1 - \kappa^2 / (b \lambda^2)$, or 0 in the noise.

    Arguments, errors and source as for `spiked_wigner`.
    """
    spike, noise = np.asarray(eigenvalue, dtype=np.float64), _noise(kappa, effective)
    outlying = np.abs(spike) > noise
    ratio = np.divide(noise, np.abs(spike), out=np.ones(np.broadcast(spike, noise).shape), where=outlying)
    return np.asarray(1 - ratio**2)


def spiked_wishart(spike: ArrayLike, bulk: ArrayLike, aspect: ArrayLike) -> np.ndarray:
    r"""Where sampling puts an outlying eigenvalue of a covariance, as of the Gauss-Newton matrix of a batch.

    $\ell \to \ell \, (1 + c s / (\ell - s))$ while $\ell > s (1 + \sqrt c)$; else the edge of the bulk,
    $s (1 + \sqrt c)^2$. Both agree at the switch.

    Args:
        spike: $\ell$, an eigenvalue of the true covariance. All arguments broadcast.
        bulk: $s > 0$, all its other eigenvalues.
        aspect: $c > 0$, dimension over samples; for a batch, effective parameters over (batch x outputs).
    Raises: BadInput, if bulk or aspect is not positive.
    Source: Baik and Silverstein 2006, arXiv math/0408165, theorem 1.1; in this use, arXiv 2006.09092.
    """
    ell, s, c = (np.asarray(value, dtype=np.float64) for value in (spike, bulk, aspect))
    if not (np.all(s > 0) and np.all(c > 0)):
        raise BadInput(f"a covariance has a bulk above 0 and an aspect ratio above 0; got bulk {bulk}, aspect {aspect}")
    outlying = ell > s * (1 + np.sqrt(c))
    shape = np.broadcast(ell, s, c).shape
    factor = np.divide(c * s, ell - s, out=np.zeros(shape), where=np.broadcast_to(outlying, shape))
    return np.where(outlying, ell * (1 + factor), s * (1 + np.sqrt(c)) ** 2)


@final
@dataclass(frozen=True)
class Broadening:
    r"""The spiked Wigner law with the one constant $\kappa$ that fits a measured curve best.

    Args:
        kappa: the scale of the noise; `eigenvalue`: $\lambda_1$ of the Hessian over all `samples`.
        batch_sizes, measured: what it was fitted to, batches smaller than all data.
        kappa_error: standard deviation of $\kappa$ over resamplings of the batches of each size; NaN for one each.
    """

    kappa: float
    eigenvalue: float
    samples: int
    batch_sizes: Float[np.ndarray, "k"]
    measured: Float[np.ndarray, "k"]
    kappa_error: float = math.nan

    def predicted(self, batch_size: ArrayLike) -> np.ndarray:
        """The largest eigenvalue expected at batch sizes up to the number of samples."""
        return spiked_wigner(self.eigenvalue, self.kappa, effective_batch(batch_size, self.samples))

    @property
    def relative_errors(self) -> Float[np.ndarray, "k"]:
        """|predicted / measured - 1| at each measured batch size."""
        return np.abs(self.predicted(self.batch_sizes) / self.measured - 1)

    @property
    def critical_effective_batch(self) -> float:
        r"""$b^* = \kappa^2 / \lambda_1^2$: below it the noise hides $\lambda_1$ altogether."""
        return self.kappa**2 / self.eigenvalue**2

    @property
    def critical_batch(self) -> float:
        r"""The batch size of effective batch $b^*$, where $2 / \lambda_1$ of a batch is half of what all data allow."""
        critical = self.critical_effective_batch
        return critical / (1 + critical / self.samples)

    @property
    def critical_batch_error(self) -> float:
        """What `kappa_error` makes of the critical batch, to first order."""
        critical = self.critical_effective_batch
        return 2 * critical * self.kappa_error / self.kappa / (1 + critical / self.samples) ** 2

    def figure(self) -> Figure:
        """Measured largest eigenvalues with the law, and the learning rates that they allow."""
        sizes = np.geomspace(self.batch_sizes.min(), self.samples, 200)
        law = self.predicted(sizes)
        return Figure(
            "batch-curvature",
            "Largest Hessian eigenvalue of a batch, and the learning rate it allows",
            f"Left: the law has one fitted constant, kappa = {self.kappa:.3g}; without noise the value would be that "
            f"of all data, {self.eigenvalue:.3g}. Right: gradient steps are stable below 2 over the eigenvalue; the "
            "dotted line marks the batch at which half of the largest rate of all is reached.",
            {
                "batch_size": self.batch_sizes,
                "measured": self.measured,
                "law_batch_size": sizes,
                "law": law,
                "full": [self.eigenvalue],
                "critical_batch": [self.critical_batch],
            },
            _draw,
            size=(8.6, 3.6),
            panels=(1, 2),
        )


def fit_broadening(curve: BatchCurvature) -> Broadening:
    r"""The $\kappa$ that brings the spiked Wigner law closest to the measured $\lambda_1(B)$, in logarithms.

    $\lambda_1$ is held at its value over all data. For a Gauss-Newton curve the same additive law is fitted: it is then
    an approximation (the exact one, `spiked_wishart`, has a second unknown).

    Raises: BadInput, if the largest eigenvalue of all data is not positive, or no batch is smaller than all data.
    Source: Granziol, Zohren and Roberts 2022, arXiv 2006.09092.
    """
    sizes = np.asarray(curve.batch_sizes, dtype=np.float64)
    smaller = sizes < curve.samples
    if not curve.full_largest > 0:
        raise BadInput(f"the law is of an outlier above 0; the largest eigenvalue of all data is {curve.full_largest}")
    if not smaller.any():
        raise BadInput(f"noise is seen in batches smaller than all {curve.samples} samples; got {sizes.tolist()}")
    batches = curve.largest.cpu().numpy().astype(np.float64)[smaller]
    sizes, measured = sizes[smaller], batches.mean(1)
    effective = effective_batch(sizes, curve.samples)

    def misfit(log_kappas: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Sum over sizes of squared differences in logarithms, [values, kappas]."""
        law = np.log(spiked_wigner(curve.full_largest, np.exp(log_kappas)[:, None], effective))
        return ((law - np.log(np.maximum(values, TINY))[:, None]) ** 2).sum(2)

    # The largest kappa that can fit explains some value by the noise edge alone; far below it nothing is shifted.
    top = float(np.log(np.sqrt(effective) * batches.max()).max())
    grid = np.linspace(top - np.log(1e5), top, KAPPA_GRID)
    best = int(misfit(grid, measured[None]).argmin())
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, KAPPA_GRID - 1)])
    found: Any = minimize_scalar(
        lambda x: float(misfit(np.array([x]), measured[None])[0, 0]),
        bounds=bounds,
        method="bounded",
        options={"xatol": 1e-10},
    )
    picks = np.random.default_rng(0).integers(batches.shape[1], size=(RESAMPLINGS, *batches.shape))
    resampled = np.take_along_axis(batches[None], picks, axis=2).mean(2)
    spread = np.exp(grid[misfit(grid, resampled).argmin(1)]).std() if batches.shape[1] > 1 else math.nan
    kappa = float(np.exp(found.x))
    return Broadening(kappa, curve.full_largest, curve.samples, sizes, measured, float(spread))


def max_learning_rate(
    law: BatchCurvature | Broadening,
    batch_size: int,
    optimizer: OptimizerName = "sgd",
    *,
    reference: tuple[int, float] | None = None,
    momentum: float = 0.0,
) -> float:
    r"""The largest stable learning rate at a batch size, or a rate that is known to work rescaled to that batch size.

    For gradient steps $2 (1 + \beta) / \lambda_1(B)$ with heavy-ball momentum $\beta$; from $(B_0, \eta_0)$,
    $\eta_0 \lambda_1(B_0) / \lambda_1(B)$. For Adam only the second exists: its preconditioner takes the outliers
    out, the edge of the noise governs, and the rate goes with $\sqrt b$ until $b^*$, where the noise lets the outlier
    through.

    Args:
        law: a fitted law, or a measured curve, which is fitted first.
        batch_size: between 1 and the number of samples.
        reference: a batch size and the learning rate that works with it.
    Raises: BadInput, for Adam without a reference, or a batch size that the data does not have.
    Source: Granziol, Zohren and Roberts 2022, arXiv 2006.09092; that Adam's rate saturates at $b^*$ is our reading.
    """
    fitted = fit_broadening(law) if isinstance(law, BatchCurvature) else law
    if optimizer not in ("sgd", "adam"):
        raise BadInput(f"the optimizer is 'sgd' or 'adam'; got {optimizer!r}")
    if not 0 <= momentum < 1:
        raise BadInput(f"heavy-ball momentum lies in [0, 1); got {momentum}")
    if reference is None:
        if optimizer == "adam":
            raise BadInput(
                "the scale of Adam's rate is not in the spectrum: give reference=(batch size, learning rate)"
            )
        return float(2 * (1 + momentum) / fitted.predicted(batch_size))
    known_batch, known_rate = reference
    if not known_rate > 0:
        raise BadInput(f"the reference learning rate must be above 0; got {known_rate}")
    if optimizer == "sgd":
        return float(known_rate * fitted.predicted(known_batch) / fitted.predicted(batch_size))
    wanted, known = (
        min(float(effective_batch(size, fitted.samples)), fitted.critical_effective_batch)
        for size in (batch_size, known_batch)
    )
    return known_rate * float(np.sqrt(wanted / known))


def _noise(kappa: ArrayLike, effective: ArrayLike) -> np.ndarray:
    scale, b = (np.asarray(value, dtype=np.float64) for value in (kappa, effective))
    if not (np.all(scale >= 0) and np.all(b > 0)):
        raise BadInput(f"noise needs kappa >= 0 and an effective batch above 0; got kappa {kappa}, batch {effective}")
    return np.asarray(scale / np.sqrt(b))


def _draw(axes: Any, data: Any) -> None:
    left, right = axes
    full, critical = float(data["full"][0]), float(data["critical_batch"][0])
    left.plot(data["law_batch_size"], data["law"], color=PALETTE[0], label="law, one constant fitted")
    left.plot(data["batch_size"], data["measured"], "o", color=PALETTE[1], label="measured, mean over batches")
    left.axhline(full, color=PALETTE[6], linestyle="--", label="all data")
    left.set(xlabel="batch size", ylabel="largest eigenvalue", xscale="log", yscale="log")
    right.plot(data["law_batch_size"], 2 / np.asarray(data["law"]), color=PALETTE[0], label="law")
    right.plot(data["batch_size"], 2 / np.asarray(data["measured"]), "o", color=PALETTE[1], label="measured")
    right.axhline(2 / full, color=PALETTE[6], linestyle="--", label="all data")
    if critical >= min(data["law_batch_size"]):
        right.axvline(critical, color=PALETTE[2], linestyle=":", label="half of it reached")
    right.set(xlabel="batch size", ylabel="2 / largest eigenvalue", xscale="log", yscale="log")
    left.legend()
    right.legend()
