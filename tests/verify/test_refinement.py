"""Inner bounds by branch and bound: attacked inside the region, never looser than before, and of use."""

import time

import pytest
import torch
from torch import nn

from cases import mlp
from corollary.graph import values
from corollary.verify.branch_and_bound import Branching
from corollary.verify.prepared import prepare
from corollary.verify.queries import Queries
from corollary.verify.refined_search import refined_search, rooted
from corollary.verify.refinement import Refinement, only_kink
from corollary.verify.search import Margin
from corollary.verify.sets import Ball, Box
from corollary.verify.slopes import Ascent, sharper
from corollary.verify.specification import Specification
from corollary.verify.sweep import sweep


class Leaky(nn.LeakyReLU):
    def __init__(self):
        super().__init__(0.2)


def network_and_region(dtype: torch.dtype, seed: int, activation=nn.ReLU, ball: bool = False, conv: bool = False):
    torch.manual_seed(seed)
    if conv:
        layers = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
        net, center = nn.Sequential(*layers).to(dtype), torch.randn(1, 1, 6, 6, dtype=dtype)
    else:
        net, center = mlp(5, 16, 16, 16, 2, activation=activation).to(dtype), torch.randn(1, 5, dtype=dtype)
    region = Ball(center, torch.tensor([0.8], dtype=dtype), 2.0) if ball else Box(center - 0.5, center + 0.5)
    return prepare(net, center.expand(2, *center.shape[1:])), region


def points_in(region, count: int):
    box = region.box() if isinstance(region, Ball) else region
    share = torch.rand(count, *region.center.shape[1:], dtype=region.center.dtype)
    share[: count // 2] = share[: count // 2].round()
    x = box.lower + share * (box.upper - box.lower)
    if isinstance(region, Ball):
        away = x - region.center
        length = torch.linalg.vector_norm(away.flatten(1), dim=1)[:, None]
        x = region.center + away * (region.radii[:, None] / length).clamp(max=1)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"activation": Leaky}, {"ball": True}, {"conv": True}], ids=["relu", "leaky", "ball", "conv"]
)
def test_refined_bounds_hold_and_are_tighter(dtype: torch.dtype, options):
    tighter = 0
    for seed in range(2):
        network, region = network_and_region(dtype, seed, **options)
        margin = Margin.for_dtype(dtype)
        with torch.no_grad():
            found = sweep(network, [region])
            before = sharper(network, [region], found, Ascent(10))
            refinement = Refinement(network, region, found.positions, margin, Ascent(10))
            known = refinement.refined(refinement.refined(before, 0.3), 0.3)
            x = points_in(region, 2000)
            inner = values(network.graph, x, list(known.bounds))
        for node in known.bounds:
            (low,), (high,) = known.flat(node)
            (old_low,), (old_high,) = before.flat(node)
            value = inner[node].flatten(1)
            slack = (1e-5 if dtype == torch.float32 else 1e-9) * (1 + value.abs().max())
            assert bool((value >= low - slack).all())
            assert bool((value <= high + slack).all())
            assert bool((low >= old_low).all())
            assert bool((high <= old_high).all())
            tighter += int((low > old_low).sum() + (high < old_high).sum())
    assert tighter > 0


def test_gradient_points_stay_within_refined_bounds():
    network, region = network_and_region(torch.float64, 1)
    with torch.no_grad():
        found = sweep(network, [region])
        known = Refinement(network, region, found.positions, Margin.for_dtype(torch.float64), Ascent(10)).refined(
            found.known, 1.0
        )
    for node in found.positions:
        (low,), (high,) = known.flat(node)
        for sign, end in ((1.0, high), (-1.0, -low)):
            x = region.center.expand(len(end), -1)
            for step in range(60):
                x = x.detach().requires_grad_()
                value = sign * values(network.graph, x, [node])[node].diagonal()
                assert bool((value <= end + 1e-9).all())
                (slope,) = torch.autograd.grad(value.sum(), x)
                x = torch.minimum(torch.maximum(x + 0.5 * 0.93**step * slope.sign(), region.lower), region.upper)


def test_a_neuron_that_linear_bounds_leave_open_is_proved_to_one_side():
    # |x| + |y| - |x + y| is never negative; the second layer holds it, a little raised.
    first, second, last = nn.Linear(2, 6, dtype=torch.float64), *(nn.Linear(a, 1, dtype=torch.float64) for a in (6, 1))
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1], [1, 1], [-1, -1]]))
        first.bias.zero_()
        second.weight.copy_(torch.tensor([[1, 1, 1, 1, -1, -1]]))
        second.bias.fill_(0.2)
    network = prepare(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last), torch.zeros(2, 2, dtype=torch.float64))
    region = Box(-torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64))
    with torch.no_grad():
        found = sweep(network, [region])
        (node,) = found.positions
        assert float(found.known.flat(node)[0]) < -0.3
        refinement = Refinement(network, region, [node], Margin.for_dtype(torch.float64), Ascent(10))
        known = refinement.refined(found.known, 5.0)
    assert float(known.flat(node)[0]) == 0.0
    assert refinement.is_spent(known)


def test_only_single_kinks_are_claimed():
    network = prepare(mlp(2, 3, 1, activation=nn.Tanh), torch.zeros(2, 2))
    assert all(only_kink(network, node) is None for node in network.bounded)
    network = prepare(mlp(2, 3, 1, activation=nn.ReLU), torch.zeros(2, 2))
    assert [only_kink(network, node) for node in network.bounded] == [0.0]


@pytest.mark.parametrize("shift", [-0.1, 0.02])
def test_turns_decide_on_both_sides_of_the_least_output(shift: float):
    network, region = network_and_region(torch.float64, 4)
    with torch.no_grad():
        least = float(values(network.graph, points_in(region, 200000), ())[network.graph.outputs[0]][:, 0].min())
        limit = torch.tensor([least + shift, -1e6], dtype=torch.float64)
        query = Queries.of(Specification.output_bounds(region, lower=limit), network.dtype, network.device)
        margin, ascent = Margin.for_dtype(torch.float64), Ascent(10)
        found = sweep(network, [region])
        query, root, _ = rooted(network, query, found, margin, ascent)
        outcome = refined_search(
            network, query, root, margin, refinable=found.positions, ascent=ascent, deadline=time.monotonic() + 20,
            branching=Branching(),
        )  # fmt: skip
    assert outcome.status == ("proved" if shift < 0 else "found")
