"""Bounds of outputs: no point of any region outside of any method's, and the values that are known."""

import pytest
import torch
from torch import Tensor, nn

from cases import NETS, Case, captured, mlp, tensors_of
from corollary.base.errors import BadInput, NoRule
from corollary.verify.bounded_graph import BoundedGraph, Method
from corollary.verify.sets import Ball, Box
from soundness import first_output, output_of, outside, points_in, regions_around

RECURRENT = {"gru", "gru-bidirectional", "lstm", "lstm-deep"}
UNBOUNDED = {"foreign", "batch-sizes"}
BOUNDED = [case for case in NETS if case.integers is None and case.name not in UNBOUNDED]
CHEAP = [case for case in BOUNDED if case.name not in RECURRENT]
HEAVY = {"group-norm", "vit", "vit-written-out", "u-net", "encoder-layer", "encoder-norm-first"}
SMALL = [case for case in CHEAP if case.name not in HEAVY]
ONCE: tuple[Method, ...] = ("interval", "forward", "interval+crown", "forward+crown", "crown")


def methods_of(case: Case) -> tuple[Method, ...]:
    """All; on large networks without the passes forward, which carry a column for every input."""
    return tuple(method for method in ONCE if case.name not in HEAVY or "forward" not in method)


def bounded(case: Case, dtype: torch.dtype = torch.float64) -> BoundedGraph:
    return BoundedGraph(first_output(captured(case)[1]), dtype=dtype)


def check_sound(
    case: Case, kind: str, radius: float, methods: tuple[Method, ...], dtype=torch.float64, tolerance=1e-9, **options
) -> dict[str, tuple[Tensor, Tensor]]:
    graph = first_output(captured(case)[1])
    regions = [region.to(dtype) for region in regions_around(tensors_of(case.inputs(2)), kind, radius)]
    value = output_of(graph, points_in(graph, regions))
    network = bounded(case, dtype)
    found = {}
    for method in methods:
        found[method] = network.bounds(regions, method=method, **options)
        assert outside(*found[method], value) <= tolerance, method
    return found


@pytest.mark.parametrize("kind", ["box", "ball 2", "ball 1"])
@pytest.mark.parametrize("case", CHEAP, ids=str)
def test_no_point_is_outside(case: Case, kind: str):
    check_sound(case, kind, 0.05, methods_of(case))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_no_point_of_a_wide_box_is_outside(case: Case):
    check_sound(case, "box", 0.7, ONCE)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in BOUNDED if c.name in RECURRENT | HEAVY], ids=str)
def test_no_point_is_outside_for_large_networks(case: Case):
    check_sound(case, "box", 0.05, methods_of(case))
    check_sound(case, "box", 0.1, ("alpha-crown",), iterations=2)


@pytest.mark.parametrize("case", CHEAP, ids=str)
def test_single_precision_holds_to_its_rounding(case: Case):
    check_sound(case, "box", 0.05, methods_of(case), torch.float32, 2e-5)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_optimised_parameters_are_sound_and_no_worse(case: Case):
    found = check_sound(case, "box", 0.15, ("crown", "alpha-crown"), iterations=3)
    assert bool((found["alpha-crown"][0] >= found["crown"][0] - 1e-9).all())
    assert bool((found["alpha-crown"][1] <= found["crown"][1] + 1e-9).all())


