"""The largest slope found, and the largest of all patterns."""

import itertools

import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.verify.lipschitz import Equilibrium, lipschitz_enumerate, lipschitz_lower
from corollary.verify.sorting import GroupSort, Householder, MaxMin


def dense(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(*layers).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net


def norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.detach(), 2))


def test_relu_patterns_by_brute_force():
    net = dense(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    masks = (torch.diag(torch.tensor(mask).double()) for mask in itertools.product((0, 1), repeat=4))
    expected = max(norm(net[2].weight @ mask @ net[0].weight) for mask in masks)
    assert lipschitz_enumerate(net) == pytest.approx(expected, rel=1e-12)


def test_sort_patterns_by_brute_force():
    net = dense(nn.Linear(3, 3), GroupSort(3), nn.Linear(3, 2))
    orders = (torch.eye(3).double()[list(order)] for order in itertools.permutations(range(3)))
    expected = max(norm(net[2].weight @ order @ net[0].weight) for order in orders)
    assert lipschitz_enumerate(net) == pytest.approx(expected, rel=1e-12)


def test_reflection_patterns_by_brute_force_in_two_layers():
    net = dense(nn.Linear(2, 3), Householder(torch.ones(3)), nn.Linear(3, 2), MaxMin(), nn.Linear(2, 2))
    v = net[1].unit().detach()
    reflections = (torch.eye(3).double(), torch.eye(3).double() - 2 * torch.outer(v, v))
    swaps = (torch.eye(2).double(), torch.eye(2).double().flip(0))
    expected = max(
        norm(net[4].weight @ swap @ net[2].weight @ reflection @ net[0].weight)
        for swap in swaps
        for reflection in reflections
    )
    assert lipschitz_enumerate(net) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("activation", [MaxMin(), nn.ReLU()], ids=str)
def test_the_largest_pattern_is_found_by_sampling_where_it_is_reached(activation):
    net = dense(nn.Linear(6, 6), activation, nn.Linear(6, 3))  # six independent inputs reach all patterns
    assert lipschitz_lower(net, samples=4000) == pytest.approx(lipschitz_enumerate(net), rel=1e-9)


def test_slopes_of_a_linear_network_are_its_norms():
    net = dense(nn.Linear(5, 3))
    assert lipschitz_lower(net, samples=10) == pytest.approx(norm(net[0].weight), rel=1e-12)
    rows = net[0].weight.detach().abs().sum(1)
    assert lipschitz_lower(net, "linf", samples=10) == pytest.approx(float(rows.max()), rel=1e-12)
    assert lipschitz_lower(net, "linf", samples=10, output=1) == pytest.approx(float(rows[1]), rel=1e-12)


def test_refining_finds_a_narrow_slope():
    # A sigmoid of a large weight is steep near one point only: random inputs miss most of it.
    net = nn.Sequential(nn.Linear(1, 1), nn.Sigmoid()).double()
    net[0].weight.data.fill_(300.0)
    net[0].bias.data.fill_(-200.0)
    rough, fine = (lipschitz_lower(net, samples=300, refine=refine) for refine in (False, True))
    assert rough < fine
    assert fine == pytest.approx(75, rel=1e-3)


def test_the_network_is_left_as_it_was():
    net = dense(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    lipschitz_lower(net, samples=20)
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize(
    ("net", "text"),
    [
        (dense(nn.Linear(2, 26), MaxMin(), nn.Linear(26, 1)), "13 groups"),
        (dense(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)), "no finite list"),
        (Equilibrium(torch.zeros(2, 2), torch.ones(2, 1), torch.zeros(2), nn.ReLU()), "linear pieces|groups"),
    ],
)
def test_what_has_too_many_patterns_or_none_is_refused(net, text):
    if isinstance(net, Equilibrium):
        net = Equilibrium(torch.full((2, 2), 0.1), torch.ones(2, 1), torch.zeros(2), nn.ReLU())
    with pytest.raises(BadInput, match=text):
        lipschitz_enumerate(net)
