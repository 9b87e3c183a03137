"""Bounds on the threshold from moments, against the exact one."""

import math

import pytest
import torch

from corollary.base.errors import BadInput
from corollary.dynamics.mean_square import SecondMoment
from corollary.dynamics.stability_limits import GradientMoments


def moments_of(rows):
    samples = rows.mT @ rows
    G = samples.mean(0)
    return GradientMoments(
        samples=len(rows),
        directions=rows.shape[1],
        trace=float(G.trace()),
        largest_eigenvalue=float(torch.linalg.eigvalsh(G)[-1]),
        frobenius=float(G.norm()),
        fourth_moment=float(samples.square().sum((1, 2)).mean()),
        largest_sample=float(torch.linalg.eigvalsh(samples)[:, -1].max()),
    )


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.97])
@pytest.mark.parametrize("replacement", [True, False])
def test_the_bounds_are_in_order(momentum, replacement):
    generator = torch.Generator().manual_seed(0)
    options = {"replacement": replacement, "momentum": momentum}
    slack = 1 + 1e-9
    for _ in range(20):
        n, c, p = (int(torch.randint(1, top, (), generator=generator)) for top in (12, 4, 15))
        rows = torch.randn(n, c, p, generator=generator, dtype=torch.float64)
        rows *= torch.randn(n, 1, 1, generator=generator, dtype=torch.float64).exp()
        batch_size = int(torch.randint(1, n + 1, (), generator=generator))
        moments, exact = moments_of(rows), SecondMoment.of_rows(rows).threshold(batch_size, **options)
        assert moments.sufficient_limit(batch_size, **options) <= exact * slack
        assert exact <= moments.identity_limit(batch_size, **options) * slack
        assert moments.identity_limit(batch_size, **options) <= moments.trace_limit(batch_size, **options) * slack
        assert exact <= moments.gradient_descent(momentum=momentum) * slack


def test_where_all_bounds_meet():
    """Orthogonal gradients of equal norm without replacement; gradient descent, with momentum too."""
    rows = 1.3 * torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q[:, None]
    moments = moments_of(rows)
    for batch_size in (1, 2, 6):
        wanted = pytest.approx(2 * batch_size / moments.trace, rel=1e-12)
        assert moments.sufficient_limit(batch_size, replacement=False) == wanted
        assert moments.identity_limit(batch_size, replacement=False) == wanted
        assert moments.trace_limit(batch_size, replacement=False) == wanted
    edge = moments.gradient_descent(momentum=0.9)
    assert edge == pytest.approx(2 * 1.9 / moments.largest_eigenvalue)
    assert moments.sufficient_limit(6, replacement=False, momentum=0.9) == pytest.approx(edge)


def test_the_papers_bound_holds_for_one_output_and_not_for_two():
    """One sample whose two outputs have orthogonal gradients: stable up to 2 / (tr G / 2), twice what 2 / tr G says."""
    rows = torch.eye(2, dtype=torch.float64)[None]
    moments, exact = moments_of(rows), SecondMoment.of_rows(rows).threshold(1)
    assert exact == pytest.approx(2.0)
    assert 2 / moments.trace == pytest.approx(1.0)
    assert moments.trace_limit(1) == pytest.approx(2.0)
    one = moments_of(torch.randn(7, 1, 3, dtype=torch.float64))
    assert one.trace_limit(1) == pytest.approx(2 / one.trace)


def test_no_curvature_is_no_limit():
    nothing = GradientMoments(3, 1, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert nothing.gradient_descent() == nothing.trace_limit(1) == nothing.sufficient_limit(2) == math.inf


@pytest.mark.parametrize("limit", ["trace_limit", "identity_limit", "sufficient_limit"])
def test_what_is_refused(limit):
    moments = GradientMoments(3, 1, 1.0, 1.0, 1.0, 1.0, 1.0)
    with pytest.raises(BadInput, match="between 1 and all 3 samples"):
        getattr(moments, limit)(4)
    with pytest.raises(BadInput, match="momentum"):
        getattr(moments, limit)(1, momentum=-0.1)
    with pytest.raises(BadInput, match="momentum"):
        moments.gradient_descent(momentum=1.5)
