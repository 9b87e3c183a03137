"""Adversarial error of networks whose critical perturbations are chosen, and so whose curve is known."""

import math
from typing import Any

import pytest
import torch

from corollary.base.errors import BadInput
from corollary.verify import adversarial_curve as module
from corollary.verify.adversarial_curve import Curve, PowerLaw, adversarial_error_curve, curve_from_critical

ATTACKS = ["fgsm", "step_ll", "pgd", "margin_pgd"]
N = 4000
unchecked: Any = getattr(adversarial_error_curve, "__wrapped__", None)  # without the checks of annotations


def net(x: torch.Tensor) -> torch.Tensor:
    """Two classes apart at x = 0: the critical perturbation of x is |x|."""
    return torch.cat([x, -x], dim=1)


def points(exponent: float = 1.0) -> torch.Tensor:
    """Inputs whose distance from the boundary has the distribution t^exponent on [0, 1], on both sides of it."""
    u = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    sides = torch.where(torch.arange(N) % 2 == 0, 1.0, -1.0)
    return (sides * u ** (1 / exponent))[:, None]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_the_curve_is_the_law_that_was_put_in(attack, exponent):
    eps = torch.logspace(-2.2, -0.3, 15, dtype=torch.float64)
    x = points(exponent)[:: 1 if "pgd" not in attack else 4]
    curve = adversarial_error_curve(net, x, eps=eps, attack=attack, clip=None)
    assert torch.allclose(curve.error, eps**exponent, atol=1.01 / len(x))
    law = adversarial_error_curve(net, points(exponent), eps=eps, clip=None).fit()
    assert law.exponent == pytest.approx(exponent, abs=0.01)
    assert law.amplitude == pytest.approx(1, abs=0.03)
    assert law.r2 > 0.9999
    assert law.ci[0] < exponent < law.ci[1]
    assert law.points == int(((eps**exponent > 0.005) & (eps**exponent < 0.15)).sum())


def test_the_default_grid():
    curve = adversarial_error_curve(net, points()[::2])
    assert len(curve.eps) == 25
    assert float(curve.eps[0]) == pytest.approx(1e-4)
    assert float(curve.eps[-1]) == pytest.approx(0.3)
    assert (curve.eps[1:] / curve.eps[:-1]).std() < 1e-9


def test_clean_errors_are_no_part_of_it():
    x = points()
    y = (x[:, 0] < 0).long()
    y[: N // 2] = 1 - y[: N // 2]  # the half nearest to the boundary is labelled wrong
    eps = torch.tensor([0.1, 0.6], dtype=torch.float64)
    curve = adversarial_error_curve(net, x, y, eps, clip=None)
    assert curve.flipped.shape == (2, N // 2)
    assert curve.given == N
    assert torch.allclose(curve.error, torch.tensor([0.0, 0.2], dtype=torch.float64), atol=1e-3)


def test_the_range_is_respected():
    def shifted(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x + 0.05, -x - 0.05], dim=1)

    x = points()[::2].clone()  # in [0, 1], on one side of a boundary that lies outside of it
    eps = torch.tensor([0.01, 0.2, 0.5], dtype=torch.float64)
    assert adversarial_error_curve(shifted, x, eps=eps).error.tolist() == [0, 0, 0]
    assert adversarial_error_curve(shifted, x, eps=eps, clip=None).error[1] > 0.1


@pytest.mark.parametrize("attack", ["step_ll", "margin_pgd"])
def test_batches_and_memory_do_not_matter(attack, monkeypatch):
    torch.manual_seed(0)
    deep = torch.nn.Sequential(torch.nn.Linear(3, 9), torch.nn.Tanh(), torch.nn.Linear(9, 4)).double()
    x = torch.rand(50, 3, dtype=torch.float64)
    eps = torch.logspace(-2, 0, 6, dtype=torch.float64)
    whole = adversarial_error_curve(deep, x, eps=eps, attack=attack)
    assert float(whole.error[-1]) > 0
    monkeypatch.setattr(module, "ENTRIES_AT_ONCE", 1)
    assert torch.equal(adversarial_error_curve(deep, x, eps=eps, attack=attack, batch=7).flipped, whole.flipped)


def test_sizes_are_sorted_and_euclidean_norm_is_longer():
    def diagonal(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x.sum(1), -x.sum(1)], 1)

    x = points().expand(-1, 4)  # |sum| = 4 |x|: L-inf needs |x|, L2 needs 2 |x|
    eps = torch.tensor([0.5, 0.1], dtype=torch.float64)
    assert torch.allclose(
        adversarial_error_curve(diagonal, x, eps=eps, clip=None).error,
        torch.tensor([0.1, 0.5], dtype=torch.float64),
        atol=1e-3,
    )
    euclidean = adversarial_error_curve(diagonal, x, eps=eps, clip=None, norm="l2")
    assert torch.allclose(euclidean.error, torch.tensor([0.05, 0.25], dtype=torch.float64), atol=1e-3)


