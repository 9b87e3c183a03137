"""Gaps and critical perturbations against exact distributions and exact linear networks."""

import math
import sys

import pytest
import torch
from scipy.stats import kstest
from torch import nn
from torch.func import jacrev, vmap

from corollary.base.errors import BadInput
from corollary.verify.classifier import predictions
from corollary.verify.logit_gaps import (
    critical_epsilon,
    gap_exponents,
    logit_gaps,
    sorted_gaps,
    tie_fraction,
    uniform_gap_distribution,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(classes: int = 5) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, classes).double()


X = torch.randn(300, 8, generator=generator(1), dtype=torch.float64)


def test_gaps_are_of_the_sorted_logits():
    logits = torch.tensor([[3.0, 10.0, 1.0, 7.0], [0.0, -1.0, -1.0, -5.0]])
    assert sorted_gaps(logits, (2, 3, 4)).tolist() == [[3, 7, 9], [1, 1, 5]]
    assert sorted_gaps(logits, (4, 2)).tolist() == [[9, 3], [5, 1]]
    net = linear()
    exact = net(X).detach().sort(dim=1, descending=True).values
    assert torch.allclose(logit_gaps(net, X, (2, 5), batch=7), exact[:, :1] - exact[:, [1, 4]])


@pytest.mark.parametrize("j", [2, 3, 4])
def test_uniform_logits_have_the_beta_law(j):
    n = 200_000
    gaps = sorted_gaps(torch.rand(n, 10, generator=generator(), dtype=torch.float64), (j,))[:, 0].numpy()
    exact = uniform_gap_distribution(10, j)
    assert exact.mean() == pytest.approx((j - 1) / 11)
    # Kolmogorov's distribution: a distance above 2 / sqrt(n) has a probability of 7e-4; another j is off by 0.3.
    assert kstest(gaps, exact.cdf).statistic < 2 / math.sqrt(n)
    assert kstest(gaps, uniform_gap_distribution(10, j + 1).cdf).statistic > 0.1


def test_the_density_at_zero_of_gap_2_is_that_of_the_formula():
    # K (K - 1) times the integral of p^2 F^(K-2): for logits uniform on [0, 1] that is K.
    assert uniform_gap_distribution(10, 2).pdf(0) == pytest.approx(10)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0, 3.0])
def test_known_exponents_are_found(exponent):
    u = (torch.arange(1, 10_001, dtype=torch.float64)) / 10_000
    assert gap_exponents(u[:, None] ** (1 / exponent))[0] == pytest.approx(exponent, rel=1e-9)


def test_ties_have_exponent_zero_and_are_counted():
    u = torch.rand(5000, 1, generator=generator(), dtype=torch.float64)
    tied = torch.where(u < 0.1, 0.0, u)
    assert gap_exponents(torch.cat([u, tied], 1))[1] == 0
    assert gap_exponents(torch.cat([u, tied], 1))[0] == pytest.approx(1, abs=0.2)
    assert tie_fraction(tied)[0] == pytest.approx(0.1, abs=0.015)
    assert tie_fraction(sorted_gaps(torch.tensor([[1.0, 1.0], [2.0, 1.0]]), (2,))).tolist() == [0.5]


@pytest.mark.parametrize(("norm", "order"), [("linf", 1), ("l2", 2), (math.inf, 1), (2, 2)])
def test_exact_for_a_linear_network(norm, order):
    net = linear()
    w = net.weight.detach()
    critical = critical_epsilon(net, X, norm, batch=64)
    c = predictions(net, X)
    h = net(X).detach()
    slow = torch.stack(
        [
            torch.stack([(h[i, c[i]] - h[i, j]) / (w[c[i]] - w[j]).norm(p=order) for j in range(5) if j != c[i]]).min()
            for i in range(len(X))
        ]
    )
    assert torch.allclose(critical, slow, rtol=1e-12)


def test_a_linear_answer_changes_just_beyond_and_not_before():
    net = linear()
    w, c = net.weight.detach(), predictions(net, X)
    critical = critical_epsilon(net, X)
    for factor, changes in ((1 - 1e-6, False), (1 + 1e-6, True)):
        corners = torch.stack([X + factor * critical[:, None] * (w[j] - w[c]).sign() for j in range(5)])
        flipped = torch.stack([predictions(net, corner) != c for corner in corners]).any(0)
        assert (flipped == changes).all()


def test_against_jacobians_on_a_curved_network(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 6)).double()
    jacobian = vmap(jacrev(net))(X)
    h, c = net(X).detach(), predictions(net, X)
    rows = torch.arange(len(X))
    slopes = (jacobian[rows, c][:, None] - jacobian).norm(p=1, dim=2)
    ratio = (h[rows, c][:, None] - h) / slopes
    ratio[rows, c] = math.inf
    assert torch.allclose(critical_epsilon(net, X), ratio.amin(1).detach())
    module = sys.modules["corollary.verify.logit_gaps"]  # the room's name is the function
    monkeypatch.setattr(module, "GRADIENT_ENTRIES", 1)  # a class at a time
    assert torch.allclose(critical_epsilon(net, X), ratio.amin(1).detach())


def test_a_backward_pass_that_cannot_be_vectorised():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            assert math.isfinite(float(gradient.sum()))  # reads a number, which vmap cannot give
            return 2 * gradient

    net = linear()
    assert torch.allclose(critical_epsilon(lambda x: Double.apply(net(x)), X), critical_epsilon(net, X))


def test_labels_dead_networks_and_scale():
    net = linear()
    c = predictions(net, X)
    wrong = critical_epsilon(net, X, labels=(c + 1) % 5)
    assert (wrong == 0).all()
    assert torch.equal(critical_epsilon(net, X, labels=c), critical_epsilon(net, X))
    assert critical_epsilon(lambda x: net(x) * 0 + torch.arange(5), X).isinf().all()
    assert critical_epsilon(lambda x: torch.arange(5.0).expand(len(x), 5), X).isinf().all()
    assert torch.allclose(critical_epsilon(lambda x: 100 * net(x), X), critical_epsilon(net, X))
    assert torch.allclose(critical_epsilon(lambda x: net(x / 10), 10 * X), 10 * critical_epsilon(net, X))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: sorted_gaps(torch.zeros(3, 1), (2,)), "two classes or more"),
        (lambda: sorted_gaps(torch.full((3, 3), math.nan), (2,)), "9 NaN"),
        (lambda: sorted_gaps(torch.zeros(3, 3), (1, 2)), r"j = 2..3 for 3 classes, got \(1, 2\)"),
        (lambda: sorted_gaps(torch.zeros(3, 3), (4,)), "j = 2..3"),
        (lambda: gap_exponents(torch.rand(1797, 1)), "fewer than 10 lie below the quantile 0.005"),
        (lambda: gap_exponents(torch.rand(5000, 1) - 0.5), "negative numbers"),
        (lambda: gap_exponents(torch.full((5000, 1), math.inf)), "is infinite"),
        (lambda: gap_exponents(torch.rand(5000, 1), (0.1,)), "two quantiles or more"),
        (lambda: uniform_gap_distribution(10, 1), "got j = 1 and K = 10"),
        (lambda: critical_epsilon(linear(), X, norm=3), "infinity"),
        (lambda: critical_epsilon(lambda x: x[:, :1], X), "two classes or more"),
    ],
)
def test_misuse_is_explained(call, text):
    with pytest.raises(BadInput, match=text):
        call()
