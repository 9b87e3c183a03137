"""Branch and bound: properties whose truth is known, proved or refuted, by every rule."""

import time
from typing import Literal

import pytest
import torch
from torch import nn

from cases import mlp
from corollary.studies.verify.genbab_measures import rooted
from corollary.verify.branch_and_bound import Branching, split_neurons
from corollary.verify.branching import Neurons, Rule, middle_points, table_points
from corollary.verify.input_splitting import split_inputs
from corollary.verify.prepared import prepare
from corollary.verify.queries import Queries
from corollary.verify.search import Margin
from corollary.verify.sets import Box
from corollary.verify.specification import Specification
from corollary.verify.sweep import sweep

RULES: tuple[Rule, ...] = ("bbps", "babsr", "gap", "mixed", "random")


class Zero(nn.Module):
    """Four separate neurons whose sum is zero everywhere."""

    def forward(self, x):
        return torch.relu(x) + torch.relu(-x) - torch.relu(1.0 * x + 1e-300) - torch.relu(-x - 1e-300)


def search(net, box: Box, lower: float, rule: Rule = "bbps", **options):
    network = prepare(net, box.lower.expand(2, -1))
    specification = Specification.output_bounds(box, lower=torch.tensor([lower], dtype=torch.float64))
    with torch.no_grad():
        query, root = rooted(network, specification, 0)
        if not bool(query.open.any()):
            return None
        return split_neurons(
            network, query, root, Margin.for_dtype(network.dtype), deadline=time.monotonic() + 20,
            branching=Branching(rule=rule, **options), generator=torch.Generator().manual_seed(0),
        )  # fmt: skip


def grid_minimum(net, box: Box, steps: int = 201) -> float:
    axes = [torch.linspace(float(a), float(b), steps).double() for a, b in zip(box.lower[0], box.upper[0], strict=True)]
    with torch.no_grad():
        return float(net(torch.cartesian_prod(*axes).reshape(-1, len(axes))).min())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.SiLU])
@pytest.mark.parametrize("side", ["below", "above"])
def test_verdicts_on_both_sides_of_the_true_minimum(rule: Rule, activation, side: Literal["below", "above"]):
    torch.manual_seed(3)
    net = mlp(2, 10, 10, 1, activation=activation).double()
    box = Box(torch.full((1, 2), -1.5).double(), torch.full((1, 2), 1.5).double())
    least = grid_minimum(net, box)
    if side == "below":
        outcome = search(net, box, least - 0.3, rule, most=3000)
        assert outcome is None or outcome.status == "proved"
    else:
        outcome = search(net, box, least + 0.01, rule, most=400)
        assert outcome is not None
        assert outcome.status != "proved"
        if outcome.status == "found":
            assert outcome.point is not None
            assert float(net(outcome.point).detach()) <= least + 0.01


def test_inputs_split_decide_the_same():
    torch.manual_seed(3)
    net = mlp(2, 10, 10, 1, activation=nn.Tanh).double()
    box = Box(torch.full((1, 2), -1.5).double(), torch.full((1, 2), 1.5).double())
    network, least = prepare(net, box.lower.expand(2, -1)), grid_minimum(net, box)
    statuses = []
    for lower in (least - 0.02, least + 0.01):
        specification = Specification.output_bounds(box, lower=torch.tensor([lower]).double())
        queries = Queries.of(specification, network.dtype, network.device)
        with torch.no_grad():
            outcome = split_inputs(network, queries, Margin.for_dtype(network.dtype), deadline=time.monotonic() + 20)
        statuses.append(outcome.status)
    assert statuses == ["proved", "found"]


def test_cancelling_neurons_are_proved_in_few_domains():
    one = torch.ones(1, 1, dtype=torch.float64)
    with_ = search(Zero(), Box(-one, one), -1e-3, "babsr", candidates=1, most=200)
    assert with_ is not None
    assert with_.status == "proved"
    assert with_.domains <= 31


def test_cuts_lie_inside_and_respect_kinks():
    torch.manual_seed(0)
    x = torch.randn(2, 3, dtype=torch.float64)
    for activation, kinked in ((nn.ReLU, True), (nn.Tanh, False)):
        network = prepare(mlp(3, 6, 6, 1, activation=activation).double(), x)
        neurons = Neurons(network)
        lower, upper = neurons.ends(sweep(network, [Box(x - 1, x + 1)]).known)
        for rule in (middle_points, table_points):
            found = rule(neurons, lower, upper)
            assert bool(((found > lower) & (found < upper)).all())
            crossing = (lower < 0) & (upper > 0)
            assert bool(crossing.any())
            assert bool((found[crossing] == 0).all()) == kinked
