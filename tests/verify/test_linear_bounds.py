"""The backward pass: products by hand, free parameters at random, split constraints that hold on their half."""

import pytest
import torch
from torch import Tensor

from cases import NETS, Case, captured, tensors_of
from corollary.graph import Graph, Node
from corollary.graph import ops as O
from corollary.graph.builder import Builder
from corollary.verify.branching import Neurons, middle_points
from corollary.verify.linear_bounds import Splits, lower_bounds
from corollary.verify.linear_functions import greatest, least
from corollary.verify.prepared import prepare
from corollary.verify.sets import Ball, Box
from corollary.verify.sweep import sweep
from soundness import first_output, outside, points_in, regions_around, values_at

HEAVY = {"gru", "gru-bidirectional", "lstm", "lstm-deep", "vit", "vit-written-out", "group-norm"}
BOUNDED = [c for c in NETS if c.integers is None and c.name not in HEAVY | {"foreign", "batch-sizes"}]


def product() -> Graph:
    builder = Builder("built in a test")
    x = builder.input("x", (O.BatchSize(), 2), torch.float64)
    parts = [builder.emit(O.Slice(1, i, i + 1), x) for i in range(2)]
    return builder.finish([builder.emit(O.Multiply(), *parts)])


@pytest.mark.parametrize(("share", "expected"), [(0.0, -3.0), (0.5, -1.0), (1.0, -3.0)])
def test_a_product_by_hand(share: float, expected: float):
    """x y >= r (y_l x + x_l y - x_l y_l) + (1 - r) (y_u x + x_u y - x_u y_u) on [-1, 1]^2."""
    network = prepare(product())
    ones = torch.ones(1, 2, dtype=torch.float64)
    box = Box(-ones, ones)
    known = sweep(network, [box]).known
    (node,) = network.nonlinear
    free: dict = {}
    positions = torch.tensor([[1]])
    lower_bounds(network, node, positions, [box], known, collect=free)
    chosen = {node: tuple(None if part is None else torch.full_like(part, share) for part in free[node])}
    found = lower_bounds(network, node, positions, [box], known, free=chosen)  # type: ignore[arg-type]
    assert float(found.lower) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("ends", [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("case", BOUNDED, ids=str)
def test_free_parameters_and_multipliers_at_random_are_sound(case: Case, ends: tuple[float, float]):
    """Half of one neuron's range, any parameters, any multipliers: points of that half respect the bound."""
    network = prepare(first_output(captured(case)[1]))
    regions = regions_around(tensors_of(case.inputs(2)), "box", 0.2)
    known = sweep(network, regions).known
    neurons = Neurons(network)
    output = network.graph.outputs[0]
    count = network.sizes[output]
    positions = torch.arange(1, count + 1).repeat(2, 1)
    points = points_in(network.graph, regions)
    at = values_at(network.graph, points, [*neurons.nodes, output])
    free: dict[Node, tuple[Tensor | None, Tensor | None]] = {}
    lower_bounds(network, output, positions, regions, known, collect=free)
    generator = torch.Generator().manual_seed(6)
    low, high = ends
    drawn = {
        node: tuple(None if p is None else low + (high - low) * torch.rand(p.shape, generator=generator).double()
                    for p in pair)
        for node, pair in free.items()
    }  # fmt: skip
    whole = lower_bounds(network, output, positions, regions, known, free=drawn).lower  # type: ignore[arg-type]
    assert outside(whole, torch.full_like(whole, torch.inf), at[output]) <= 1e-9
    if not len(neurons):
        return
    lower, upper = neurons.ends(known)
    split_at = middle_points(neurons, lower, upper)
    for node in neurons.nodes[:3]:
        place = neurons.of(node)
        entry = (upper - lower)[:, place].nan_to_num(posinf=0).argmax(1)
        point = split_at[:, place].gather(1, entry[:, None])
        if not bool(point.isfinite().all()):
            continue
        z = at[node].gather(2, entry.expand(len(at[node]), 2)[..., None])[..., 0]
        multiplier = 2 * torch.rand(2, count, 1, generator=generator).double()
        for sign, inside in ((1.0, z <= point[:, 0]), (-1.0, z >= point[:, 0])):
            split = Splits(entry[:, None], torch.full((2, 1), sign).double(), point, multiplier)
            cut_low, cut_high = lower.clone(), upper.clone()
            (cut_high if sign > 0 else cut_low)[:, place].scatter_(1, entry[:, None], point)
            child = neurons.known(cut_low, cut_high)
            bound = lower_bounds(network, output, positions, regions, child, free=drawn, splits={node: split}).lower  # type: ignore[arg-type]
            gap = (bound - at[output]) / (1 + at[output].abs())
            assert float(torch.where(inside[..., None], gap, -1.0).max()) <= 1e-9


def test_a_split_constraint_closes_a_gap_that_relaxations_leave():
    """relu(x) + relu(-x) - relu(x) - relu(-x) = 0; where x >= 0 and -x >= 0 only x = 0 is left: multipliers see it."""
    from torch import nn

    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        net[1].weight.copy_(torch.tensor([[1.0, 0.0]]))
    one = torch.ones(1, 1, dtype=torch.float64)
    network = prepare(net, one)
    hidden, output = (node for node in network.graph if isinstance(node.op, O.Linear))
    box, known = Box(-one, one), sweep(network, [Box(-one, one)]).known
    bounds = []
    for multiplier in (0.0, 1.0):
        split = Splits(torch.tensor([[0]]), -one, 0 * one, torch.full((1, 1, 1), multiplier).double())
        bounds.append(
            float(lower_bounds(network, output, torch.tensor([[1]]), [box], known, splits={hidden: split}).lower)
        )
    assert bounds == [-1.0, 0.0]


@pytest.mark.parametrize("norm", [1.0, 2.0, 4.0, float("inf")])
def test_the_least_value_over_a_ball_is_reached(norm: float):
    torch.manual_seed(0)
    slopes = torch.randn(3, 2, 5, dtype=torch.float64)
    ball = Ball(torch.randn(3, 5, dtype=torch.float64), torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64), norm)
    found = least(slopes, ball)
    q = ball.dual_norm
    steepest = slopes.abs() == slopes.abs().amax(2, keepdim=True) if norm == 1 else slopes.abs() ** (q - 1)
    best = -slopes.sign() * steepest
    steps = torch.cat([best[None], torch.randn(2000, 3, 2, 5, dtype=torch.float64)])
    steps = steps / torch.linalg.vector_norm(steps, ord=norm, dim=-1, keepdim=True)
    reached = ((ball.center[:, None] + ball.radii[:, None, None] * steps) * slopes).sum(-1)
    assert bool((reached >= found - 1e-12).all())
    torch.testing.assert_close(reached[0], found, rtol=1e-12, atol=1e-12)
    assert bool((greatest(slopes, ball) >= reached.abs().amax(0) - 1e-12).all())
