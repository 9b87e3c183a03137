"""The mean-square threshold against the dense recursion, closed forms and limits."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.dynamics import mean_square
from corollary.dynamics.mean_square import (
    SecondMoment,
    gaussian_mean_square_threshold,
    mean_square_threshold,
    noise_share,
)

ROUNDING = 1e-11
"""Of a spectral radius found by a dense, not symmetric eigenvalue solver."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_growth(rows: Tensor, rate: float, batch_size: int, replacement: bool, momentum: float = 0.0) -> float:
    """The spectral radius of the mean, over all batches, of the Kronecker square of a step on (now, before)."""
    n, p = len(rows), rows.shape[-1]
    every = (
        itertools.product(range(n), repeat=batch_size) if replacement else itertools.combinations(range(n), batch_size)
    )
    eye, total, count = torch.eye(p, dtype=rows.dtype), 0.0, 0
    for batch in every:
        some = rows[list(batch)].reshape(-1, p)
        step = (1 + momentum) * eye - rate * some.T @ some / batch_size
        if momentum:
            step = torch.cat([torch.cat([step, -momentum * eye], 1), torch.cat([eye, torch.zeros_like(eye)], 1)])
        total, count = total + torch.kron(step, step), count + 1
    return float(torch.linalg.eigvals(total / count).abs().max())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("batch_size", "replacement"), [(1, True), (2, True), (2, False), (3, False), (6, False)])
@pytest.mark.parametrize("shape", [(6, 3), (6, 2, 4)])
def test_at_the_threshold_the_dense_recursion_neither_grows_nor_shrinks(shape, batch_size, replacement, momentum):
    rows = drawn(*shape)
    rate = mean_square_threshold(rows, batch_size, replacement=replacement, momentum=momentum)
    assert dense_growth(rows, rate, batch_size, replacement, momentum) == pytest.approx(1, abs=ROUNDING)
    below, above = (dense_growth(rows, s * rate, batch_size, replacement, momentum) for s in (0.99, 1.01))
    assert below < 1 < above


def test_the_growth_factor_is_that_of_the_dense_recursion_on_the_range():
    rows = drawn(6, 3)
    moment = SecondMoment.of_rows(rows)
    for rate in (0.05, 0.3, 1.0):
        for batch_size, replacement in ((1, True), (2, False)):
            wanted = dense_growth(rows, rate, batch_size, replacement)
            assert moment.growth(rate, batch_size, replacement=replacement) == pytest.approx(wanted, rel=ROUNDING)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8])
def test_orthogonal_gradients_of_equal_norm_meet_the_trace_bound(batch_size):
    rows = 1.7 * torch.linalg.qr(drawn(8, 8)).Q
    trace = float(rows.square().sum() / 8)
    rate = mean_square_threshold(rows, batch_size, replacement=False)
    assert rate == pytest.approx(2 * batch_size / trace, rel=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_full_batches_without_replacement_are_gradient_descent(momentum):
    rows = drawn(20, 6)
    largest = float(torch.linalg.eigvalsh(rows.T @ rows / 20)[-1])
    rate = mean_square_threshold(rows, 20, replacement=False, momentum=momentum)
    assert rate == pytest.approx(2 * (1 + momentum) / largest, rel=1e-12)
    assert mean_square_threshold(rows, 20, replacement=True, momentum=momentum) < rate  # not so with replacement


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_gaussian_gradients_have_the_closed_form(batch_size):
    """A grid whose moments up to the fourth are those of a Gaussian: 0 twice as often as plus or minus root 3."""
    points = torch.tensor([0, 0, 0, 0, math.sqrt(3), -math.sqrt(3)], dtype=torch.float64)
    eigenvalues = torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)
    rows = torch.cartesian_prod(points, points, points) * eigenvalues.sqrt()
    closed = gaussian_mean_square_threshold(eigenvalues, batch_size)
    assert mean_square_threshold(rows, batch_size) == pytest.approx(closed, rel=1e-12)


def test_the_gaussian_closed_form_in_its_limits():
    eigenvalues = torch.tensor([2.0, 1.0, 0.0])
    assert gaussian_mean_square_threshold(eigenvalues, 10**9) == pytest.approx(2 / 2.0, rel=1e-6)  # gradient descent
    # One eigenvalue: (2 - (1 + 1/B) x) B = x, so x = 2 B / (B + 2).
    for batch_size in (1, 3):
        rate = gaussian_mean_square_threshold(torch.tensor([4.0]), batch_size)
        assert 4 * rate == pytest.approx(2 * batch_size / (batch_size + 2), rel=1e-9)


def test_a_direction_without_gradient_changes_nothing():
    rows = drawn(9, 4)
    padded = torch.cat([rows, torch.zeros(9, 3, dtype=torch.float64)], dim=1)
    turned = padded @ torch.linalg.qr(drawn(7, 7)).Q
    for given in (padded, turned):
        assert SecondMoment.of_rows(given).rank == 4
        assert mean_square_threshold(given, 2) == pytest.approx(mean_square_threshold(rows, 2), rel=1e-12)
    assert mean_square_threshold(torch.zeros(3, 2), 1) == math.inf
    assert SecondMoment.of_rows(torch.zeros(3, 2)).growth(1.0, 1) == 1.0


