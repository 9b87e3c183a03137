"""How far weights wander from their start: slowly, as the logarithm of time, if the loss is a random landscape."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from corollary.base.errors import BadInput
from corollary.dynamics.fits import fit_linear, fit_power_law
from corollary.engine import TrainingRecord


class Distances(NamedTuple):
    """Numbers of updates `[n]`, from 1 up, and the distance of the weights from their start after each."""

    updates: np.ndarray
    distance: np.ndarray


@dataclass(frozen=True)
class DiffusionFit:
    r"""Three laws of a distance d over updates t, and how much of its variance each explains.

    Args:
        slope, intercept: of $d = c_0 + c_1 \log t$, ultra-slow diffusion.
        r2_log: of that law.
        r2_root: of $d = c_0 + c_1 \sqrt t$, ordinary diffusion.
        exponent, r2_power: of $d = c\, t^a$, fitted in logarithms; `r2_power` is measured on d itself.
    """

    slope: float
    intercept: float
    r2_log: float
    r2_root: float
    exponent: float
    r2_power: float

    def at(self, updates: ArrayLike) -> np.ndarray:
        """The logarithmic law's distance after so many updates."""
        return self.intercept + self.slope * np.log(np.asarray(updates, dtype=np.float64))


def weight_distance(record: TrainingRecord, member: int | None = None) -> Distances:
    r"""The column `distance`, $\lVert w_t - w_0 \rVert$ over all trained parameters, from the first update on.

    Args:
        record: of `engine.fit`, or of `engine.population`, whose columns have one entry a member.
        member: of a population.
    Raises: BadInput, if the record has no such column, or a population's comes without `member`.
    """
    updates, distance = record.measured("distance")
    if distance.ndim > 1:
        if member is None:
            raise BadInput(f"this record is of {distance.shape[1]} networks: say which (member=0)")
        distance = distance[:, member]
    usable = (updates > 0) & np.isfinite(distance)
    return Distances(updates[usable], distance[usable])


def fit_diffusion(updates: ArrayLike, distance: ArrayLike, skip: int = 5) -> DiffusionFit:
    r"""Fit $\log t$, $\sqrt t$ and a power of t to distances from the start.

    Args:
        updates, distance: `[n]`.
        skip: updates before this one are left out: the first steps fall downhill, and only then does wandering begin.
    Raises: BadInput, if fewer than 4 points are left, or a distance is not positive.
    Source: Hoffer, Hubara and Soudry 2017, arXiv 1705.08741, section 3, after Bouchaud and Georges 1990.
    """
    t, d = (np.asarray(values, dtype=np.float64) for values in (updates, distance))
    late = t >= skip
    t, d = t[late], d[late]
    if len(t) < 4:
        raise BadInput(f"a law of diffusion needs at least 4 measurements from update {skip} on, got {len(t)}")
    log, root, power = fit_linear({"t": np.log(t)}, d), fit_linear({"t": np.sqrt(t)}, d), fit_power_law(t, d)
    spread = ((d - d.mean()) ** 2).sum()
    missed = ((d - power.factor * t**power.exponent) ** 2).sum()
    return DiffusionFit(
        log.coefficients["t"], log.intercept, log.r2, root.r2, power.exponent, float(1 - missed / spread)
    )
