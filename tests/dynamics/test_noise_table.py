"""The characteristic temperature of an exact power law is its own inverse; what did not finish does not count."""

import math

import numpy as np
import pytest

from corollary.base.errors import BadInput
from corollary.dynamics.fits import fit_power_law
from corollary.dynamics.noise_table import PhaseTable, cell_means, characteristic_temperature

DELTA, GAMMA = 0.8, 0.3


def table(points=(64, 256), temperatures=(0.01, 0.1, 1.0), alphas=(1.0,), repeats=2) -> PhaseTable:
    """Weight changes T^0.8 P^0.3, times 2 or 1/2 in turn over the repeats: their geometric mean is the law."""
    rows = [(p, a, t, r) for p in points for a in alphas for t in temperatures for r in range(repeats)]
    size, alpha, temperature, repeat = (np.array(column) for column in zip(*rows, strict=True))
    law = temperature**DELTA * size.astype(float) ** GAMMA * np.where(repeat % 2, 2.0, 0.5) / alpha
    return PhaseTable(
        points=size,
        alpha=alpha,
        temperature=temperature,
        repeat=repeat,
        steps=np.full(len(rows), 100),
        time=100 * temperature,
        test_error=np.where(repeat % 2, 0.1, 0.3),
        weight_change=law,
        kernel_change=np.full(len(rows), math.nan),
        finished=np.ones(len(rows), dtype=bool),
        diverged=np.zeros(len(rows), dtype=bool),
        width=64,
        batch_size=16,
    )


def test_an_exact_power_law_gives_its_own_characteristic_temperature():
    found = characteristic_temperature(table(), threshold=0.5)
    for size, value in found.items():
        assert value == pytest.approx((0.5 / size**GAMMA) ** (1 / DELTA), rel=1e-12)
    law = fit_power_law(list(found), list(found.values()))
    assert law.exponent == pytest.approx(-GAMMA / DELTA, abs=1e-12)


def test_without_a_threshold_it_is_the_doubling_of_the_coldest():
    found = characteristic_temperature(table())
    assert all(value == pytest.approx(0.01 * 2 ** (1 / DELTA), rel=1e-12) for value in found.values())
    tripled = characteristic_temperature(table(), "weight_change", 3.0)
    assert all(value == pytest.approx(0.01 * 3 ** (1 / DELTA), rel=1e-12) for value in tripled.values())
    assert characteristic_temperature(table(), "time")[64] == pytest.approx(0.02)


def test_outside_the_temperatures_measured_there_is_none():
    assert all(math.isnan(v) for v in characteristic_temperature(table(), threshold=1e3).values())
    assert all(math.isnan(v) for v in characteristic_temperature(table(), threshold=1e-6).values())  # already above


def test_unfinished_networks_are_left_out():
    whole = table(repeats=3)
    broken = whole.where(np.ones(len(whole), dtype=bool))
    broken.finished[broken.repeat == 2] = False
    broken.weight_change[broken.repeat == 2] = math.inf
    assert characteristic_temperature(broken, threshold=0.5) == characteristic_temperature(table(), threshold=0.5)
    means = cell_means(broken, "weight_change")
    assert set(means["finished"].tolist()) == {2}
    assert set(means["of"].tolist()) == {3}
    assert np.allclose(means["mean"], means["temperature"] ** DELTA * means["points"] ** GAMMA, rtol=1e-12)
    assert np.allclose(cell_means(broken, "test_error")["mean"], 0.2)  # arithmetic
    broken.finished[broken.temperature == 1.0] = False
    assert np.isnan(cell_means(broken, "time")["mean"][2])


def test_tables_that_have_no_answer_are_refused():
    with pytest.raises(BadInput, match="of one scale alpha, the table holds"):
        characteristic_temperature(table(alphas=(1.0, 2.0)))
    none = table()
    none.finished[:] = False
    with pytest.raises(BadInput, match="none of the 12 networks finished"):
        characteristic_temperature(none)
    zero = table()
    zero.test_error[:] = 0
    with pytest.raises(BadInput, match="must be positive"):
        characteristic_temperature(zero, "test_error")


@pytest.mark.parametrize("alphas", [(1.0,), (1.0, 8.0)], ids=["lines", "maps"])
def test_the_figure_draws_what_was_measured_and_counts_the_rest(alphas):
    kept = table(alphas=alphas)
    kept.finished[:2] = False
    figure = kept.figure()
    assert figure.svg().startswith("<svg")
    assert f"2 of {len(kept)} networks" in figure.caption
    assert "kernel_change" not in figure.data  # it was not asked for
    assert math.isnan(figure.data["weight_change"][0])
    assert len(kept) == 12 * len(alphas)
    assert len(kept.where(kept.points == 64)) == 6 * len(alphas)
