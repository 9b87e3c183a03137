"""The spiked laws against simulation and their own limits; their fit; the learning rates they give."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from corollary.base.errors import BadInput
from corollary.dynamics.batch_curvature import BatchCurvature, effective_batch
from corollary.dynamics.broadening import (
    Broadening,
    fit_broadening,
    max_learning_rate,
    spiked_wigner,
    spiked_wishart,
    wigner_overlap,
)


def curve_of(
    law: Broadening, sizes: tuple[int, ...], noise: float = 0.0, largest: torch.Tensor | None = None
) -> BatchCurvature:
    """A curve that follows a law, but for relative noise; or one of given values."""
    if largest is None:
        shaken = 1 + noise * np.random.default_rng(0).standard_normal(len(sizes))
        largest = torch.tensor(law.predicted(np.array(sizes)) * shaken)[:, None].repeat(1, 2)
    nothing = torch.zeros_like(largest)
    return BatchCurvature(sizes, largest, nothing, nothing, nothing, law.eigenvalue, -0.1, law.samples, 1000, "hessian")


LAW = Broadening(kappa=2.0, eigenvalue=0.5, samples=1000, batch_sizes=np.ones(1), measured=np.ones(1))


def test_noise_pushes_a_planted_eigenvalue_where_the_law_says():
    size, kappa, b, spike = 800, 3.0, 4.0, 2.5
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = (noise + noise.T) * kappa / (2 * size * b) ** 0.5
    matrix[0, 0] += spike
    matrix[1, 1] -= 2 * spike
    values, vectors = torch.linalg.eigh(matrix)
    # Fluctuations are of the order of the noise over the root of the size: some 2 percent.
    assert values[-1] == pytest.approx(float(spiked_wigner(spike, kappa, b)), rel=0.03)
    assert values[0] == pytest.approx(float(spiked_wigner(-2 * spike, kappa, b)), rel=0.03)
    assert values[-2] == pytest.approx(2 * kappa / b**0.5, rel=0.03)
    assert vectors[0, -1] ** 2 == pytest.approx(float(wigner_overlap(spike, kappa, b)), abs=0.05)


def test_both_sides_of_the_switch_agree_and_below_it_the_noise_rules():
    kappa, b = 2.0, 9.0
    switch = kappa / b**0.5
    just = spiked_wigner(np.array([1 - 1e-9, 1 + 1e-9]) * switch, kappa, b)
    assert just == pytest.approx(2 * switch, rel=1e-12)
    assert float(spiked_wigner(0.0, kappa, b)) == 2 * switch  # the law by itself would diverge here
    assert float(spiked_wigner(-1e-9, kappa, b)) == -2 * switch
    assert float(wigner_overlap(0.5 * switch, kappa, b)) == 0
    grid = spiked_wigner(np.linspace(0, 5, 501), kappa, b)
    assert (np.diff(grid) >= -1e-12).all()


def test_no_noise_changes_nothing():
    assert float(spiked_wigner(0.7, 2.0, np.inf)) == 0.7
    assert float(spiked_wigner(-0.7, 0.0, 3.0)) == -0.7
    assert float(wigner_overlap(0.7, 2.0, np.inf)) == 1.0


def test_wishart_law_by_simulation_and_at_its_switch():
    generator = torch.Generator().manual_seed(1)
    dimension, samples, spike, bulk = 400, 1600, 6.0, 2.0
    x = torch.randn(samples, dimension, generator=generator, dtype=torch.float64) * bulk**0.5
    x[:, 0] *= (spike / bulk) ** 0.5
    values = torch.linalg.eigvalsh(x.T @ x / samples)
    aspect = dimension / samples
    assert values[-1] == pytest.approx(float(spiked_wishart(spike, bulk, aspect)), rel=0.05)
    assert values[-2] == pytest.approx(float(spiked_wishart(bulk, bulk, aspect)), rel=0.03)
    switch = bulk * (1 + aspect**0.5)
    near = spiked_wishart(np.array([1 - 1e-9, 1 + 1e-9]) * switch, bulk, aspect)
    assert near == pytest.approx(bulk * (1 + aspect**0.5) ** 2, rel=1e-8)


def test_effective_batch_is_infinite_for_all_data():
    assert effective_batch(500, 1000) == 1000
    assert np.isinf(effective_batch(1000, 1000))
    with pytest.raises(BadInput, match="between 1 and all 1000"):
        effective_batch(1001, 1000)


@pytest.mark.parametrize("kappa", [0.1, 2.0, 30.0])
def test_the_fit_finds_the_constant_of_a_curve_that_follows_the_law(kappa):
    law = Broadening(kappa, 0.5, 1000, np.ones(1), np.ones(1))
    found = fit_broadening(curve_of(law, (4, 8, 16, 64, 256, 1000)))
    assert found.kappa == pytest.approx(kappa, rel=1e-5)
    assert found.relative_errors.max() < 1e-6
    assert len(found.batch_sizes) == 5  # all data have no noise to fit
    assert float(found.predicted(1000)) == 0.5


def test_the_error_of_kappa_is_that_of_other_batches():
    """Batches scatter by a tenth: kappas fitted to many such curves scatter as each curve says."""
    sizes, generator = (4, 8, 16, 32), np.random.default_rng(3)
    clean = LAW.predicted(np.array(sizes))[:, None]
    found = []
    for _ in range(40):
        largest = torch.tensor(clean * (1 + 0.1 * generator.standard_normal((4, 12))))
        found.append(fit_broadening(curve_of(LAW, sizes, largest=largest)))
    assert np.mean([law.kappa_error for law in found]) == pytest.approx(np.std([law.kappa for law in found]), rel=0.4)
    law = found[0]
    above, below = (replace(law, kappa=law.kappa * (1 + sign * 1e-4)).critical_batch for sign in (1, -1))
    assert law.critical_batch_error == pytest.approx((above - below) / 2e-4 * law.kappa_error / law.kappa, rel=1e-4)
    one_each = curve_of(LAW, sizes, largest=torch.tensor(clean))
    assert np.isnan(fit_broadening(one_each).kappa_error)


def test_at_the_critical_batch_the_rate_is_half_of_the_largest():
    critical = LAW.critical_batch
    assert float(LAW.predicted(critical)) == pytest.approx(2 * LAW.eigenvalue, rel=1e-12)
    assert LAW.critical_effective_batch == 16
    assert effective_batch(critical, 1000) == pytest.approx(16)


def test_learning_rates_of_gradient_steps():
    assert max_learning_rate(LAW, 1000) == pytest.approx(2 / 0.5)
    assert max_learning_rate(LAW, 1000, momentum=0.9) == pytest.approx(3.8 / 0.5)
    small = max_learning_rate(LAW, 8, reference=(4, 0.1))
    assert small == pytest.approx(0.1 * float(LAW.predicted(4) / LAW.predicted(8)))
    many = Broadening(2.0, 1e-3, 10**9, np.ones(1), np.ones(1))  # the noise edge alone: rates grow with the root
    assert max_learning_rate(many, 400, reference=(100, 0.1)) == pytest.approx(0.2, rel=1e-5)
    shifted = Broadening(1.0, 1.0, 10**9, np.ones(1), np.ones(1))
    assert max_learning_rate(shifted, 10**8) == pytest.approx(2.0, rel=1e-6)  # saturated


def test_adam_goes_with_the_root_and_then_saturates():
    assert max_learning_rate(LAW, 8, "adam", reference=(2, 0.01)) == pytest.approx(
        0.01 * float(np.sqrt(effective_batch(8, 1000) / effective_batch(2, 1000)))
    )
    top = max_learning_rate(LAW, 1000, "adam", reference=(2, 0.01))
    assert top == pytest.approx(0.01 * float(np.sqrt(16 / effective_batch(2, 1000))))
    assert max_learning_rate(LAW, 100, "adam", reference=(2, 0.01)) == top
    assert max_learning_rate(curve_of(LAW, (4, 16)), 100, "adam", reference=(2, 0.01)) == pytest.approx(top, rel=1e-4)


def test_what_cannot_be_used_is_refused():
    with pytest.raises(BadInput, match="reference"):
        max_learning_rate(LAW, 8, "adam")
    with pytest.raises(BadInput, match="momentum"):
        max_learning_rate(LAW, 8, momentum=1.0)
    with pytest.raises(BadInput, match="reference learning rate"):
        max_learning_rate(LAW, 8, reference=(4, 0.0))
    with pytest.raises(BadInput, match="between 1 and all"):
        max_learning_rate(LAW, 2000)
    with pytest.raises(BadInput, match="smaller than all"):
        fit_broadening(curve_of(LAW, (1000,)))
    falling = replace(curve_of(LAW, (4, 8)), full_largest=-1.0)
    with pytest.raises(BadInput, match="outlier above 0"):
        fit_broadening(falling)
    with pytest.raises(BadInput, match="kappa"):
        spiked_wigner(1.0, -1.0, 2.0)
    with pytest.raises(BadInput, match="aspect"):
        spiked_wishart(1.0, 1.0, 0.0)


def test_the_figure_draws():
    assert fit_broadening(curve_of(LAW, (4, 8, 64), noise=0.1)).figure().svg().startswith("<svg")
