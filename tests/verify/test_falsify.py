"""The search for counterexamples where the answer is known: corners, balls, narrow valleys, dead neurons."""

import importlib
import math
import time

import pytest
import torch
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.verify.counterexample import Counterexample, replay
from corollary.verify.falsify import falsify
from corollary.verify.sets import Ball, Box, Region
from corollary.verify.specification import Case, Halfspaces, Specification, contains

F64 = torch.float64
module_under_test = importlib.import_module("corollary.verify.falsify")  # the room has a function of that name


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit_box(*shape: int) -> Box:
    return Box(torch.zeros(1, *shape, dtype=F64), torch.ones(1, *shape, dtype=F64))


def halfspaces(rows: list[list[float]], offset: list[float]) -> Halfspaces:
    return Halfspaces(torch.tensor(rows, dtype=F64), torch.tensor(offset, dtype=F64))


def at_most(region: Region, value: float) -> Specification:
    """Unsafe: y_0 <= value, for networks with one output."""
    return Specification((Case(region, (halfspaces([[1.0]], [value]),)),))


def valid(found: Counterexample | None, specification: Specification) -> bool:
    return found is not None and specification.violated(found.x, found.y)


@pytest.mark.parametrize("inputs", [3, 200])
def test_the_one_violating_corner_of_a_linear_network_is_found(inputs: int):
    weight = torch.randn(1, inputs, generator=seeded(), dtype=F64)
    specification = at_most(unit_box(inputs), float(weight.clamp(max=0).sum()) + 1e-6)
    found = falsify(lambda x: x @ weight.T, specification, generator=seeded(1))
    assert found is not None
    assert valid(found, specification)
    assert torch.equal(found.x[0] > 0.5, weight[0] < 0)


def test_a_property_that_holds_has_no_counterexample():
    weight = torch.randn(1, 6, generator=seeded(), dtype=F64)
    specification = at_most(unit_box(6), float(weight.clamp(max=0).sum()) - 1e-6)
    assert falsify(lambda x: x @ weight.T, specification, generator=seeded(1), restarts=7) is None


@pytest.mark.parametrize("norm", [1.0, 2.0, 3.0])
def test_in_a_ball_the_descent_reaches_the_point_of_the_dual_norm(norm: float):
    weight = torch.randn(1, 40, generator=seeded(), dtype=F64)
    ball = Ball(torch.randn(1, 40, generator=seeded(1), dtype=F64), 0.7, norm)
    least = float(weight @ ball.center[0]) - 0.7 * float(torch.linalg.vector_norm(weight, ball.dual_norm))
    specification = at_most(ball, least + 1e-3)
    found = falsify(lambda x: x @ weight.T, specification, generator=seeded(2), steps=400, restarts=3)
    assert found is not None
    assert contains(ball, found.x)
    assert valid(found, specification)
    impossible = at_most(ball, least - 1e-9)
    assert falsify(lambda x: x @ weight.T, impossible, generator=seeded(2), steps=20, restarts=2) is None


def test_points_are_projected_to_the_nearest_of_the_cross_polytope():
    change = 2 * torch.randn(50, 4, generator=seeded(), dtype=F64)
    inside = module_under_test._into_ball(change, torch.ones(50, 1, dtype=F64), 1.0)
    assert bool((inside.abs().sum(1) <= 1 + 1e-12).all())
    # The nearest point z of a convex set: no other point p of it has (change - z) . (p - z) > 0; corners suffice.
    corners = torch.cat([torch.eye(4, dtype=F64), -torch.eye(4, dtype=F64)])
    slope = torch.einsum("pi,pci->pc", change - inside, corners - inside[:, None])
    assert float(slope.max()) <= 1e-12


