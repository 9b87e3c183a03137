"""Diagonal linear networks: their curvature in closed form, and the recursion of all members at once."""

import pytest
import torch

from corollary.base.errors import BadInput
from corollary.dynamics.diagonal_linear import DiagonalLinearNet, balance, diagonal_curvature, train_diagonal
from corollary.dynamics.losses import half_square
from corollary.dynamics.stability import fisher_kernel, fisher_trace


def data(n=6, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, x[:, 0] - x[:, 1]


def start(members=3, d=5):
    return torch.randn(members, 2, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("depth", [2, 3])
def test_the_curvature_is_that_of_the_network(depth):
    torch.manual_seed(0)
    net = DiagonalLinearNet(5, depth).double()
    with torch.no_grad():
        net.factors[0, 2] = 0.0  # a weight that is zero is no trouble
    x, y = data()
    found = diagonal_curvature(net.factors.detach(), x)
    assert float(found.trace) == pytest.approx(fisher_trace(net, half_square, (x, y)), rel=1e-12)
    largest = torch.linalg.eigvalsh(fisher_kernel(net, half_square, (x, y)))[-1]
    assert float(found.largest_eigenvalue) == pytest.approx(float(largest), rel=1e-10)
    torch.testing.assert_close(net(x), x @ net.beta())


def test_the_trace_is_a_norm_for_uncorrelated_inputs():
    """Rows of an orthogonal frame: tr G = |a|^2 + |b|^2 >= 2 |beta|_1, and the largest eigenvalue >= 2 |beta|_inf."""
    x = 5**0.5 * torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    factors = start()
    found = diagonal_curvature(factors, x)
    beta = factors.prod(dim=1).abs()
    torch.testing.assert_close(found.trace, factors.square().sum(dim=(1, 2)))
    torch.testing.assert_close(found.largest_eigenvalue, factors.square().sum(dim=1).amax(dim=1))
    assert bool((found.trace >= 2 * beta.sum(dim=1)).all())
    assert bool((found.largest_eigenvalue >= 2 * beta.amax(dim=1)).all())


def test_balance():
    a = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert float(balance(torch.stack([a, -a]))) == pytest.approx(1)
    assert float(balance(torch.stack([a, a.abs(), -a]))) == pytest.approx(1)
    # b = (r + root(r^2 - 1)) a has imbalance r.
    assert float(balance(torch.stack([a, (8 + 63**0.5) * a]))) == pytest.approx(8)
    net = DiagonalLinearNet(3)
    assert net.balance() == pytest.approx(float(balance(net.factors.detach())))
    assert net.balance() >= 1


@pytest.mark.parametrize("clip", [None, 0.5])
def test_gradient_descent_is_that_of_autograd(clip):
    x, y = data()
    rates = torch.tensor([0.01, 0.05, 0.02], dtype=torch.float64)
    found = train_diagonal(start(), x, y, rates, steps=5, gradient_clip=clip)
    for member in range(3):
        factors = start()[member].clone().requires_grad_()
        for _ in range(5):
            (gradient,) = torch.autograd.grad(half_square(x @ factors.prod(dim=0), y), factors)
            if clip is not None:
                gradient = gradient * min(1.0, clip / float(gradient.norm()))
            factors = (factors - rates[member] * gradient).detach().requires_grad_()
        torch.testing.assert_close(found.factors[member], factors.detach())
        wanted = half_square(x @ factors.detach().prod(dim=0), y)
        assert float(found.train_loss[member]) == pytest.approx(float(wanted), rel=1e-12)


def test_full_batches_drawn_from_one_sample_are_gradient_descent():
    x, y = data(n=1)
    rates = torch.full((3,), 0.01)
    by_sgd = train_diagonal(start(), x, y, rates, steps=7, batch_size=2)
    torch.testing.assert_close(by_sgd.factors, train_diagonal(start(), x, y, rates, steps=7).factors)


def test_the_same_seed_gives_the_same_run_and_another_one_another():
    x, y = data()
    rates = torch.full((3,), 0.02)
    runs = [train_diagonal(start(), x, y, rates, steps=50, batch_size=1, seed=seed).factors for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_sgd_balances_the_layers_by_the_exact_identity_and_small_steps_do_not():
    x, y = data(n=4, d=8)
    a = start(2, 8)[:, 0]
    factors = torch.stack([a, 5 * a], dim=1)
    run = train_diagonal(factors, x, y, torch.tensor([0.01, 1e-6]), steps=2000, batch_size=1)
    assert float(run.identity_error.max()) < 1e-14
    difference = (run.factors[:, 0].square() - run.factors[:, 1].square()).abs()
    before = (factors[:, 0].square() - factors[:, 1].square()).abs()
    assert bool((difference <= before * (1 + 1e-12)).all())  # never grows, coordinate by coordinate
    lost = 1 - difference.sum(dim=1) / before.sum(dim=1)
    assert float(lost[0]) > 0.01
    assert float(lost[1]) < 1e-5  # the flow keeps it: what is lost is of second order in the rate


def test_a_run_that_diverges_is_its_own_outcome():
    x, y = data()
    run = train_diagonal(3 * start(2), x, y, torch.tensor([1e-3, 5.0]), steps=200, batch_size=1)
    assert bool(torch.isfinite(run.train_loss[0]))
    assert not bool(torch.isfinite(run.train_loss[1]))


def test_the_test_error():
    x, y = data()
    run = train_diagonal(start(), x, y, torch.full((3,), 0.01), steps=1)
    torch.testing.assert_close(run.test_error(x, y), 2 * run.train_loss)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DiagonalLinearNet(0), "d=0"),
        (lambda: DiagonalLinearNet(3, 1), "depth=1"),
        (lambda: train_diagonal(start(), *data(), torch.ones(3), steps=0), "steps=0"),
        (lambda: train_diagonal(start(), *data(), torch.ones(3), steps=1, batch_size=0), "batch_size=0"),
        (lambda: train_diagonal(start(), data()[0] * torch.nan, data()[1], torch.ones(3), steps=1), "the inputs x"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(BadInput, match=message):
        call()