@pytest.mark.parametrize("kind", ["box", "ball 2"])
@pytest.mark.parametrize("case", CHEAP, ids=str)
def test_a_region_of_no_width_gives_the_value(case: Case, kind: str):
    graph = first_output(captured(case)[1])
    inputs = tensors_of(case.inputs(2))
    value = output_of(graph, [x[None] for x in inputs])[0]
    regions = regions_around(inputs, kind, 0.0)
    for method in methods_of(case):
        lower, upper = bounded(case).bounds(regions, method=method)
        torch.testing.assert_close(lower, value, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(upper, value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", [1.0, 2.0, 3.0, float("inf")])
def test_an_affine_network_is_bounded_exactly_in_every_norm(norm: float):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    radius = torch.tensor([0.0, 0.1, 1.0, 3.0], dtype=torch.float64)
    lower, upper = BoundedGraph(net, x).bounds(Ball(x, radius, norm))
    slope = (net[1].weight @ net[0].weight).detach()
    dual = {1.0: float("inf"), 2.0: 2.0, 3.0: 1.5, float("inf"): 1.0}[norm]
    reach = radius[:, None] * torch.linalg.vector_norm(slope, ord=dual, dim=1)
    torch.testing.assert_close(lower, net(x).detach() - reach, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(upper, net(x).detach() + reach, rtol=1e-10, atol=1e-10)


def test_one_hidden_layer_by_hand():
    """f = relu(x + y) + relu(x - y) on [-1, 1]^2: both chords are (z + 2) / 2, so f <= x + 2; lower slopes are 0."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        net[2].weight.fill_(1.0)
    ones = torch.ones(1, 2, dtype=torch.float64)
    network, box = BoundedGraph(net, ones), Box(-ones, ones)
    assert [float(end) for end in network.bounds(box, method="interval")] == [0, 4]
    assert [float(end) for end in network.bounds(box)] == pytest.approx([0, 3], abs=1e-12)
    # on [0, 1] x [-1, 1] both upper ends are larger: the slope below is 1, and f >= 2x meets f >= 0
    network_lower, network_upper = network.bounds(Box(torch.tensor([[0.0, -1.0]]).double(), ones))
    assert float(network_lower) == 0
    assert float(network_upper) == pytest.approx((1 + 1 + 1 + 1) * 2 / 3, abs=1e-12)


def test_rows_are_linear_functions_of_the_outputs():
    torch.manual_seed(1)
    net = mlp(4, 8, 3, activation=nn.Tanh).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    network, box = BoundedGraph(net, x), Box(x - 0.1, x + 0.2)
    rows = torch.randn(5, 3, dtype=torch.float64)
    shared, own = network.bounds(box, rows), network.bounds(box, rows.expand(2, 5, 3))
    torch.testing.assert_close(shared, own)
    fused = nn.Sequential(net, nn.Linear(3, 5, bias=False)).double()
    with torch.no_grad():
        fused[1].weight.copy_(rows)
    torch.testing.assert_close(BoundedGraph(fused, x).bounds(box)[0], shared[0], rtol=1e-12, atol=1e-12)
    low, high = network.bounds(box)
    assert bool((shared[0] >= (rows.clamp(min=0) @ low.T + rows.clamp(max=0) @ high.T).T - 1e-9).all())


def test_samples_do_not_touch_one_another():
    for case in [case for case in NETS if case.name in {"encoder-layer", "rnn-time-first", "residual-cnn"}]:
        inputs = tensors_of(case.inputs(3))
        network = bounded(case)
        together = network.bounds(regions_around(inputs, "box", 0.05))
        for i in range(3):
            alone = network.bounds(regions_around(tuple(x[i : i + 1] for x in inputs), "box", 0.05))
            torch.testing.assert_close(alone[0][0], together[0][i], rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(alone[1][0], together[1][i], rtol=1e-8, atol=1e-8)


def test_a_sum_over_the_samples_is_refused():
    (case,) = [case for case in NETS if case.name == "batch-sizes"]
    with pytest.raises(NoRule, match="along one axis"):
        bounded(case).bounds(regions_around(tensors_of(case.inputs(2)), "box", 0.1))


def test_what_does_not_fit_is_refused():
    net = mlp(4, 8, 3)
    x = torch.randn(2, 4)
    network, box = BoundedGraph(net, x), Box(x, x + 1)
    with pytest.raises(BadInput, match="example"):
        BoundedGraph(net)
    with pytest.raises(BadInput, match="rows must be"):
        network.bounds(box, torch.zeros(2, 4))
    with pytest.raises(BadInput, match="1 inputs, got 2 regions"):
        network.bounds([box, box])
    with pytest.raises(BadInput, match="has shape"):
        network.bounds(Box(x[:, :3], x[:, :3]))


def test_bounds_pass_gradients_to_the_region_only_where_asked():
    net = mlp(4, 8, 3)
    x = torch.randn(2, 4)
    lower, _ = BoundedGraph(net, x).bounds(Box(x - 0.1, x + 0.1))
    assert not lower.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())
