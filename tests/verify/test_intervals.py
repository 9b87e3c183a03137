"""Interval bounds: every sample inside, exact where the arithmetic is, values where the box is a point."""

import math

import pytest
import torch
from torch import Tensor, nn

from cases import NETS, Case, captured, tensors_of
from corollary.base.errors import BadInput, NoRule
from corollary.graph import Node, capture, values
from corollary.graph import ops as O
from corollary.graph.support import support_table
from corollary.verify.intervals import Interval, apply_interval, bilinear, propagate
from corollary.verify.intervals.joint import sum_of_others

BOXED = [case for case in NETS if case.integers is None and case.name != "foreign"]


def spread(inputs: tuple[Tensor, ...], radius: float) -> list[Interval]:
    return [Interval(x - radius * (1 + x.sin()), x + radius * (1 + x.cos())) for x in inputs]


def drawn_from(boxes: list[Interval], generator: torch.Generator) -> tuple[Tensor, ...]:
    """A point of every box; half of them corners."""
    found = []
    for box in boxes:
        share = torch.rand(box.shape, generator=generator, dtype=torch.float64).to(box.dtype)
        share[::2] = share[::2].round()
        found.append((box.lower + share * (box.upper - box.lower)).clamp(box.lower, box.upper))
    return tuple(found)


def outside(box: Interval, x: Tensor) -> float:
    """How far values lie outside, relative to the size of the ends."""
    if not box.dtype.is_floating_point:
        return float(((x < box.lower) | (x > box.upper)).any())
    size = torch.maximum(box.lower.abs(), box.upper.abs()).nan_to_num(posinf=1.0)
    gap = torch.where((box.lower <= x) & (x <= box.upper), 0, torch.maximum(box.lower - x, x - box.upper) / (1 + size))
    return float(gap.max()) if gap.numel() else 0.0


def check_sound(case: Case, radius: float, dtype: torch.dtype, tolerance: float, count: int = 400) -> None:
    graph = captured(case)[1]
    boxes = spread(tuple(x.to(dtype) for x in tensors_of(case.inputs(2))), radius)
    boxes = [Interval(*(torch.cat([end] * count) for end in (box.lower, box.upper))) for box in boxes]
    bounds = propagate(graph, boxes, keep=graph.nodes)
    points = tuple(x.double() for x in drawn_from(boxes, torch.Generator().manual_seed(5)))
    for node, x in values(graph, points, graph.nodes).items():
        box = bounds[node]
        if isinstance(box, Interval):
            assert not box.lower.isnan().any(), node
            assert not box.upper.isnan().any(), node
            assert outside(box, x) <= tolerance, node


@pytest.mark.parametrize("case", BOXED, ids=str)
@pytest.mark.parametrize("radius", [0.05, 1.0])
def test_every_value_of_every_sample_is_inside(case: Case, radius: float):
    check_sound(case, radius, torch.float64, 1e-9)


@pytest.mark.parametrize("case", BOXED, ids=str)
def test_single_precision_holds_to_its_rounding(case: Case):
    check_sound(case, 0.1, torch.float32, 1e-5)


