"""Verdicts by cutting boxes, against dense grids of one and two inputs."""

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from cases import mlp
from corollary.graph import forward
from corollary.verify import input_splitting
from corollary.verify.certify import certify
from corollary.verify.input_splitting import split_inputs
from corollary.verify.prepared import Prepared, prepare
from corollary.verify.queries import OpenBoxes, Queries
from corollary.verify.search import Margin, Outcome
from corollary.verify.sets import Box
from corollary.verify.specification import Case, Halfspaces, Specification
from corollary.verify.verdict import CertifyConfig

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "silu": nn.SiLU
}  # fmt: skip


@cache
def network(inputs: int, outputs: int = 1, activation: str = "tanh", seed: int = 0) -> tuple[nn.Module, Prepared]:
    torch.manual_seed(seed)
    net = mlp(inputs, 8, 6, outputs, activation=ACTIVATIONS[activation]).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.0)
    return net, prepare(net, torch.zeros(2, inputs, dtype=torch.float64))


def box(*ends: tuple[float, float]) -> Box:
    lower, upper = zip(*ends, strict=True)
    return Box(torch.tensor([lower], dtype=torch.float64), torch.tensor([upper], dtype=torch.float64))


def grid(region: Box, steps: int) -> Tensor:
    axes = [torch.linspace(float(a), float(b), steps, dtype=torch.float64) for a, b in zip(*ends(region), strict=True)]
    return torch.cartesian_prod(*axes).reshape(-1, len(axes))


def ends(region: Box) -> tuple[Tensor, Tensor]:
    return region.lower[0], region.upper[0]


def outputs_on(net: nn.Module, region: Box) -> Tensor:
    """Outputs on a grid so dense that between its points, a thousandth of the box apart, they move by below 0.02."""
    with torch.no_grad():
        return net(grid(region, 20001 if region.lower.shape[1] == 1 else 501))


def below(row: list[float], offset: float) -> Halfspaces:
    """Unsafe is row . y <= offset."""
    return Halfspaces(torch.tensor([row], dtype=torch.float64), torch.tensor([offset], dtype=torch.float64))


def both(*pieces: Halfspaces) -> Halfspaces:
    return Halfspaces(torch.cat([p.matrix for p in pieces]), torch.cat([p.offset for p in pieces]))


def asked(prepared: Prepared, *cases: Case) -> Queries:
    return Queries.of(Specification(cases), prepared.dtype, prepared.device)


def search(prepared: Prepared, queries: Queries, **options) -> Outcome:
    with torch.no_grad():
        deadline = options.pop("deadline", time.monotonic() + 60)
        return split_inputs(prepared, queries, Margin.for_dtype(prepared.dtype), deadline=deadline, **options)


