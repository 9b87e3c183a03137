"""Optimised bounds: they hold at every point, are never looser than those they start from, and reach the optimum."""

import itertools
import time
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from cases import mlp
from corollary.verify.known import Known
from corollary.verify.layout import Rows, pack, sample_shape
from corollary.verify.linear_bounds import lower_bounds
from corollary.verify.prepared import Prepared, prepare
from corollary.verify.sets import Box, Region
from corollary.verify.slopes import Ascent, Optimised, optimised, sharper
from corollary.verify.sweep import Sweep, sweep
from soundness import outside, points_in, regions_around, values_at


class Product(nn.Module):
    """The products of two affine maps, and these of their sums with a tanh."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x) * self.b(x)
        return self.c(torch.tanh(first) * self.a(x) + first)


class Image(nn.Module):
    """A max-pool between convolution and ReLU layers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Attending(nn.Module):
    """A softmax along the last axis, and one along another, between products of affine maps."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.softmax(self.a(x) @ self.b(x).mT, -1) @ self.c(x)
        return self.d(torch.softmax(3 * seen, 1).flatten(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "relu": (lambda: mlp(3, 8, 7, 2), (3,), 0.5),
    "sigmoid": (lambda: mlp(3, 8, 7, 2, activation=nn.Sigmoid), (3,), 0.8),
    "tanh": (lambda: mlp(3, 8, 7, 2, activation=nn.Tanh), (3,), 0.4),
    "max-pool": (Image, (1, 6, 6), 0.2),
    "product": (Product, (3,), 0.3),
    "attention": (Attending, (4, 3), 0.1),
}
BATCH = 3


@cache
def made(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Prepared, Tensor, float]:
    """A network whose weights float32 holds exactly, ready for bounds in `dtype`; centres of regions, and a radius."""
    make, shape, radius = NETWORKS[name]
    torch.manual_seed(seed)
    net = make().float().double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_((1.5 * parameter).float())
    x = torch.randn(BATCH, *shape).to(dtype)
    return prepare(net, x.double(), dtype=dtype) if dtype == torch.float64 else _single(net, x), x, radius


def _single(net: nn.Module, x: Tensor) -> Prepared:
    return prepare(prepare(net, x.double()).graph, dtype=torch.float32)


def asked(network: Prepared, batch: int) -> Rows:
    """Each output, its negative, and differences of the outputs."""
    output = network.graph.outputs[0]
    size = network.sizes[output]
    unit = torch.eye(size, dtype=network.dtype)
    rows = torch.cat([unit, -unit, unit - unit.roll(1, 0)]).expand(batch, 3 * size, size)
    return Rows(pack(output, rows.reshape(batch, 3 * size, *sample_shape(output))), batch, 3 * size)


def bounded(
    network: Prepared, regions: list[Region], ascent: Ascent, goal: Tensor | float = torch.inf
) -> tuple[Sweep, Optimised]:
    with torch.no_grad():
        found = sweep(network, regions)
        rows = asked(network, len(regions[0]))
        return found, optimised(network, network.graph.outputs[0], rows, regions, found, ascent=ascent, goal=goal)


def usual(network: Prepared, regions: list[Region], known: Known) -> Tensor:
    """The pass with default parameters."""
    with torch.no_grad():
        return lower_bounds(network, network.graph.outputs[0], asked(network, len(regions[0])), regions, known).lower


# ------------------------------------------------------------------------------------------------------- they hold


@pytest.mark.parametrize("kind", ["box", "ball 2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_point_of_thousands_is_outside_at_inner_nodes_and_outputs(name: str, dtype: torch.dtype, kind: str):
    network, x, radius = made(name, dtype)
    exact = prepare(network.graph, dtype=torch.float64)  # the same weights: points are evaluated in float64
    regions = regions_around((x,), kind, radius)
    _, best = bounded(network, regions, Ascent(6))
    points = points_in(exact.graph, regions, count=700)
    assert points[0].shape[0] * BATCH >= 4000
    by_name = {node.name: node for node in exact.graph}
    nodes = [by_name[node.name] for node in best.known.bounds]
    values = values_at(exact.graph, points, [*nodes, exact.graph.outputs[0]])
    # float32: thousands of operations of 6e-8 each
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for node, twin in zip(best.known.bounds, nodes, strict=True):
        assert outside(*best.known.flat(node), values[twin]) <= tolerance, node
    rows = asked(exact, BATCH).unpacked(exact.graph.outputs[0]).flatten(2)
    reached = torch.einsum("bro,pbo->pbr", rows, values[exact.graph.outputs[0]])
    assert outside(best.lower, torch.full_like(best.lower, torch.inf), reached) <= tolerance


# ---------------------------------------------------------------------------------------------- they are not looser


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NETWORKS)
def test_never_looser_than_the_sweep_and_the_default_pass_and_tighter_somewhere(name: str, dtype: torch.dtype):
    network, x, radius = made(name, dtype)
    regions = regions_around((x,), "box", radius)
    found, best = bounded(network, regions, Ascent(8))
    for node in found.known.bounds:
        (low, high), (new_low, new_high) = found.known.flat(node), best.known.flat(node)
        assert bool((new_low >= low).all())
        assert bool((new_high <= high).all())
    rounding = 1e-12 if dtype == torch.float64 else 1e-5
    assert bool((best.lower >= usual(network, regions, best.known) - rounding).all())
    start = usual(network, regions, found.known)
    assert bool((best.lower > start + 1e-4 * (1 + start.abs())).any())


@pytest.mark.parametrize("name", NETWORKS)
def test_never_looser_than_the_pass_over_the_bounds_of_the_sweep(name: str):
    """Tighter bounds inside may move a default slope to the other side: a few steps make up for that."""
    network, x, radius = made(name, seed=1)
    regions = regions_around((x,), "box", radius)
    found, best = bounded(network, regions, Ascent(8))
    assert bool((best.lower >= usual(network, regions, found.known) - 1e-9).all())


@pytest.mark.parametrize("name", NETWORKS)
def test_over_the_same_inner_bounds_more_steps_never_give_less(name: str):
    network, x, radius = made(name)
    regions = regions_around((x,), "box", radius)
    with torch.no_grad():
        known = sweep(network, regions).known
    fixed = Sweep(known, {})  # inner bounds without positions are not optimised
    rows, output = asked(network, BATCH), network.graph.outputs[0]
    lower = [optimised(network, output, rows, regions, fixed, ascent=Ascent(steps)).lower for steps in (0, 2, 10)]
    for fewer, more in itertools.pairwise(lower):
        assert bool((more >= fewer).all())
    assert float((lower[-1] - lower[0]).max()) > 1e-3


def test_the_first_inner_node_gets_no_looser_by_more_steps():
    network, x, radius = made("relu")
    regions = regions_around((x,), "ball 2", radius)
    with torch.no_grad():
        found = sweep(network, regions)
        widths = []
        for steps in (0, 2, 10):
            known = sharper(network, regions, found, Ascent(steps))
            second = list(found.positions)[1]
            widths.append(torch.cat([known.flat(second)[0], -known.flat(second)[1]], 1))
    assert all(bool((more >= fewer).all()) for fewer, more in itertools.pairwise(widths))
    assert bool((widths[-1] > widths[0] + 1e-3).any())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_parameters_returned_give_the_bounds_returned(name: str):
    network, x, radius = made(name)
    regions = regions_around((x,), "box", radius)
    _, best = bounded(network, regions, Ascent(5))
    with torch.no_grad():
        rows = asked(network, BATCH)
        again = lower_bounds(network, network.graph.outputs[0], rows, regions, best.known, free=best.free).lower
    assert bool((again <= best.lower + 1e-12).all())
    # Where bounds of inner nodes that are tighter give less, what the first pass gave is returned.
    assert float((again > best.lower - 1e-12).double().mean()) > 0.8
    torch.testing.assert_close(again, best.lower, rtol=0.05, atol=0.05)
    parts = [part for pair in best.free.values() for part in pair if part is not None]
    assert parts
    assert all(bool(((part >= 0) & (part <= 1)).all()) for part in parts)


@pytest.mark.parametrize("name", ["relu", "tanh", "product"])
def test_regions_side_by_side_are_bounded_as_one_by_one(name: str):
    network, x, radius = made(name)
    regions = regions_around((x,), "box", radius)
    _, best = bounded(network, regions, Ascent(5))
    for i in range(BATCH):
        _, alone = bounded(network, [regions[0][i : i + 1]], Ascent(5))
        torch.testing.assert_close(alone.lower[0], best.lower[i], rtol=1e-7, atol=1e-7)


# ------------------------------------------------------------------------------------------------------ a closed form


@pytest.mark.parametrize("seed", [2, 5])
def test_one_hidden_layer_reaches_the_best_slopes_of_a_grid(seed: int):
    r"""$\max_a \min_x \sum_i v_i \ell_i(w_i x + b_i) + c$: a concave function of the slopes a of what has v > 0."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    with torch.no_grad():
        net[0].bias.mul_(0.3)
        net[2].weight.copy_(net[2].weight.abs() * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]))
    weight, bias, v, c = (p.detach() for p in net.parameters())
    center, radius = torch.tensor([0.1, -0.2]).double(), torch.tensor([1.0, 0.7]).double()
    low = weight @ center + bias - weight.abs() @ radius
    high = weight @ center + bias + weight.abs() @ radius
    assert bool(((low < 0) & (high > 0)).all())
    chord = high / (high - low)
    steps = 81
    axis = torch.linspace(0, 1, steps, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis, axis)
    slope = chord.expand(len(grid), 5).clone()
    slope[:, [0, 2, 4]] = grid
    flat = (slope * v) @ weight
    bounds = flat @ center - flat.abs() @ radius + (slope * v) @ bias + float(c)
    bounds = bounds + float((v[0] * -chord * low)[[1, 3]].sum())
    most = float(bounds.max())
    # the change of the bound by half a step of every slope is at most the size of its neuron times it
    missed = float((v[0].abs() * torch.maximum(-low, high))[[0, 2, 4]].sum()) * 0.5 / (steps - 1)

    network = prepare(net, center.expand(2, 2))
    region = Box((center - radius)[None], (center + radius)[None])
    with torch.no_grad():
        rows = Rows(torch.ones(1, 1).double(), 1, 1)
        found = sweep(network, [region])
        output = network.graph.outputs[0]
        start = float(lower_bounds(network, output, rows, [region], found.known).lower)
        best = optimised(network, output, rows, [region], found, ascent=Ascent(150, 0.1, 0.97))
    reached = float(best.lower)
    assert most - 1e-3 <= reached <= most + missed
    assert reached >= start
    assert missed < 0.05


