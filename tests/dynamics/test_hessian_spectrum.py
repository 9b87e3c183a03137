"""Outliers and bulk against dense spectra."""

import pytest
import torch

from corollary.base.errors import BadInput
from corollary.dynamics.hessian_spectrum import outliers_and_bulk
from corollary.linalg import SYMMETRIC, Operator, spectral_density


def spiked(size: int = 300) -> tuple[torch.Tensor, Operator]:
    """A spectrum like a Hessian's: four outliers, one negative, over a small bulk."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    basis, _ = torch.linalg.qr(noise)
    values = torch.cat([torch.tensor([9.0, 4.0, 2.0, -3.0]), 0.1 * torch.randn(size - 4, generator=generator)]).double()
    return values, Operator.from_dense((basis * values) @ basis.T, {SYMMETRIC})


def test_moments_need_far_fewer_products_than_without_the_outliers_taken_out():
    values, op = spiked()
    powers = (1, 2, 3, 4)
    exact = torch.stack([(values**p).mean() for p in powers])
    ours, plain, reported = [], [], []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        found = outliers_and_bulk(op, 4, steps=6, probes=6, generator=generator)
        same_price = spectral_density(op, 6, found.products // 6, generator=generator)
        ours.append(torch.tensor([found.moment(p).value for p in powers]) - exact)
        reported.append(found.moment(1).standard_error)
        plain.append(torch.tensor([same_price.moment(p).value for p in powers]) - exact)
    assert found.values.tolist() == pytest.approx([9.0, 4.0, -3.0, 2.0], rel=1e-4)
    assert bool((torch.stack(ours).square().mean(0) < 0.25 * torch.stack(plain).square().mean(0)).all())
    # The error that is reported is of the size of the error that is made, root mean squares over eight.
    made = float(torch.stack(ours)[:, 0].square().mean().sqrt())
    assert 0.4 < made / float(torch.tensor(reported).square().mean().sqrt()) < 2.5


def test_functions_that_are_not_zero_at_zero_count_each_eigenvalue_once():
    _, op = spiked(60)
    found = outliers_and_bulk(op, 4, steps=20, probes=3)
    assert found.trace(torch.ones_like).value == pytest.approx(60, rel=1e-9)
    grid = torch.linspace(-6, 12, 3001, dtype=torch.float64)
    total = torch.trapezoid(found.pdf(grid, 0.2), grid)
    assert float(total) == pytest.approx(1, abs=2e-3)
    near = found.pdf(torch.tensor([9.0, 6.5], dtype=torch.float64), 0.05)
    assert float(near[0]) == pytest.approx(1 / (60 * 0.05 * (2 * torch.pi) ** 0.5), rel=1e-3)  # a single eigenvalue
    assert float(near[1]) == 0
    assert found.edges() == pytest.approx((-3.0, 9.0), rel=1e-4)


def test_room_for_a_bulk_is_needed():
    with pytest.raises(BadInput, match="between 1 and 59"):
        outliers_and_bulk(spiked(60)[1], 60)
