"""The floor under per-sample gradients: Jensen's inequality, equality where all agree, PyTorch's decay."""

import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.dynamics.noise_floor import sgd_noise_floor
from corollary.dynamics.square_loss_training import square


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 3, generator=generator).double(), torch.randn(12, 2, generator=generator).double()


def ridge(data, decay: float) -> nn.Linear:
    """The exact minimiser of the mean squared distance plus half the decay times the squared weights."""
    x, y = data
    gram = 2 * x.T @ x / len(x) + decay * torch.eye(3).double()
    net = nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.linalg.solve(gram, 2 * x.T @ y / len(x)).T)
    return net


def test_the_floor_holds_at_the_minimum_and_the_residual_is_zero(data):
    net = ridge(data, 0.1)
    found = sgd_noise_floor(net, square, data, 0.1)
    assert found.residual == pytest.approx(0, abs=1e-13)
    assert found.floor == pytest.approx(0.01 * float(net.weight.detach().square().sum()), rel=1e-12)
    assert found.second_moment > found.floor > 0
    assert found.second_moment == pytest.approx(found.variance + found.floor, rel=1e-12)


def test_values_are_those_of_gradients_one_by_one(data):
    net = nn.Linear(3, 2).double()
    squares = []
    for x, y in zip(*data, strict=True):
        gradients = torch.autograd.grad(square(net(x[None]), y[None]), list(net.parameters()))
        squares.append(sum(float(g.square().sum()) for g in gradients))
    assert sgd_noise_floor(net, square, data, 0.0).second_moment == pytest.approx(sum(squares) / 12, rel=1e-12)


def test_equal_samples_reach_the_floor(data):
    same = (data[0][:1].expand(5, -1), data[1][:1].expand(5, -1))
    found = sgd_noise_floor(ridge(same, 0.2), square, same, 0.2)
    assert found.second_moment == pytest.approx(found.floor, rel=1e-10)
    assert found.variance == pytest.approx(0, abs=1e-14)


def test_decay_is_that_of_pytorch(data):
    """The trap of a factor 2: a step of SGD with this decay from the minimum goes nowhere."""
    net = ridge(data, 0.1)
    before = net.weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, weight_decay=0.1)
    square(net(data[0]), data[1]).backward()
    optimizer.step()
    torch.testing.assert_close(net.weight.detach(), before, rtol=1e-12, atol=1e-13)


def test_away_from_the_minimum_the_residual_says_so(data):
    assert sgd_noise_floor(nn.Linear(3, 2).double(), square, data, 0.1).residual > 0.1


def test_negative_decay_is_refused(data):
    with pytest.raises(BadInput, match="at least 0"):
        sgd_noise_floor(nn.Linear(3, 2).double(), square, data, -0.1)