def is_in(point: Tensor, region: Box) -> bool:
    return bool(((point >= region.lower) & (point <= region.upper)).all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("inputs", [1, 2])
def test_verdicts_on_both_sides_of_the_least_value_on_a_grid(inputs: int, activation: str):
    net, prepared = network(inputs, 1, activation)
    region = box(*((-1.0, 1.5), (-0.5, 1.0))[:inputs])
    least = float(outputs_on(net, region).min())
    assert search(prepared, asked(prepared, Case(region, (below([1.0], least - 0.02),)))).status == "proved"
    found = search(prepared, asked(prepared, Case(region, (below([1.0], least + 1e-6),))))
    assert found.status == "found"
    assert found.point is not None
    assert found.point.shape == (1, inputs)
    assert is_in(found.point, region)
    with torch.no_grad():
        assert float(net(found.point)) <= least + 1e-6


@pytest.mark.parametrize("single", [False, True])
def test_single_precision_decides_the_same_away_from_its_rounding(single: bool):
    net, prepared = network(2, 1, "tanh")
    if single:
        prepared = prepare(prepared.graph, dtype=torch.float32)
    region = box((-1.0, 1.5), (-0.5, 1.0))
    least = float(outputs_on(net, region).min())
    statuses = [
        search(prepared, asked(prepared, Case(region, (below([1.0], least + gap),)))).status for gap in (-0.02, 1e-3)
    ]
    assert statuses == ["proved", "found"]


@pytest.mark.parametrize("quantile", [0.0, 0.02, 0.4])
@pytest.mark.parametrize("seed", range(3))
def test_conjunctions_by_the_grid(seed: int, quantile: float):
    """Unsafe is both outputs low at once: possible or not by the largest of both, of which the grid shows the least."""
    net, prepared = network(2, 2, "relu", seed)
    region = box((-1.0, 1.0), (-1.0, 1.0))
    y = outputs_on(net, region)
    first = float(y[:, 0].quantile(quantile))
    reach = float(torch.where(y[:, 0] <= first + 0.02, y[:, 1], torch.inf).min())
    safe = both(below([1.0, 0.0], first), below([0.0, 1.0], reach - 0.02))
    unsafe = both(below([1.0, 0.0], first + 0.02), below([0.0, 1.0], reach + 1e-6))
    assert search(prepared, asked(prepared, Case(region, (safe,)))).status == "proved"
    found = search(prepared, asked(prepared, Case(region, (unsafe,))))
    assert found.status == "found"
    assert found.point is not None
    with torch.no_grad():
        y = net(found.point)[0]
    assert float(y[0]) <= first + 0.02
    assert float(y[1]) <= reach + 1e-6


def disjuncts(net: nn.Module, region: Box, gap: float) -> list[Halfspaces]:
    """Four: each output below its least value, and above its largest, by `gap` beyond what the grid shows."""
    y = outputs_on(net, region)
    low, high = y.amin(0), y.amax(0)
    return [
        below([1.0, 0.0], float(low[0]) - gap), below([-1.0, 0.0], -float(high[0]) - gap),
        below([0.0, 1.0], float(low[1]) - gap), below([0.0, -1.0], -float(high[1]) - gap),
    ]  # fmt: skip


@pytest.mark.parametrize("violated", range(4))
def test_every_open_disjunct_is_searched(violated: int):
    """One of four is possible, whichever it is; with that one closed, the other three are proved."""
    net, prepared = network(2, 2, "tanh")
    region = box((-1.0, 1.5), (-0.5, 1.0))
    pieces = disjuncts(net, region, 0.02)
    pieces[violated] = disjuncts(net, region, -1e-6)[violated]
    queries = asked(prepared, Case(region, tuple(pieces)))
    found = search(prepared, queries)
    assert found.status == "found"
    assert found.point is not None
    with torch.no_grad():
        value = float(pieces[violated].matrix[0] @ net(found.point)[0])
    assert value <= float(pieces[violated].offset)
    opened = queries.open.clone()
    opened[0, violated] = False
    assert search(prepared, replace(queries, open=opened)).status == "proved"


def test_all_four_impossible_disjuncts_are_proved():
    net, prepared = network(2, 2, "tanh")
    region = box((-1.0, 1.5), (-0.5, 1.0))
    assert search(prepared, asked(prepared, Case(region, tuple(disjuncts(net, region, 0.02))))).status == "proved"


@pytest.mark.parametrize("violated", range(3))
def test_every_region_is_searched_with_its_own_unsafe_outputs(violated: int):
    net, prepared = network(1, 1, "tanh")
    regions = [box((-1.0, -0.2)), box((0.1, 0.2)), box((0.5, 1.5))]
    least = [float(outputs_on(net, region).min()) for region in regions]
    fine = [Case(region, (below([1.0], a - 0.02),)) for region, a in zip(regions, least, strict=True)]
    assert search(prepared, asked(prepared, *fine)).status == "proved"
    fine[violated] = Case(regions[violated], (below([1.0], least[violated] + 1e-6),))
    found = search(prepared, asked(prepared, *fine))
    assert found.status == "found"
    assert found.point is not None
    assert is_in(found.point, regions[violated])


@pytest.mark.parametrize("gap", [-0.02, 1e-6])
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_boxes_one_by_one_decide_as_many_at_once(activation: str, gap: float):
    net, prepared = network(2, 2, activation)
    region = box((-1.0, 1.5), (-0.5, 1.0))
    pieces = tuple(disjuncts(net, region, 0.02)[:3]) + tuple(disjuncts(net, region, -gap)[3:])
    queries = asked(prepared, Case(region, pieces), Case(box((2.0, 2.5), (0.0, 0.5)), (below([1.0, 0.0], -1e3),)))
    statuses = {at_once: search(prepared, queries, at_once=at_once).status for at_once in (1, 7, 256)}
    assert set(statuses.values()) == {"proved" if gap < 0 else "found"}, statuses


def test_points_that_are_not_confirmed_are_passed_over():
    """The search asks about each and goes on; what it could not prove it does not call proved."""
    net, prepared = network(1, 1, "relu")
    region = box((-1.0, 1.0))
    least = float(outputs_on(net, region).min())
    queries = asked(prepared, Case(region, (below([1.0], least + 0.1),)))
    seen: list[Tensor] = []

    def third(point: Tensor) -> bool:
        seen.append(point)
        return len(seen) == 3

    found = search(prepared, queries, confirm=third, at_once=4)
    assert found.status == "found"
    assert len(seen) == 3
    assert found.point is not None
    assert torch.equal(found.point, seen[-1])
    with torch.no_grad():
        assert all(float(net(point)) <= least + 0.1 for point in seen)
    now = itertools.count()
    refused = search_by_clock(prepared, queries, lambda point: False, lambda: next(now), deadline=60)
    assert refused.status in {"timeout", "stuck"}


def search_by_clock(
    prepared: Prepared, queries: Queries, confirm: Callable[[Tensor], bool], clock: Callable[[], float], deadline: float
) -> Outcome:
    """A search by a clock that goes on whenever it is read."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(time, "monotonic", clock)
        return split_inputs(
            prepared, queries, Margin.for_dtype(prepared.dtype), deadline=deadline, confirm=confirm, at_once=16
        )


def test_a_deadline_that_has_passed_bounds_nothing():
    _, prepared = network(2)
    region = box((-1.0, 1.0), (-1.0, 1.0))
    queries = asked(prepared, Case(region, (below([1.0], -1e3),)))
    outcome = search(prepared, queries, deadline=time.monotonic() - 1)
    assert (outcome.status, outcome.domains, outcome.point) == ("timeout", 0, None)
    assert search(prepared, queries).status == "proved"


def test_the_deadline_is_looked_at_before_every_batch_of_boxes():
    net, prepared = network(2)
    region = box((-1.0, 1.5), (-0.5, 1.0))
    least = float(outputs_on(net, region).min())
    queries = asked(prepared, Case(region, (below([1.0], least - 1e-7),)))
    now = itertools.count()
    outcome = search_by_clock(prepared, queries, lambda _: False, lambda: next(now), deadline=5)
    assert outcome.status == "timeout"
    assert outcome.domains <= 6 * 16
    assert next(now) == 7


def test_a_search_goes_on_from_the_boxes_left_open():
    """Stopped at once, again and again, the searches prove together what one does."""
    net, prepared = network(2, 2, "tanh")
    region = box((-1.0, 1.5), (-0.5, 1.0))
    y = outputs_on(net, region)
    first, second = (float(y[:, i].min()) for i in range(2))
    cases = [Case(region, (below([1.0, 0.0], first - 1e-3),)), Case(region, (below([0.0, 1.0], second - 1e-3),))]
    queries = asked(prepared, *cases)

    def stopped(network: Prepared, queries: Queries, begin: OpenBoxes | None) -> Outcome:
        """One round, of one box."""
        ticks = itertools.count()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(time, "monotonic", lambda: next(ticks))
            return split_inputs(network, queries, margin, deadline=0, begin=begin, at_once=1)

    margin = Margin.for_dtype(prepared.dtype)
    with torch.no_grad():
        outcome = stopped(prepared, queries, None)
        rounds = 1
        while outcome.status == "timeout":
            assert outcome.rest is not None
            assert len(outcome.rest)
            outcome = stopped(prepared, queries, outcome.rest)
            rounds += 1
            assert rounds < 200
    assert outcome.status == "proved"
    assert rounds > 2


def test_what_rounding_leaves_open_is_handed_on():
    """Half an allowance above the least value single precision proves nothing near it, and cuts no further."""
    net, double = network(1, 1, "tanh")
    region = box((-1.0, 1.5))
    least = float(outputs_on(net, region).min())
    single = prepare(double.graph, dtype=torch.float32)
    offset = least - 2e-6
    queries = asked(single, Case(region, (below([1.0], offset),)))
    outcome = search(single, queries)
    assert outcome.status == "stuck"
    assert outcome.rest is not None
    assert outcome.domains < 2000
    finer = asked(double, Case(region, (below([1.0], offset),)))
    begin = outcome.rest.within(finer)
    assert begin.box.lower.dtype == torch.float64
    assert bool((begin.box.lower >= region.lower).all())
    assert bool((begin.box.upper <= region.upper).all())
    assert search(double, finer, begin=begin).status == "proved"


def test_float64_follows_where_rounding_decides():
    net, _ = network(1, 1, "tanh")
    region = box((-1.0, 1.5))
    least = float(outputs_on(net, region).min())
    verdict = certify(net, region, (below([1.0], least - 2e-6),), timeout=60, config=CertifyConfig(attack=(0, 0)))
    assert verdict.status == "unsat"
    assert any("again in float64" in line for line in verdict.log)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_wide_networks_are_bounded_forward(activation: str, monkeypatch: pytest.MonkeyPatch):
    net, prepared = network(2, 2, activation)
    assert not input_splitting.is_wide(prepared)
    monkeypatch.setattr(input_splitting, "WIDE", 0)
    monkeypatch.setattr(input_splitting, "BESIDE", 10)
    monkeypatch.setattr(input_splitting, "sweep", None)
    wide = prepare(
        nn.Sequential(net, nn.Linear(2, 50), nn.ReLU(), nn.Linear(50, 1)).double(), torch.zeros(2, 2).double()
    )
    assert input_splitting.is_wide(wide)
    region = box((-1.0, 1.5), (-0.5, 1.0))
    with torch.no_grad():
        y = forward(wide.graph, (grid(region, 501),), wide.graph.tensors, lambda node, op, v: op(*v), batch=501**2)
    least = float(y[wide.graph.outputs[0]].min())
    assert search(wide, asked(wide, Case(region, (below([1.0], least - 0.02),)))).status == "proved"
    found = search(wide, asked(wide, Case(region, (below([1.0], least + 1e-6),))))
    assert found.status == "found"
    assert found.point is not None
    assert is_in(found.point, region)