# ------------------------------------------------------------------------------------------------ when it is to stop


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_a_goal_that_is_reached_at_the_start_leaves_the_default_pass(name: str):
    network, x, radius = made(name)
    regions = regions_around((x,), "box", radius)
    with torch.no_grad():
        known = sweep(network, regions).known
    start = usual(network, regions, known)
    rows = asked(network, BATCH)
    best = optimised(
        network, network.graph.outputs[0], rows, regions, Sweep(known, {}), ascent=Ascent(10), goal=start - 1e-6
    )
    torch.testing.assert_close(best.lower, start, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["relu", "tanh", "sigmoid"])
def test_rows_beyond_their_goal_are_not_raised_and_the_others_as_if_alone(name: str):
    network, x, radius = made(name)
    regions = regions_around((x,), "box", radius)
    with torch.no_grad():
        known = sweep(network, regions).known
    start = usual(network, regions, known)
    beyond = torch.arange(start.shape[1]) % 2 == 0
    goal = torch.where(beyond, start - 1e-6, torch.inf)
    output, rows = network.graph.outputs[0], asked(network, BATCH)
    some = optimised(network, output, rows, regions, Sweep(known, {}), ascent=Ascent(10), goal=goal).lower
    every = optimised(network, output, rows, regions, Sweep(known, {}), ascent=Ascent(10)).lower
    torch.testing.assert_close(some[:, beyond], start[:, beyond], rtol=0, atol=1e-12)
    torch.testing.assert_close(some[:, ~beyond], every[:, ~beyond], rtol=1e-9, atol=1e-9)
    assert bool((every[:, beyond] > start[:, beyond] + 1e-3).any())


def test_a_deadline_that_has_passed_leaves_the_sweep_and_the_default_pass():
    network, x, radius = made("tanh")
    regions = regions_around((x,), "box", radius)
    found, best = bounded(network, regions, Ascent(50, deadline=time.monotonic() - 1))
    for node in found.known.bounds:
        for ours, theirs in zip(best.known.flat(node), found.known.flat(node), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    torch.testing.assert_close(best.lower, usual(network, regions, found.known), rtol=0, atol=1e-12)


def test_the_deadline_is_looked_at_in_every_step(monkeypatch: pytest.MonkeyPatch):
    """By a clock that goes on by one whenever it is read: a million steps end with it, and what they found holds."""
    network, x, radius = made("relu")
    regions = regions_around((x,), "box", radius)
    with torch.no_grad():
        found = sweep(network, regions)
    now = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    best = optimised(
        network, network.graph.outputs[0], asked(network, BATCH), regions, found, ascent=Ascent(10**6, deadline=30)
    )
    assert next(now) <= 30 + 2 * (len(found.positions) + 2)
    assert bool((best.lower >= usual(network, regions, best.known) - 1e-12).all())
