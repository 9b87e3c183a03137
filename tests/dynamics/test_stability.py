"""The report on a network against dense matrices, and the traps of its reading."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from corollary.base.errors import BadInput
from corollary.dynamics.losses import half_square
from corollary.dynamics.mean_square import mean_square_threshold
from corollary.dynamics.stability import fisher_kernel, fisher_trace, stability_report
from corollary.linalg import ggn, hessian


def squares(n=7, outputs=1, dtype=torch.float64):
    """A network and data that it fits exactly, so that the Hessian is G."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).to(dtype)
    x = torch.randn(n, 4, dtype=dtype)
    return net, (x, net(x).detach())


def classes(n=40):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    return net, (2 * torch.randn(n, 5, dtype=torch.float64), torch.randint(3, (n,)))


@pytest.mark.parametrize(("n", "outputs"), [(7, 1), (5, 3), (60, 2)])
def test_the_numbers_are_those_of_the_hessian(n, outputs):
    net, data = squares(n, outputs)
    report = stability_report(net, half_square, data, 0.1, 2)
    H = hessian(net, half_square, data).to_dense()
    eigenvalues = torch.linalg.eigvalsh(H)
    assert report.exact
    assert report.interpolating
    assert report.notes == ()
    assert report.train_loss == pytest.approx(0, abs=1e-20)
    assert report.trace == pytest.approx(float(H.trace()), rel=1e-9)
    assert report.largest_eigenvalue == pytest.approx(float(eigenvalues[-1]), rel=1e-9)
    assert report.frobenius == pytest.approx(float(H.norm()), rel=1e-9)
    assert report.gradient_descent_limit == pytest.approx(2 / float(eigenvalues[-1]), rel=1e-9)
    assert fisher_trace(net, half_square, data) == pytest.approx(float(H.trace()), rel=1e-12)
    kernel = torch.linalg.eigvalsh(fisher_kernel(net, half_square, data))
    rank = min(len(kernel), len(H))
    torch.testing.assert_close(kernel[-rank:], eigenvalues[-rank:], rtol=1e-9, atol=1e-12)
    params = dict(net.named_parameters())
    rows = torch.stack([_flat_gradient(net(data[0])[i, c], params) for i in range(n) for c in range(outputs)])
    wanted = mean_square_threshold(rows.unflatten(0, (n, outputs)), 2)
    assert report.mean_square_limit == pytest.approx(wanted, rel=1e-8)


def _flat_gradient(value, params):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(params.values()))])


def test_cross_entropy_goes_by_the_gauss_newton_matrix_and_says_so():
    net, data = classes()
    report = stability_report(net, cross_entropy, data, 0.1, 4, exact=True)
    G = ggn(net, cross_entropy, data).to_dense()
    assert report.moments.directions == 2  # the Hessian in three logits has rank two
    assert report.trace == pytest.approx(float(G.trace()), rel=1e-9)
    assert report.largest_eigenvalue == pytest.approx(float(torch.linalg.eigvalsh(G)[-1]), rel=1e-9)
    assert not report.interpolating
    assert any("Gauss-Newton" in note and "infinity" in note for note in report.notes)
    assert any("do not interpolate" in note for note in report.notes)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_bounds_from_leading_directions_hold_and_are_close(momentum, monkeypatch):
    monkeypatch.setattr("corollary.dynamics.stability.LEADING", 12)
    net, data = classes(60)
    exact, bounded = (
        stability_report(net, cross_entropy, data, None, 4, momentum=momentum, exact=exact) for exact in (True, False)
    )
    assert bounded.trace == pytest.approx(exact.trace, rel=1e-9)
    assert bounded.largest_eigenvalue == pytest.approx(exact.largest_eigenvalue, rel=1e-3)
    assert bounded.largest_eigenvalue <= exact.largest_eigenvalue * (1 + 1e-9)
    assert bounded.frobenius <= exact.frobenius
    for size in (1, 4, 60):
        lower, upper = bounded.limits(size)
        assert lower <= exact.limits(size).mean_square * (1 + 1e-9) <= upper * (1 + 2e-9)
        assert upper <= 1.25 * exact.limits(size).mean_square  # from 12 of 75, in a spectrum that falls off slowly
    assert any("upper bound, from 12 leading directions" in note for note in bounded.notes)


def test_few_directions_are_kept_by_themselves():
    net, data = squares(400)
    assert stability_report(net, half_square, data, 0.1, 2).exact  # few parameters
    wide = nn.Sequential(nn.Linear(4, 100), nn.Tanh(), nn.Linear(100, 1)).double()
    assert not stability_report(wide, half_square, data, 0.1, 2).exact
    assert stability_report(wide, half_square, (data[0][:200], data[1][:200]), 0.1, 2).exact


