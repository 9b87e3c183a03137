"""Bounds of inner nodes: no point of a region outside of them, by default and by random free parameters."""

import pytest
import torch
from torch import Tensor, nn

from cases import NETS, Case, captured, mlp, tensors_of
from corollary.graph import Node
from corollary.verify.intervals import Interval
from corollary.verify.known import Known
from corollary.verify.linear_bounds import lower_bounds
from corollary.verify.prepared import Prepared, prepare
from corollary.verify.sweep import entered, sweep
from soundness import first_output, outside, points_in, regions_around, values_at

BOUNDED = [c for c in NETS if c.integers is None and c.name not in {"foreign", "batch-sizes"}]
HEAVY = {"gru", "gru-bidirectional", "lstm", "lstm-deep"}
SMALL = [c for c in BOUNDED if c.name not in HEAVY | {"group-norm", "vit", "vit-written-out"}]


def check_nodes(network: Prepared, known: Known, values: dict[Node, Tensor]) -> None:
    for node in known.bounds:
        assert outside(*known.flat(node), values[node]) <= 1e-9, node


@pytest.mark.parametrize("kind", ["box", "ball 2"])
@pytest.mark.parametrize("case", [c for c in BOUNDED if c.name not in HEAVY], ids=str)
def test_no_point_is_outside_at_any_node(case: Case, kind: str):
    network = prepare(first_output(captured(case)[1]))
    regions = regions_around(tensors_of(case.inputs(2)), kind, 0.1)
    found = sweep(network, regions)
    assert set(found.known.bounds) == network.bounded
    check_nodes(network, found.known, values_at(network.graph, points_in(network.graph, regions), [*network.bounded]))


@pytest.mark.parametrize("ends", [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_any_free_parameters_are_sound(case: Case, ends: tuple[float, float]):
    network = prepare(first_output(captured(case)[1]))
    regions = regions_around(tensors_of(case.inputs(2)), "box", 0.2)
    found = sweep(network, regions)
    generator = torch.Generator().manual_seed(4)
    low, high = ends
    free: dict = {}
    for node, positions in found.positions.items():
        free[node] = {}
        lower_bounds(network, node, positions, regions, found.known, collect=free[node])
        for at, pair in free[node].items():
            free[node][at] = tuple(
                None if part is None else low + (high - low) * torch.rand(part.shape, generator=generator).double()
                for part in pair
            )
    known = Known(network, 2, found.known.bounds)
    for node, positions in found.positions.items():
        lower = lower_bounds(network, node, positions, regions, known, free=free[node]).lower
        known.bounds[node] = entered(node, known.flat(node), positions, lower)
    check_nodes(network, known, values_at(network.graph, points_in(network.graph, regions), [*network.bounded]))


def test_what_is_held_is_kept():
    torch.manual_seed(0)
    network = prepare(mlp(4, 8, 6, 3), torch.randn(2, 4))
    regions = regions_around((torch.randn(2, 4),), "box", 0.5)
    (first, *_) = [node for node in network.graph if node in network.bounded]
    lower, upper = sweep(network, regions).known.flat(first)
    held = Interval(lower + 0.1 * (upper - lower), upper)
    found = sweep(network, regions, held={first: held}).known
    torch.testing.assert_close(found.flat(first)[0], held.lower)


def test_backward_passes_are_taken_only_where_something_is_open():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2))
        net[0].bias.copy_(torch.tensor([5.0, 5.0]))
        net[2].weight.copy_(torch.eye(2))
        net[2].bias.copy_(torch.tensor([5.0, -5.0]))
    x = torch.zeros(1, 2, dtype=torch.float64)
    found = sweep(prepare(net, x), regions_around((x,), "ball inf", 1.0))
    (positions,) = found.positions.values()
    assert positions.tolist() == [[2, -2]]


def test_many_samples_in_parts_are_bounded_as_one_by_one():
    torch.manual_seed(2)
    net = mlp(6, 300, 300, 2).double()
    x = torch.randn(6, 6, dtype=torch.float64)
    network = prepare(net, x)
    known = sweep(network, regions_around((x,), "ball 2", 0.3)).known
    for i, radius in enumerate(torch.linspace(1, 2, 6, dtype=torch.float64).tolist()):
        alone = sweep(network, regions_around((x[i : i + 1],), "ball 2", 0.3 * radius)).known
        for node in network.bounded:
            lower, upper = (end[0] for end in alone.flat(node))
            open_ = (lower < 0) & (upper > 0)  # others may be sharpened to fill up a list: their bounds are not read
            assert bool(open_.any())
            torch.testing.assert_close(lower[open_], known.flat(node)[0][i][open_], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(upper[open_], known.flat(node)[1][i][open_], rtol=1e-9, atol=1e-9)