def test_linear_response_is_the_distribution_of_critical_perturbations():
    critical = torch.tensor([0.1, 0.2, 0.3, math.inf], dtype=torch.float64)
    curve = curve_from_critical(critical, torch.tensor([0.3, 0.05, 0.2], dtype=torch.float64))
    assert curve.error.tolist() == [0, 0.5, 0.75]


def test_the_interval_is_that_of_the_counts():
    # Bootstrap over n inputs: its width falls as 1 / sqrt(n), and it is the same under the same seed.
    eps = torch.logspace(-2, -0.85, 8, dtype=torch.float64)
    widths = []
    for n in (1000, 16_000):
        u = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        law = curve_from_critical(u, eps).fit()
        assert law == curve_from_critical(u, eps).fit()
        widths.append(law.ci[1] - law.ci[0])
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.35)
    # Two points: the variance of log(p1 / p2) for nested counts is (1 - p1) / (n p1) - (1 - p2) / (n p2).
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    low, high = curve_from_critical(u, eps)._interval(_ends(8), 4000, 0)
    p = (eps[[0, 7]]).numpy()
    exact = math.sqrt((1 - p[0]) / (4000 * p[0]) - (1 - p[1]) / (4000 * p[1])) / math.log(p[1] / p[0])
    assert (high - low) / (2 * 1.96) == pytest.approx(exact, rel=0.08)


def _ends(n: int):
    import numpy as np

    window = np.zeros(n, dtype=bool)
    window[[0, n - 1]] = True
    return window


def test_a_law_is_read_both_ways():
    law = PowerLaw(2.0, 3.0, 1.0, (1.9, 2.1), 9)
    assert law.error_at(0.1) == pytest.approx(0.03)
    assert law.eps_at(0.03) == pytest.approx(0.1)


def test_too_few_points_and_dead_networks_are_said():
    x = points()
    with pytest.raises(BadInput, match=r"1 of 2 points .* a fit needs 5"):
        adversarial_error_curve(net, x, eps=torch.tensor([0.1, 0.9], dtype=torch.float64), clip=None).fit()
    dead = adversarial_error_curve(lambda z: net(z) * 0, x, clip=None)
    assert not dead.error.any()
    with pytest.raises(BadInput, match="zero everywhere: the gradient vanishes"):
        dead.fit()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: unchecked(net, x, attack="cw"), "an attack is one of fgsm, step_ll"),
        (lambda x: adversarial_error_curve(net, x), "out of the range"),
        (lambda x: unchecked(net, x, torch.zeros(3, dtype=torch.long), clip=None), "but 3 labels"),
        (lambda x: adversarial_error_curve(net, x, (x[:, 0] > 0).long(), clip=None), "none of 4000 inputs"),
        (lambda x: adversarial_error_curve(lambda z: z, x, clip=None), "two classes or more"),
    ],
)
def test_misuse_is_explained(call, text):
    with pytest.raises(BadInput, match=text):
        call(points())


def test_a_curve_is_a_value():
    curve = Curve(torch.tensor([0.1]), torch.tensor([[True, False]]), "fgsm", 2)
    assert curve.error.tolist() == [0.5]
