"""Fits: exact laws are recovered, and what cannot be fitted is refused."""

import numpy as np
import pytest

from corollary.base.errors import BadInput
from corollary.dynamics.fits import fit_linear, fit_power_law


def test_a_law_in_two_variables_is_recovered() -> None:
    x, z = np.random.default_rng(0).normal(size=(2, 30))
    fit = fit_linear({"x": x, "z": z}, 3 - 2 * x + 0.5 * z)
    assert fit.intercept == pytest.approx(3, abs=1e-12)
    assert fit.coefficients == pytest.approx({"x": -2, "z": 0.5}, abs=1e-12)
    assert fit.r2 == pytest.approx(1, abs=1e-12)


def test_r2_is_the_squared_correlation_of_one_column() -> None:
    x, y = np.random.default_rng(1).normal(size=(2, 40))
    assert fit_linear({"x": x}, y).r2 == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, abs=1e-12)


def test_an_exact_power_law_has_no_spread() -> None:
    x = np.array([1.0, 2.0, 4.0, 8.0, 8.0])
    law = fit_power_law(x, 3 * x**-0.5)
    assert law.exponent == pytest.approx(-0.5, abs=1e-12)
    assert law.factor == pytest.approx(3, rel=1e-12)
    assert (law.low, law.high) == pytest.approx((-0.5, -0.5), abs=1e-9)


def test_the_interval_covers_the_exponent_of_a_noisy_law() -> None:
    generator = np.random.default_rng(2)
    x = np.exp(generator.uniform(0, 4, size=200))
    law = fit_power_law(x, x**1.5 * np.exp(0.3 * generator.normal(size=200)), bootstrap=500)
    assert law.low < 1.5 < law.high
    assert law.high - law.low < 0.2


@pytest.mark.parametrize(
    ("x", "y"), [([1.0, 2.0], [0.0, 1.0]), ([1.0, 1.0], [1.0, 2.0]), ([1.0, np.nan], [1.0, 2.0]), ([2.0], [1.0])]
)
def test_what_has_no_exponent_is_refused(x: list[float], y: list[float]) -> None:
    with pytest.raises(BadInput):
        fit_power_law(x, y)


def test_too_few_points_are_refused() -> None:
    with pytest.raises(BadInput, match="coefficients"):
        fit_linear({"x": [1.0]}, [1.0])
