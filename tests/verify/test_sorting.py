"""Activations that sort or reflect groups: closed forms and what they keep."""

import math

import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.graph import capture, evaluate
from corollary.verify.sorting import GroupSort, Householder, MaxMin


def draws(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_maxmin_takes_neighbouring_pairs_largest_first():
    x = torch.tensor([[1.0, 3.0, 5.0, 2.0]])
    assert MaxMin()(x).tolist() == [[3.0, 1.0, 5.0, 2.0]]


def test_groupsort_sorts_channels_at_each_position():
    x = draws(2, 6, 4, 3)
    found = GroupSort(3)(x)
    expected = x.reshape(2, 2, 3, 4, 3).sort(dim=2, descending=True).values.reshape(x.shape)
    assert torch.equal(found, expected)
    assert torch.equal(GroupSort(1)(x), x)


@pytest.mark.parametrize("layer", [MaxMin(), GroupSort(4), Householder(draws(4)), Householder(draws(3, 4))], ids=str)
def test_the_jacobian_is_orthogonal(layer):
    layer = layer.double()
    x = draws(1, 12)
    jacobian = torch.autograd.functional.jacobian(lambda z: layer(z[None])[0], x[0])
    assert torch.allclose(jacobian.T @ jacobian, torch.eye(12, dtype=torch.float64), atol=1e-12)


def test_householder_of_the_pair_direction_is_maxmin():
    x = draws(5, 8)
    assert torch.allclose(Householder(8).double()(x), MaxMin()(x), atol=1e-7)  # 1/sqrt(2) is stored in float32
    v = torch.tensor([1.0, -1.0], dtype=torch.float64) / math.sqrt(2)
    assert torch.allclose(Householder(v)(x), MaxMin()(x), atol=1e-15)


def test_householder_reflects_where_it_points_away_whatever_the_length_of_v():
    v = draws(3)
    unit = v / v.norm()
    z = draws(20, 3)
    expected = torch.where((z @ unit)[:, None] > 0, z, z - 2 * (z @ unit)[:, None] * unit)
    assert torch.allclose(Householder(v)(z), expected, atol=1e-14)
    assert torch.allclose(Householder(7 * v)(z), expected, atol=1e-14)


def test_householder_has_a_direction_for_each_group_and_trains():
    layer = Householder(draws(2, 3))
    x = draws(4, 6)
    apart = torch.cat([Householder(layer.direction[i].detach())(x[:, 3 * i : 3 * i + 3]) for i in range(2)], dim=1)
    assert torch.allclose(layer(x), apart)
    layer(x).sum().backward()
    assert layer.direction.grad is not None
    # A direction's length does not count, so that its gradient is orthogonal to it.
    assert torch.allclose((layer.direction.grad * layer.direction).sum(1), torch.zeros(2).double(), atol=1e-12)


def test_they_are_captured_for_any_batch():
    net = nn.Sequential(nn.Linear(4, 6), MaxMin(), Householder(6), GroupSort(3)).double()
    graph = capture(net, draws(2, 4))
    x = draws(7, 4)
    assert torch.allclose(evaluate(graph, x), net(x))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: MaxMin()(torch.zeros(1, 5)), "MaxMin works on groups of 2 channels, and 5"),
        (lambda: GroupSort(4)(torch.zeros(1, 6)), "groups of 4 channels, and 6"),
        (lambda: GroupSort(0), "at least one channel"),
        (lambda: Householder(5), "groups of 2 channels, and 5"),
        (lambda: Householder(torch.zeros(3)), "positive length"),
        (lambda: Householder(torch.ones(2, 2, 2)), r"shape \(size,\) or \(group, size\)"),
        (lambda: Householder(torch.ones(2, 3))(torch.zeros(1, 9)), "2 directions and got 3 groups"),
    ],
)
def test_errors_say_what_does_not_fit(make, text):
    with pytest.raises(BadInput, match=text):
        make()