def test_more_parameters_than_samples_and_the_gram_matrix_alone():
    for shape in ((5, 30), (5, 3, 30), (12, 2)):
        rows = drawn(*shape)
        flat = rows.reshape(-1, rows.shape[-1])
        moment = SecondMoment.of_gram(flat @ flat.T, math.prod(shape[1:-1]))
        for batch_size in (1, 3):
            assert moment.threshold(batch_size) == pytest.approx(mean_square_threshold(rows, batch_size), rel=1e-10)
        assert moment.samples == shape[0]


def test_the_table_of_fourth_moments_gives_the_same(monkeypatch: pytest.MonkeyPatch):
    rows = drawn(40, 2, 5)
    by_table = SecondMoment.of_rows(rows)
    assert by_table._fourth_moments is not None
    monkeypatch.setattr(mean_square, "PIECE", 100)  # summed in pieces
    in_pieces = SecondMoment.of_rows(rows)
    assert in_pieces.threshold(2) == pytest.approx(by_table.threshold(2), rel=1e-12)
    monkeypatch.setattr(mean_square, "TABLE_RANK", 0)
    by_rows = SecondMoment.of_rows(rows)
    assert by_rows._fourth_moments is None
    M = drawn(2, 5, 5)
    samples = by_table.rows.mT @ by_table.rows
    wanted = torch.einsum("iab,kbc,icd->kad", samples, M @ M.mT, samples) / 40
    for moment in (by_table, by_rows):
        torch.testing.assert_close(moment._mean_of_samples(M @ M.mT), wanted)


def test_projected_rows_give_an_upper_bound_that_falls_with_the_directions():
    rows = drawn(30, 10) * torch.logspace(0, -1, 10, dtype=torch.float64)
    bounds = [mean_square_threshold(rows[:, :k], 2) for k in (1, 3, 6, 10)]
    assert bounds == sorted(bounds, reverse=True)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_larger_batches_are_never_less_stable(momentum):
    """Proved by Mulayoff and Michaeli; their argument, that the square is convex, does not mind momentum."""
    moment = SecondMoment.of_rows(drawn(12, 5))
    for replacement in (True, False):
        rates = [moment.threshold(size, replacement=replacement, momentum=momentum) for size in range(1, 13)]
        assert all(b >= a * (1 - 1e-12) for a, b in itertools.pairwise(rates))


def test_the_trace_bound_is_necessary_and_not_sufficient():
    for seed in range(20):
        rows = drawn(15, 4, seed=seed)
        rate = mean_square_threshold(rows, 1)
        bound = 2 / float(rows.square().sum() / 15)
        assert rate < bound
        assert dense_growth(rows, 0.5 * (rate + bound), 1, True) > 1  # a rate that the trace allows, and that blows up


def test_scaling_the_loss_scales_the_threshold_back():
    rows = drawn(8, 3)
    assert mean_square_threshold(math.sqrt(2.0) * rows, 2) == pytest.approx(mean_square_threshold(rows, 2) / 2)


def test_single_precision_is_good_to_its_digits():
    rows = drawn(50, 8)
    assert mean_square_threshold(rows.float(), 4) == pytest.approx(mean_square_threshold(rows, 4), rel=1e-5)


def test_the_share_of_noise():
    assert noise_share(10, 1, replacement=True) == noise_share(10, 1, replacement=False) == 1
    assert noise_share(10, 10, replacement=False) == 0
    assert noise_share(10, 4, replacement=False) == pytest.approx((10 - 4) / (4 * 9))
    assert noise_share(1, 1, replacement=False) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_square_threshold(drawn(4, 2), 0), "between 1 and all 4 samples, got batch_size=0"),
        (lambda: mean_square_threshold(drawn(4, 2), 5), "between 1 and all 4 samples, got batch_size=5"),
        (lambda: mean_square_threshold(drawn(4, 2), 1, momentum=1.0), r"momentum lies in \[0, 1\), got 1.0"),
        (lambda: mean_square_threshold(drawn(4, 2) * math.nan, 1), "NaN or infinite"),
        (lambda: mean_square_threshold(torch.zeros(0, 2), 1), "at least one sample"),
        (lambda: SecondMoment.of_gram(torch.eye(5), 2), "5 rows cannot be 2 for each sample"),
        (lambda: gaussian_mean_square_threshold(torch.ones(2), 0), "at least 1 sample"),
        (lambda: gaussian_mean_square_threshold(torch.zeros(2), 1), "not all 0"),
        (lambda: gaussian_mean_square_threshold(torch.tensor([1.0, -1.0]), 1), "none below 0"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(BadInput, match=message):
        call()