def test_stable_below_the_threshold_and_not_above():
    net, data = squares()
    limit = stability_report(net, half_square, data, None, 1).mean_square_limit
    assert stability_report(net, half_square, data, 0.99 * limit, 1).stable is True
    assert stability_report(net, half_square, data, limit, 1).stable is True
    assert stability_report(net, half_square, data, 1.01 * limit, 1).stable is False
    assert stability_report(net, half_square, data, None, 1).stable is None
    # A trace that the rate allows is not taken for stability.
    report = stability_report(net, half_square, data, 1.05 * limit, 1)
    assert report.learning_rate is not None
    assert report.learning_rate < report.trace_limit
    assert report.stable is False


def test_between_the_bounds_nothing_is_claimed():
    net, data = classes(60)
    lower, upper = stability_report(net, cross_entropy, data, None, 4, exact=False).limits(4)
    assert lower < upper
    verdicts = [
        stability_report(net, cross_entropy, data, rate, 4, exact=False).stable
        for rate in (0.99 * lower, (lower + upper) / 2, 1.01 * upper)
    ]
    assert verdicts == [True, None, False]


def test_the_threshold_scales_against_the_loss():
    """The mean of squares, without the half, has twice the curvature; of C outputs PyTorch's divides by C."""
    net, data = squares(6, 3)
    half = stability_report(net, half_square, data, None, 2)
    whole = stability_report(net, mse_loss, data, None, 2)
    assert whole.trace == pytest.approx(half.trace * 2 / 3, rel=1e-9)
    assert whole.mean_square_limit == pytest.approx(half.mean_square_limit * 3 / 2, rel=1e-9)


def test_a_parameter_without_gradient_changes_nothing():
    net, data = squares()
    padded = nn.Sequential(*net, nn.Identity())
    padded.register_parameter("idle", nn.Parameter(torch.ones(5, dtype=torch.float64)))
    plain, more = (stability_report(each, half_square, data, None, 2) for each in (net, padded))
    assert more.parameters == plain.parameters + 5
    assert more.mean_square_limit == pytest.approx(plain.mean_square_limit, rel=1e-12)


def test_full_batches_without_replacement_and_momentum():
    net, data = squares(9)
    report = stability_report(net, half_square, data, None, 9, replacement=False, momentum=0.9)
    assert report.mean_square_limit == pytest.approx(report.gradient_descent_limit, rel=1e-9)
    assert report.gradient_descent_limit == pytest.approx(2 * 1.9 / report.largest_eigenvalue)


def test_the_alignment_of_a_linear_model():
    """For f = w x in one dimension, tr(Sigma G) / (2 L |G|^2) = mean(e^2 x^2) / (mean(e^2) mean(x^2))."""
    x = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    y = torch.tensor([[0.5], [3.0], [1.0]], dtype=torch.float64)
    net = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        net.weight.fill_(0.7)
    e2, x2 = (0.7 * x - y).square(), x.square()
    wanted = float((e2 * x2).mean() / (e2.mean() * x2.mean()))
    report = stability_report(net, half_square, (x, y), 0.1, 1)
    assert report.alignment == pytest.approx(wanted, rel=1e-12)
    assert math.isnan(stability_report(*(net, half_square, (x, 0.7 * x), 0.1, 1)).alignment)


def test_single_precision_and_a_stream():
    net, data = squares(8, 2)
    plain = stability_report(net, half_square, data, 0.1, 2)
    stream = [(data[0][:3], data[1][:3]), (data[0][3:], data[1][3:])]
    streamed = stability_report(net, half_square, stream, 0.1, 2, chunk=3)
    assert streamed.mean_square_limit == pytest.approx(plain.mean_square_limit, rel=1e-9)
    single, rough = squares(8, 2, torch.float32)
    with torch.no_grad():
        for p, q in zip(single.parameters(), net.parameters(), strict=True):
            p.copy_(q)
    found = stability_report(single, half_square, (data[0].float(), data[1].float()), 0.1, 2)
    assert found.mean_square_limit == pytest.approx(plain.mean_square_limit, rel=1e-4)
    assert len(rough) == 2


def test_the_figure_draws_with_and_without_a_rate():
    net, data = squares()
    for rate in (0.1, None):
        figure = stability_report(net, half_square, data, rate, 2).figure()
        assert figure.svg().startswith("<svg")
        assert figure.data["batch_size"] == [1, 2, 4, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 8}, "between 1 and all 7 samples, got batch_size=8"),
        ({"learning_rate": 0.0}, "learning rate must be above 0"),
        ({"learning_rate": math.inf}, "learning rate must be above 0 and finite"),
        ({"momentum": 1.0}, "momentum"),
        ({"chunk": 0}, "chunk=0"),
    ],
)
def test_what_is_refused(options, message):
    net, data = squares()
    with pytest.raises(BadInput, match=message):
        stability_report(net, half_square, data, **{"learning_rate": 0.1, "batch_size": 2, **options})


def test_weights_that_are_not_finite_are_refused_by_name():
    net, data = squares()
    with torch.no_grad():
        net[2].weight[0, 3] = torch.nan
    with pytest.raises(BadInput, match=r"'2\.weight' has 1 NaN"):
        stability_report(net, half_square, data, 0.1, 2)