@pytest.mark.parametrize("case", BOXED, ids=str)
def test_a_box_of_no_width_gives_the_value(case: Case):
    graph = captured(case)[1]
    inputs = tensors_of(case.inputs(3))
    bounds = propagate(graph, [Interval(x, x) for x in inputs])
    for node, x in values(graph, inputs, ()).items():
        box = bounds[node]
        assert isinstance(box, Interval)
        torch.testing.assert_close(box.lower, x, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(box.upper, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", BOXED, ids=str)
def test_gradients_by_parameters_and_ends_are_finite(case: Case):
    graph = captured(case)[1]
    stored = {
        name: tensor.detach().clone().requires_grad_(tensor.is_floating_point())
        for name, tensor in graph.tensors.items()
    }
    ends = [Interval((x - 0.05).requires_grad_(), (x + 0.05).requires_grad_()) for x in tensors_of(case.inputs(2))]
    bounds = propagate(graph, ends, stored=stored)
    width = sum((box.upper - box.lower).clamp(max=1e6).sum() for box in bounds.values() if isinstance(box, Interval))
    assert isinstance(width, Tensor)
    width.backward()
    moved = [tensor.grad for tensor in stored.values() if tensor.grad is not None]
    moved += [end.grad for box in ends for end in (box.lower, box.upper) if end.grad is not None]
    assert moved
    assert all(grad.isfinite().all() for grad in moved)
    assert any(grad.any() for grad in moved)


def test_affine_chains_carry_centre_and_radius():
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    x, radius = torch.randn(5, 4, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
    graph = capture(net, x)
    box = propagate(graph, [Interval(x - radius, x + radius)])[graph.outputs[0]]
    assert isinstance(box, Interval)
    first, second = (layer.weight.detach().abs() for layer in (net[0], net[1]))
    torch.testing.assert_close(box.center, net(x).detach())
    torch.testing.assert_close(box.radius, radius @ first.T @ second.T)


def test_one_convolution_is_reached_at_its_corners():
    net = nn.Conv2d(1, 2, 3, padding=1, stride=2).double()
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    graph = capture(net, torch.cat([x, x]))
    box = propagate(graph, [Interval(x - 0.3, x + 0.3)])[graph.outputs[0]]
    assert isinstance(box, Interval)
    for entry in range(8):
        point = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(point).flatten()[entry], point)
        with torch.no_grad():
            for end, side in ((box.lower, -1), (box.upper, 1)):
                reached = net(x + side * 0.3 * slope.sign()).flatten()[entry]
                torch.testing.assert_close(end.flatten()[entry], reached)


def bounds_of(op: O.Op, *values: Interval | Tensor) -> Interval:
    return apply_interval(Node("n", op, (), (), torch.float64), op, values)


def box_of(*shape: int, seed: int, low: float = -2.0, high: float = 2.0) -> Interval:
    generator = torch.Generator().manual_seed(seed)
    ends = low + (high - low) * torch.rand((2, *shape), generator=generator, dtype=torch.float64)
    return Interval(ends.amin(0), ends.amax(0))


ELEMENTWISE: tuple[tuple[O.Op, float, float], ...] = (
    (O.ReLU(), -3, 3),
    (O.LeakyReLU(0.1), -3, 3),
    (O.LeakyReLU(-0.5), -3, 3),
    (O.Clamp(-0.5, 1), -3, 3),
    (O.Abs(), -3, 3),
    (O.HardSigmoid(), -5, 5),
    (O.HardSigmoid(-0.3, 0.1), -5, 5),
    (O.HardSwish(), -5, 5),
    (O.ELU(0.7, 1.1, 0.8), -3, 3),
    (O.ELU(-0.7), -3, 3),
    (O.GELU(), -4, 4),
    (O.GELU("tanh"), -4, 4),
    (O.SiLU(), -6, 6),
    (O.Mish(), -6, 6),
    (O.Sigmoid(), -5, 5),
    (O.Tanh(), -3, 3),
    (O.Erf(), -3, 3),
    (O.Sin(), -8, 8),
    (O.Cos(), -8, 8),
    (O.Exp(), -4, 3),
    (O.Log(), 0.05, 5),
    (O.Sqrt(), 0, 5),
    (O.Reciprocal(), 0.2, 5),
    (O.Reciprocal(), -5, -0.2),
    (O.Power(2.0), -3, 3),
    (O.Power(3.0), -3, 3),
    (O.Power(0.5), 0, 4),
    (O.Power(-2.0), 0.3, 3),
    (O.Power(-3.0), -3, -0.3),
    (O.Power(-0.5), 0.3, 3),
    (O.Softplus(2.0), -3, 3),
    (O.Softplus(1.0, 1.0), -3, 3),
    (O.Sign(), -1, 1),
    (O.Floor(), -3, 3),
    (O.Negate(), -3, 3),
)


@pytest.mark.parametrize(("op", "low", "high"), ELEMENTWISE, ids=str)
def test_elementwise_ends_are_the_extremes(op: O.Op, low: float, high: float):
    box = box_of(300, seed=1, low=low, high=high)
    found = bounds_of(op, box)
    share = torch.linspace(0, 1, 4001, dtype=torch.float64)[:, None]
    reached = op(box.lower + share * (box.upper - box.lower))
    assert outside(found, reached.amin(0)) <= 1e-12
    assert outside(found, reached.amax(0)) <= 1e-12
    # A grid misses a smooth extreme by the square of its step, the step of Softplus and a kink by the step itself.
    assert float((reached.amin(0) - found.lower).max()) <= 2e-3
    assert float((found.upper - reached.amax(0)).max()) <= 2e-3


def test_reciprocal_has_no_bound_across_zero_and_one_at_zero():
    box = Interval(torch.tensor([-1.0, 0.0, -4.0, 0.0]), torch.tensor([2.0, 2.0, 0.0, 0.0]))
    found = bounds_of(O.Reciprocal(), box)
    assert found.lower.tolist() == [-math.inf, 0.5, -math.inf, -math.inf]
    assert found.upper.tolist() == [math.inf, math.inf, -0.25, math.inf]


def test_outside_its_domain_nothing_is_known_of_a_root():
    box = Interval(torch.tensor([-4.0, -1.0, -2.0]), torch.tensor([-1.0, 4.0, 0.0]))
    found = bounds_of(O.Sqrt(), box)
    assert found.lower.tolist() == [0.0, 0.0, 0.0]  # the range of the op
    assert found.upper.tolist() == [math.inf, 2.0, 0.0]


def corners(box: Interval) -> Tensor:
    """All corners of a box, (corner, *shape)."""
    n = box.lower.numel()
    picks = (torch.arange(2**n)[:, None] >> torch.arange(n)) & 1
    return torch.where(picks.reshape(-1, *box.shape) == 1, box.upper, box.lower)


@pytest.mark.parametrize("op", [O.Softmax(-1), O.LogSoftmax(-1), O.LogSumExp((-1,)), O.Norm((-1,))], ids=str)
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_softmax_and_its_like_are_exact(op: O.Op, scale: float):
    for seed in range(20):
        low = 0.0 if isinstance(op, O.Norm) else -2.0  # the norm's smallest point is a corner on one side only
        box = box_of(5, seed=seed, low=low * scale, high=2 * scale)
        found, reached = bounds_of(op, box), op(corners(box))
        torch.testing.assert_close(found.lower, reached.amin(0), rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(found.upper, reached.amax(0), rtol=1e-9, atol=1e-14)


def test_softmax_of_far_entries_stays_sound():
    box = Interval(torch.tensor([-60.0, -50.0, -1e4]), torch.tensor([0.0, -50.0, 1e-3]))
    found = bounds_of(O.Softmax(0), box)
    assert found.lower[0] == pytest.approx(1 / (1 + math.exp(10) + math.exp(60 + 1e-3)), rel=1e-4)
    assert float(found.upper[1]) == pytest.approx(1 / (1 + math.exp(-10)), rel=1e-5)
    assert bounds_of(O.Softmax(0), Interval(torch.zeros(1), torch.ones(1))).lower.tolist() == [1.0]


def test_sums_of_others_do_not_cancel():
    x = torch.tensor([1e20, 1.0, 2.0, 0.5], dtype=torch.float64)
    assert sum_of_others(x, 0)[0] == 3.5
    y = torch.rand(3, 7, dtype=torch.float64)
    torch.testing.assert_close(sum_of_others(y, 1), y.sum(1, keepdim=True) - y)


PRODUCTS = (
    (O.MatMul(), ((2, 3, 2), (2, 2, 2))),
    (O.MatMul(), ((3,), (3, 2))),
    (O.MatMul(), ((2, 3), (3,))),
    (O.MatMul(), ((3,), (3,))),
    (O.Linear(), ((2, 3), (2, 3))),
    (O.Einsum("bik,bjk->bji"), ((1, 2, 2), (1, 2, 2))),
    (O.Einsum("ij,j->ij"), ((2, 3), (3,))),
    (O.Convolution((1,), (0,), (1,)), ((1, 2, 3), (1, 2, 2))),
)


@pytest.mark.parametrize(("op", "shapes"), PRODUCTS, ids=str)
@pytest.mark.parametrize("limit", [0, 2**21])
@pytest.mark.parametrize("positive", [False, True])
def test_products_of_two_unknowns(op: O.Op, shapes, limit: int, positive: bool, monkeypatch):
    monkeypatch.setattr(bilinear, "CORNER_LIMIT", limit)
    a = box_of(*shapes[0], seed=1, low=0.0 if positive else -2.0)
    b = box_of(*shapes[1], seed=2)
    found = bounds_of(op, a, b)
    reached = torch.stack([torch.vmap(op, (None, 0))(corner, corners(b)) for corner in corners(a)[::7]]).flatten(0, 1)
    assert outside(found, reached) <= 1e-12
    exact = bilinear_reference(op, a, b)
    assert float((found.lower - exact.lower).max()) <= 1e-12
    assert float((exact.upper - found.upper).max()) <= 1e-12
    if positive or (limit and not isinstance(op, O.Convolution)):
        torch.testing.assert_close(found.lower, exact.lower)
        torch.testing.assert_close(found.upper, exact.upper)
    else:
        assert float(((found.upper - found.lower) / (exact.upper - exact.lower)).max()) <= 1.5 + 1e-9


def bilinear_reference(op: O.Op, a: Interval, b: Interval) -> Interval:
    """Entry by entry: the coefficient of a_i b_j in each output, times the extremes of the scalar product."""
    basis = [torch.eye(x.lower.numel(), dtype=torch.float64).reshape(-1, *x.shape) for x in (a, b)]
    table = torch.vmap(torch.vmap(op, (None, 0)), (0, None))(*basis)
    ends = torch.stack([torch.outer(x.flatten(), y.flatten()) for x in (a.lower, a.upper) for y in (b.lower, b.upper)])
    return Interval(*(torch.einsum("ij...,ij->...", table, end) for end in (ends.amin(0), ends.amax(0))))


JOINT = (
    (O.Subtract(), ((3, 4), (4,))),
    (O.Multiply(), ((3, 4), (3, 1))),
    (O.Maximum(), ((3, 4), (4,))),
    (O.Minimum(), ((3, 4), (4,))),
    (O.Max((1,)), ((3, 4),)),
    (O.Min((0,), True), ((3, 4),)),
    (O.Sort(1, True), ((3, 4),)),
    (O.CumulativeSum(1), ((3, 4),)),
    (O.PReLU(), ((2, 3, 2), (3,))),
    (O.LayerNorm((4,)), ((3, 4), (4,), (4,))),
    (O.LayerNorm((2, 4)), ((3, 2, 4),)),
    (O.LayerNorm((1,)), ((3, 1),)),
    (O.GroupNorm(2), ((2, 4, 3), (4,), (4,))),
    (O.BatchNorm(), ((2, 3, 4), (3,), (3,), (3,), (3,))),
    (O.Attention(), ((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 3))),
    (O.Attention(scale=0.7), ((2, 3, 4), (2, 5, 4), (2, 5, 3), (3, 5))),
    (O.Attention(causal=True), ((2, 5, 4), (2, 5, 4), (2, 5, 3))),
    (O.Linear(), ((2, 3), (4, 3), (4,))),
    (O.Convolution(), ((1, 2, 4, 4), (3, 2, 2, 2), (3,))),
    (O.ConvolutionTransposed(), ((1, 2, 4, 4), (2, 3, 2, 2), (3,))),
    (O.Einsum("ij,jk,k->i"), ((3, 2), (2, 4), (4,))),
    (O.Upsample((5, 7), "bicubic"), ((1, 2, 3, 4),)),
    (O.Upsample((5, 7), "bicubic", True), ((1, 2, 3, 4),)),
    (O.Upsample((5, 7), "bilinear"), ((1, 2, 3, 4),)),
    (O.MaxPool((2, 2), (1, 1), (1, 1), (1, 1)), ((1, 2, 4, 4),)),
    (O.AdaptiveMaxPool((2, 3)), ((1, 2, 5, 5),)),
    (O.ArgMax(1), ((3, 4),)),
    (O.Compare("<"), ((3, 4), (4,))),
    (O.Compare(">="), ((3, 4), (4,))),
    (O.Compare("!="), ((3, 4), (4,))),
    (O.Concatenate(0), ((3, 4), (1, 4))),
    (O.Cast(torch.bool), ((3, 4),)),
    (O.Cast(torch.int64), ((3, 4),)),
)


@pytest.mark.parametrize(("op", "shapes"), JOINT, ids=str)
@pytest.mark.parametrize("known", [(), (0,), (1, 2, 3, 4)], ids=["all", "first-known", "rest-known"])
def test_ops_of_several_entries_hold_their_samples(op: O.Op, shapes, known: tuple[int, ...]):
    if len(shapes) == 1 and known:
        known = ()
    boxes = [box_of(*shape, seed=i) for i, shape in enumerate(shapes)]
    if isinstance(op, O.BatchNorm):
        boxes[2] = box_of(*shapes[2], seed=2, low=0.3)
    found = bounds_of(op, *(box.lower if i in known else box for i, box in enumerate(boxes)))
    generator = torch.Generator().manual_seed(9)
    for draw in range(300):
        x = [b.lower + torch.rand(b.shape, generator=generator, dtype=torch.float64).round(decimals=draw % 2 * 8)
             * (b.upper - b.lower) for b in boxes]  # fmt: skip
        reached = op(*(box.lower if i in known else x[i] for i, box in enumerate(boxes)))
        assert outside(found, reached) <= 1e-9
    points = bounds_of(op, *(Interval(box.lower, box.lower) for box in boxes))
    torch.testing.assert_close(points.lower, op(*(box.lower for box in boxes)))
    torch.testing.assert_close(points.upper, op(*(box.lower for box in boxes)))


@pytest.mark.parametrize(("op", "shapes"), [*JOINT, *((op, ((3, 4),)) for op, _, _ in ELEMENTWISE)], ids=str)
def test_infinite_and_huge_ends_never_give_nan(op: O.Op, shapes):
    for lowest, highest in ((-math.inf, math.inf), (0.0, math.inf), (-math.inf, -1.0), (-1e308, 1e308), (1e300, 1e308)):
        boxes = [box_of(*shape, seed=i) for i, shape in enumerate(shapes)]
        boxes[0].lower.flatten()[::2], boxes[0].upper.flatten()[::2] = lowest, highest
        found = bounds_of(op, *boxes)
        if found.dtype.is_floating_point:
            assert not found.lower.isnan().any()
            assert not found.upper.isnan().any()
            assert bool((found.lower <= found.upper).all())


def test_normalised_values_are_tighter_than_their_parts():
    box = box_of(50, 8, seed=3)
    deviation = bounds_of(O.Subtract(), box, bounds_of(O.Mean((1,), True), box))
    spread = bounds_of(O.Sqrt(), bounds_of(O.Mean((1,), True), bounds_of(O.Power(2.0), deviation)))
    parts = bounds_of(O.Divide(), deviation, spread)
    whole = bounds_of(O.LayerNorm((8,)), box)
    assert bool((whole.lower >= parts.lower - 1e-9).all())
    assert bool((whole.upper <= parts.upper + 1e-9).all())
    assert float(whole.upper.max()) <= math.sqrt(7)


def test_a_value_times_itself_is_a_square():
    box = Interval(torch.tensor([-1.0, 1.0]), torch.tensor([2.0, 3.0]))
    found = bounds_of(O.Multiply(), box, box)
    assert found.lower.tolist() == [0.0, 1.0]
    assert found.upper.tolist() == [4.0, 9.0]


def test_choices_take_both_sides_where_the_condition_is_open():
    condition = Interval(torch.tensor([True, False, False]), torch.tensor([True, True, False]))
    a, b = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([5.0, 5.0, 5.0])
    found = bounds_of(O.Where(), condition, a, b)
    assert found.lower.tolist() == [1.0, 1.0, 5.0]
    assert found.upper.tolist() == [1.0, 5.0, 5.0]
    compared = bounds_of(O.Compare("=="), Interval(a, a + torch.tensor([0.0, 1.0, 1.0])), torch.tensor([1.0, 1.5, 3.0]))
    assert compared.lower.tolist() == [True, False, False]
    assert compared.upper.tolist() == [True, True, False]


def test_every_op_of_the_vocabulary_has_an_interval():
    table = support_table()
    column = table.meanings.index("interval")
    missing = {name for name, cells in table.rows if cells[column] == "none"}
    assert missing == {"Item", "Torch"}


def test_an_unknown_operator_is_refused_by_name():
    case = next(case for case in NETS if case.name == "foreign")
    graph, x = captured(case)[1], case.inputs(2)
    assert isinstance(x, Tensor)
    with pytest.raises(NoRule, match=r"interval meaning has no rule for Torch\(.*node"):
        propagate(graph, [Interval(x, x)])
    with pytest.raises(BadInput, match="at least one input that is an Interval"):
        propagate(graph, [x])
    with pytest.raises(NoRule, match="Gather by indices that depend on the input"):
        bounds_of(O.Gather(), torch.eye(3), Interval(torch.tensor([0]), torch.tensor([2])))


def test_known_inputs_and_constants_follow_the_dtype_of_the_box():
    case = next(case for case in NETS if case.name == "einsum")
    graph = captured(case)[1]
    x, y = tensors_of(case.inputs(2))
    box = propagate(graph, [Interval(x.float() - 0.1, x.float() + 0.1), y])[graph.outputs[0]]
    assert isinstance(box, Interval)
    assert box.dtype == torch.float32
