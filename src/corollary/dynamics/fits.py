"""Straight lines through measurements: least squares with its coefficient of determination, and power laws."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from corollary.base.errors import BadInput


class LinearFit(NamedTuple):
    """Least squares `y = intercept + sum of coefficients * columns`; `r2` is the share of variance explained."""

    coefficients: dict[str, float]
    intercept: float
    r2: float


class PowerLaw(NamedTuple):
    """`y = factor * x ** exponent`, fitted in logarithms, with a bootstrap interval (95 %) of the exponent."""

    exponent: float
    low: float
    high: float
    factor: float
    r2: float


def fit_linear(columns: Mapping[str, ArrayLike], y: ArrayLike) -> LinearFit:
    """Ordinary least squares of `y` `[n]` on named columns `[n]` and a constant.

    Raises: BadInput, for columns of unequal length, fewer points than coefficients, or values that are not finite.
    """
    target = np.asarray(y, dtype=np.float64)
    named = {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}
    if any(column.shape != target.shape or column.ndim != 1 for column in named.values()):
        shapes = ", ".join(f"{name} {column.shape}" for name, column in named.items())
        raise BadInput(f"a fit needs columns as long as y {target.shape}, got {shapes}")
    if len(target) <= len(named):
        raise BadInput(f"{len(named) + 1} coefficients need more than {len(named)} points, got {len(target)}")
    design = np.column_stack([np.ones(len(target)), *named.values()])
    if not (np.isfinite(design).all() and np.isfinite(target).all()):
        raise BadInput("a fit needs finite values: leave out runs that did not finish")
    solution = np.linalg.lstsq(design, target, rcond=None)[0]
    spread = ((target - target.mean()) ** 2).sum()
    r2 = 1 - ((target - design @ solution) ** 2).sum() / spread if spread > 0 else 1.0
    return LinearFit(dict(zip(named, solution[1:].tolist(), strict=True)), float(solution[0]), float(r2))


def fit_power_law(x: ArrayLike, y: ArrayLike, *, bootstrap: int = 200, seed: int = 0) -> PowerLaw:
    """The exponent of `y ~ x ** exponent` by least squares in logarithms, resampling points for its interval.

    Args:
        x, y: positive numbers `[n]`, at least two different `x`.
        bootstrap: resamples; those in which all `x` agree are left out. 0 gives an interval of NaN.
    Raises: BadInput, for values that are not positive and finite, or too few of them.
    """
    logs = [np.asarray(values, dtype=np.float64) for values in (x, y)]
    if any(values.ndim != 1 or not (np.isfinite(values) & (values > 0)).all() for values in logs):
        raise BadInput("a power law needs positive, finite numbers [n] for x and y: leave out runs that did not finish")
    log_x, log_y = (np.log(values) for values in logs)
    if len(np.unique(log_x)) < 2:
        raise BadInput(f"a power law needs at least two different x, got {np.unique(logs[0]).tolist()}")
    fit = fit_linear({"x": log_x}, log_y)
    picks = np.random.default_rng(seed).integers(len(log_x), size=(bootstrap, len(log_x)))
    xs, ys = log_x[picks], log_y[picks]
    centred = xs - xs.mean(1, keepdims=True)
    variance = (centred**2).sum(1)
    usable = variance > 1e-12
    slopes = (centred * ys).sum(1)[usable] / variance[usable]
    low, high = np.quantile(slopes, (0.025, 0.975)) if len(slopes) else (np.nan, np.nan)
    return PowerLaw(fit.coefficients["x"], float(low), float(high), float(np.exp(fit.intercept)), fit.r2)