class Bump(nn.Module):
    """-relu(m - 0.8), m the mean of the inputs: flat wherever random points of a high-dimensional box lie."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.mean = nn.Linear(inputs, 1)
        self.relu = nn.ReLU(inplace=True)
        nn.init.constant_(self.mean.weight, 1 / inputs)
        nn.init.constant_(self.mean.bias, -0.8)

    def forward(self, x: Tensor) -> Tensor:
        return -self.relu(self.mean(x))


def test_gradients_that_leak_find_what_only_dead_neurons_open(monkeypatch: pytest.MonkeyPatch):
    specification = at_most(unit_box(400), -0.05)
    assert valid(falsify(Bump(400), specification, generator=seeded(), restarts=2), specification)
    monkeypatch.setattr(module_under_test, "LEAK", 0.0)
    assert falsify(Bump(400), specification, generator=seeded(), restarts=2, steps=20) is None


def test_leaky_gradients_leave_values_as_they_are():
    x = torch.randn(5, 3, generator=seeded())
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    with module_under_test._LeakyGradients(0.3):
        leaky = net(x)
    assert torch.equal(leaky, net(x))


def test_local_search_ends_in_a_narrow_valley_across_several_rows():
    """Unsafe only within 1e-4 of one point in three dimensions: a share of 1e-11 of the box."""
    goal = torch.tensor([0.3137, 0.7771, 0.5023], dtype=F64)
    rows = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    unsafe = Halfspaces(rows, torch.full((6,), 1e-4, dtype=F64))
    specification = Specification((Case(unit_box(3), (unsafe,)),))
    assert valid(
        falsify(lambda x: torch.round((x - goal) * 1e5) / 1e5, specification, generator=seeded()), specification
    )


def test_functions_without_gradients_are_searched():
    specification = at_most(unit_box(2), -1.0)

    def outside_of_autograd(x: Tensor) -> Tensor:
        return torch.from_numpy(-((x.detach().numpy() > 0.95).all(1, keepdims=True)).astype(float))

    assert valid(falsify(outside_of_autograd, specification, generator=seeded()), specification)


def test_cases_and_disjuncts_of_different_lengths_are_searched_together():
    never, pair = halfspaces([[1.0, 0.0]], [-9.0]), halfspaces([[1.0, 1.0], [-1.0, -1.0]], [1.5, -1.4])
    low = Box(torch.zeros(1, 2, dtype=F64), torch.full((1, 2), 0.5, dtype=F64))
    cases = (Case(low, (never, halfspaces([[1.0, 0.0]], [-0.1]))), Case(unit_box(2), (never, pair, never)))
    found = falsify(lambda x: x, Specification(cases), generator=seeded())
    assert found is not None
    assert 1.4 <= float(found.x.sum()) <= 1.5
    assert falsify(lambda x: x, Specification(cases[:1]), generator=seeded(), restarts=2) is None


def test_boxes_and_balls_may_stand_in_one_specification():
    safe, unsafe = halfspaces([[1.0]], [-9.0]), halfspaces([[1.0]], [-0.9])
    center = torch.zeros(1, 1, dtype=F64)
    regions = (unit_box(1), Ball(center, 1.0, 2.0), Ball(center, 0.5, math.inf))
    for chosen in range(3):
        cases = tuple(Case(region, (unsafe if i == chosen else safe,)) for i, region in enumerate(regions))
        found = falsify(lambda x: x, Specification(cases), generator=seeded(), restarts=3)
        assert (found is not None) == (chosen == 1)


def test_a_disjunct_without_rows_is_violated_at_once():
    everything = Halfspaces(torch.zeros(0, 2, dtype=F64), torch.zeros(0, dtype=F64))
    specification = Specification((Case(unit_box(2), (halfspaces([[1.0, 0.0]], [-9.0]), everything)),))
    assert valid(falsify(lambda x: x, specification, generator=seeded()), specification)


def test_fixed_inputs_stay_where_they_are_also_between_two_numbers_of_the_dtype():
    lower, upper = torch.tensor([[0.1, 0.2, 0.3]], dtype=F64), torch.tensor([[0.1, 0.7, 0.3]], dtype=F64)
    box = Box(lower, upper)
    net = nn.Linear(3, 1, bias=False)
    nn.init.constant_(net.weight, -1.0)
    specification = at_most(box, -1.0999)
    found = falsify(net, specification, generator=seeded())
    assert found is not None
    assert contains(box, found.x)
    assert found.x[0, 0] == 0.1
    assert valid(found, specification)


def test_the_module_is_left_as_it_was():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    specification = Specification.robustness(torch.rand(1, 2, 2, generator=seeded()), 0.01, 0, 3)
    falsify(net, specification, generator=seeded(), steps=5, restarts=2)
    assert all(module.training for module in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_one_seed_gives_one_counterexample():
    specification = at_most(unit_box(5), -0.9)
    first, again, other = (falsify(lambda x: -x[:, :1], specification, generator=seeded(s)) for s in (0, 0, 1))
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)


def test_the_search_ends_at_its_deadline():
    calls = []

    def slow(x: Tensor) -> Tensor:
        calls.append(len(x))
        time.sleep(0.02)
        return x[:, :1]

    started = time.monotonic()
    assert falsify(slow, at_most(unit_box(2), -1.0), generator=seeded(), batch=16, deadline=started + 0.1) is None
    assert sum(calls) <= 16 * 7


def test_the_search_goes_on_until_a_point_is_confirmed():
    """What confirms may ask for more than the network shows: here for a margin of 0.3."""
    specification, wanted = at_most(unit_box(3), -0.5), at_most(unit_box(3), -0.8)
    shown = []

    def confirm(x: Tensor) -> Counterexample | None:
        shown.append(x)
        return replay(lambda x: -x[:, :1], wanted, x)

    found = falsify(lambda x: -x[:, :1], specification, generator=seeded(), confirm=confirm)
    assert valid(found, wanted)
    assert all(x.shape == (3,) for x in shown)
    assert falsify(lambda x: -x[:, :1], specification, generator=seeded(), restarts=1, confirm=lambda x: None) is None


def test_outputs_that_are_not_numbers_violate_nothing():
    nan = at_most(unit_box(2), 0.0)
    assert falsify(lambda x: torch.full_like(x[:, :1], math.nan), nan, generator=seeded(), steps=3, restarts=2) is None


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadInput, match=r"about 1 outputs, and the network gives \(\d+, 2\) for \d+ inputs"):
        falsify(lambda x: x, at_most(unit_box(2), 0.0), generator=seeded())
    with pytest.raises(BadInput, match="must be at least 1, got 0, 30 and 512"):
        falsify(lambda x: x, at_most(unit_box(1), 0.0), generator=seeded(), steps=0)
