"""Rows whose second moment is the Gauss-Newton matrix."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot
from torch.testing import assert_close

from corollary.base.errors import BadInput
from corollary.dynamics import curvature_rows
from corollary.dynamics.curvature_rows import CurvatureRows
from corollary.dynamics.losses import half_square
from corollary.linalg import ggn


def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = torch.randn(11, 5, dtype=torch.float64), torch.randint(3, (11,))
    return net, x, y


@pytest.mark.parametrize(
    ("loss", "directions", "quadratic"), [(cross_entropy, 2, False), (half_square, 3, True), (mse_loss, 3, True)]
)
def test_their_second_moment_is_the_gauss_newton_matrix(loss, directions, quadratic, monkeypatch):
    net, x, y = problem()
    targets = y if loss is cross_entropy else one_hot(y, 3).double()
    dense = ggn(net, loss, (x, targets)).to_dense()
    stream = [(x[:4], targets[:4]), (x[4:], targets[4:])]
    for data, chunk in (((x, targets), 256), ((x, targets), 4), (stream, 5)):
        rows = CurvatureRows.of(net, loss, data, chunk=chunk)
        assert (rows.samples, rows.directions, rows.parameters) == (11, directions, len(dense))
        assert rows.quadratic is quadratic
        assert rows.train_loss == pytest.approx(float(loss(net(x).detach(), targets)), rel=1e-12)
        blocks = torch.cat(list(rows))
        flat = blocks.flatten(0, 1)
        assert_close(flat.T @ flat / 11, dense)
        assert_close(rows.gram(), flat @ flat.T)
        assert_close(rows.square_norms(), blocks.square().sum(dim=(1, 2)))
    # Blocks too small for a sample's rows: they are put together again.
    monkeypatch.setattr(curvature_rows, "BLOCK_BYTES", 8 * len(dense))
    assert_close(torch.cat(list(CurvatureRows.of(net, loss, (x, targets), chunk=1))), blocks)


def test_the_residuals_of_squares_are_residuals():
    net, x, y = problem()
    targets = one_hot(y, 3).double()
    rows = CurvatureRows.of(net, half_square, (x, targets), chunk=4)
    residual = net(x).detach() - targets
    found = rows.residuals(half_square)
    assert_close((rows.roots @ found[..., None])[..., 0], residual)
    assert float(0.5 * found.square().sum(dim=1).mean()) == pytest.approx(rows.train_loss, rel=1e-12)
    # For cross-entropy they give the gradient all the same.
    rows = CurvatureRows.of(net, cross_entropy, (x, y), chunk=4)
    slope = net(x).detach().softmax(dim=1) - one_hot(y, 3)
    assert_close((rows.roots @ rows.residuals(cross_entropy)[..., None])[..., 0], slope)


def test_a_function_with_parameters_and_one_output():
    _, x, _ = problem()
    weights = torch.randn(5, dtype=torch.float64)
    rows = CurvatureRows.of(lambda params, x: x @ params["w"], half_square, (x, x[:, 0]), params={"w": weights})
    assert_close(torch.cat(list(rows))[:, 0].abs(), x.abs())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda outputs, targets: outputs.mean(), "no curvature in the outputs"),
        (lambda outputs, targets: -(outputs - targets).square().sum(1).mean(), "not convex"),
        (lambda outputs, targets: (outputs - targets).square().sum(), "mean over samples"),
    ],
)
def test_losses_that_are_refused(loss, message):
    net, x, y = problem()
    with pytest.raises(BadInput, match=message):
        CurvatureRows.of(net, loss, (x, one_hot(y, 3).double()))


def test_networks_that_are_refused():
    net, x, y = problem()
    with torch.no_grad():
        net[0].bias[1] = torch.inf
    with pytest.raises(BadInput, match=r"the parameter '0\.bias' has 1 NaN or infinite"):
        CurvatureRows.of(net, cross_entropy, (x, y))
    normalised = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double()
    with pytest.raises(BadInput, match=r"'1' \(BatchNorm1d\) is in training mode"):
        CurvatureRows.of(normalised, cross_entropy, (x, y))
    with pytest.raises(BadInput, match="chunk=0"):
        CurvatureRows.of(normalised.eval(), cross_entropy, (x, y), chunk=0)
