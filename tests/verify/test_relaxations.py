"""Every relaxation is attacked with boxes of all kinds and any free parameters, and held against the convex hull."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.graph import ops
from corollary.graph.ops import Op, Slot, Torch
from corollary.verify.relaxations import Lines, Relaxation, prelu, register_function, register_relaxation, relaxation
from corollary.verify.relaxations.offset_rule import OffsetRule

INF = math.inf
SAMPLES = 41
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6}  # times 1 + |f|, as bounds promise


@dataclass(frozen=True)
class Case:
    op: Op
    catches: str
    least: float = -INF  # of the ends of boxes
    most: float = INF
    optimal: float = 1e-3  # default lines may miss the hull at the middle by this: it is sampled
    hull: float = 12.0  # boxes for the hull reach so far

    def __str__(self) -> str:
        return str(self.op)


CASES = [
    Case(ops.ReLU(), "lines of the wrong side of the kink"),
    Case(ops.LeakyReLU(0.1), "a chord computed in another precision"),
    Case(ops.LeakyReLU(2.0), "a slope above 1, concave"),
    Case(ops.LeakyReLU(-0.3), "a negative slope"),
    Case(ops.Abs(), "slope -1"),
    Case(ops.Clamp(-1, 2), "a convex and a concave kink in one box", optimal=0.03),
    Case(ops.Clamp(low=0.5), "only a lower end", optimal=0.02),
    Case(ops.Clamp(high=-3.0), "only an upper end", optimal=0.02),
    Case(ops.HardSigmoid(), "a scaled ramp", optimal=0.01),
    Case(ops.HardSigmoid(-0.4, 0.3), "a falling ramp swaps the lines", optimal=0.02),
    Case(ops.HardSigmoid(0.0, 0.3), "a constant"),
    Case(ops.Sign(), "jumps", optimal=0.05),
    Case(ops.Floor(), "several jumps", optimal=0.1),
    Case(ops.Sigmoid(), "offset of the mirrored line"),
    Case(ops.Tanh(), "chord compared with the slope at the wrong end"),
    Case(ops.Erf(), "tails below the smallest number"),
    Case(ops.Exp(), "overflow; tangents beyond 1 from the lower end", most=200.0, optimal=INF),
    Case(ops.Log(), "a slope without bound at zero", least=1e-6),
    Case(ops.Sqrt(), "an infinite slope at zero", least=0.0, optimal=0.01),
    Case(ops.Reciprocal(), "positive side", least=1e-4),
    Case(ops.Reciprocal(), "negative side", most=-1e-4),
    Case(ops.Power(2.0), "square"),
    Case(ops.Power(3.0), "concave, then convex", optimal=0.05),
    Case(ops.Power(4.0), "flat around zero", optimal=0.05),
    Case(ops.Power(5.0), "ratio of the contact", optimal=10.0),
    Case(ops.Power(1.0), "a line"),
    Case(ops.Power(0.0), "a constant"),
    Case(ops.Power(0.3), "a root", least=0.0, optimal=0.01),
    Case(ops.Power(1.5), "a convex root", least=0.0),
    Case(ops.Power(-0.5), "a root of the reciprocal", least=1e-3),
    Case(ops.Power(-2.0), "convex on both sides: positive", least=1e-2, optimal=INF),
    Case(ops.Power(-2.0), "convex on both sides: negative", most=-1e-2, optimal=INF),
    Case(ops.Power(-3.0), "concave left of zero", most=-1e-2, optimal=INF),
    Case(ops.Softplus(), "the step at the threshold"),
    Case(ops.Softplus(2.0, 1.0), "a large step", optimal=0.16),
    Case(ops.Sin(), "the wrong trough", hull=3.0),
    Case(ops.Cos(), "the wrong phase", hull=3.0),
    Case(ops.GELU(), "tangents left and right of the dip"),
    Case(ops.GELU("tanh"), "inflections of the other form"),
    Case(ops.SiLU(), "a heavier tail"),
    Case(ops.Mish(), "no symmetry"),
    Case(ops.HardSwish(), "kinks at the inflections", optimal=0.2),
    Case(ops.ELU(), "a line right of zero"),
    Case(ops.ELU(0.3), "a convex kink", optimal=0.25),
    Case(ops.ELU(1.6732632423543772, 1.0507009873554805), "a concave kink (SELU)", optimal=0.05),
    Case(ops.ELU(-0.7), "a negative alpha", optimal=0.6),
    Case(ops.ELU(2.0, 1.0, 3.0), "a scaled input, steep", optimal=0.1),
]


def boxes(case: Case, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Boxes of all sizes and places: tiny, huge, far out, one-sided, touching zero, of width zero."""
    generator = torch.Generator().manual_seed(1)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)

    lower = torch.sign(draw(-1, 1)) * 10 ** draw(-5, 3)
    upper = lower + 10 ** draw(-7, 3)
    kind = draw(0, 1)
    upper = torch.where(kind < 0.1, lower, upper)
    lower = torch.where((kind > 0.1) & (kind < 0.2), torch.minimum(torch.zeros(()), upper), lower)
    upper = torch.where((kind > 0.2) & (kind < 0.3), torch.maximum(torch.zeros(()), lower), upper)
    if case.least >= 0:
        lower, upper = case.least + lower.abs(), case.least + lower.abs() + (upper - lower)
        lower = torch.where(kind > 0.9, case.least, lower)
    elif case.most < 0:
        lower, upper = case.most - lower.abs() - (upper - lower), case.most - lower.abs()
    lower, upper = lower.clamp(case.least, case.most).to(dtype), upper.clamp(case.least, case.most).to(dtype)
    return torch.minimum(lower, upper), upper


def excess(lines: Lines, op: Op, lower: Tensor, upper: Tensor) -> Tensor:
    """By how much the function leaves its lines at samples of the boxes, relative to 1 + |f|, in float64."""
    low, high = lower.double(), upper.double()
    share = torch.linspace(0, 1, SAMPLES, dtype=torch.float64).reshape(-1, 1, *(1,) * lower.ndim)
    x = torch.minimum(torch.maximum(low + share * (high - low), low), high)
    value = op(x)
    below = lines.lower_slope.double() * x + offset(lines.lower_offset)
    above = lines.upper_slope.double() * x + offset(lines.upper_offset)
    return torch.maximum(below - value, value - above) / (1 + value.abs())


def offset(tensor: Tensor | None) -> Tensor:
    return torch.zeros((), dtype=torch.float64) if tensor is None else tensor.double()


def known(op: Op) -> Relaxation:
    found = relaxation(op)
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lines_hold_on_every_box_for_every_free_parameter(case: Case, dtype: torch.dtype):
    one = known(case.op)
    lower, upper = boxes(case, 1500, dtype)
    generator = torch.Generator().manual_seed(2)
    some = torch.rand(2, *lower.shape, generator=generator, dtype=dtype)
    for position in (None, some, torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)):
        free = (position if one.lower_free else None, position if one.upper_free else None)
        worst = excess(one.lines(lower, upper, *free), case.op, lower, upper)
        assert not worst.isnan().any()
        assert worst.max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_box_of_width_zero_gives_the_value(case: Case):
    x, _ = boxes(case, 300, torch.float64)
    x = x.clamp(max=20)
    lines = known(case.op).lines(x, x)
    value = case.op(x)
    size = 1 + value.abs() + x.abs() * lines.lower_slope.abs()  # the sum cancels where slopes are large
    step = 1e-8 if not (isinstance(case.op, ops.Softplus) and case.op.threshold < 20) else 0.16
    for slope, shift in ((lines.lower_slope, lines.lower_offset), (lines.upper_slope, lines.upper_offset)):
        assert ((slope * x + offset(shift) - value).abs() <= step * size).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_defaults_are_positions_and_give_the_lines_of_no_parameters(case: Case):
    one = known(case.op)
    lower, upper = boxes(case, 500, torch.float64)
    lower, upper = lower.clamp(max=50), upper.clamp(max=50)
    free = one.defaults(lower, upper)
    assert [part is not None for part in free] == [one.lower_free, one.upper_free]
    assert all(((part >= 0) & (part <= 1)).all() for part in free if part is not None)
    with_defaults, without = one.lines(lower, upper, *free), one.lines(lower, upper)
    torch.testing.assert_close(with_defaults.lower_slope, without.lower_slope, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(with_defaults.upper_slope, without.upper_slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_finite_and_infinite_ends_give_no_nan(case: Case):
    one = known(case.op)
    lower, upper = boxes(case, 300, torch.float64)
    lower, upper = lower.clamp(-50, 50), upper.clamp(-50, 50)
    far = torch.tensor([-INF, -INF, -1.0, 2.0, -INF], dtype=torch.float64)
    lower = torch.cat([lower, far]).requires_grad_()
    upper = torch.cat([upper, torch.tensor([INF, -1.0, INF, INF, 3.0], dtype=torch.float64)]).requires_grad_()
    position = torch.full((2, len(lower)), 0.3, dtype=torch.float64, requires_grad=True)
    for free in (None, position):
        lines = one.lines(lower, upper, free if one.lower_free else None, free if one.upper_free else None)
        parts = [part for part in vars(lines).values() if part is not None]
        assert not any(part.isnan().any() for part in parts)
        assert lines.lower_slope.isfinite().all()
        assert lines.upper_slope.isfinite().all()
        total = torch.stack([torch.where(part.isfinite(), part, 0.0).sum() for part in parts]).sum()
        for gradient in torch.autograd.grad(total, (lower, upper, position), allow_unused=True):
            assert gradient is None or gradient.isfinite().all()


def hull_below(op: Op, sign: int, lower: Tensor, upper: Tensor) -> Tensor:
    """The convex hull of sign f at the middle of each box: the lowest chord over it between samples on both sides."""
    middle, share = (lower + upper) / 2, torch.linspace(0, 1, 81, dtype=torch.float64)
    left, right = torch.lerp(lower, middle, share[:, None]), torch.lerp(middle, upper, share[:, None])
    at_left, at_right = sign * op(left), sign * op(right)
    weight = (middle - left[:, None]) / (right[None] - left[:, None]).clamp_min(1e-300)
    chords = torch.lerp(at_left[:, None].expand(weight.shape), at_right[None].expand(weight.shape), weight)
    chords[-1, 0] = sign * op(middle)
    return chords.flatten(0, 1).amin(0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_default_lines_are_as_tight_as_a_line_can_be(case: Case):
    """Area under a line is its height in the middle, and the convex hull is the height of the best line there."""
    generator = torch.Generator().manual_seed(3)
    reach = 12.0 - 1e-9
    ends = (torch.rand(2, 250, generator=generator, dtype=torch.float64) * 2 - 1) * reach
    lower, upper = ends.amin(0), ends.amax(0)
    lower, upper = lower.clamp(max(case.least, -reach), case.most), upper.clamp(max(case.least, -reach), case.most)
    upper = torch.minimum(upper, lower + 2 * case.hull)
    middle = (lower + upper) / 2
    lines = known(case.op).lines(lower, upper)
    below = lines.lower_slope * middle + offset(lines.lower_offset)
    above = lines.upper_slope * middle + offset(lines.upper_offset)
    assert (hull_below(case.op, 1, lower, upper) - below).max() <= case.optimal
    assert (above + hull_below(case.op, -1, lower, upper)).max() <= case.optimal


def test_every_free_slope_of_a_relu_is_reached():
    lower, upper = torch.tensor([-1.0]), torch.tensor([3.0])
    slopes = [float(known(ops.ReLU()).lines(lower, upper, torch.tensor([p])).lower_slope) for p in (0.0, 0.4, 1.0)]
    assert slopes == pytest.approx([0, 0.4, 1])
    lines = known(ops.ReLU()).lines(lower, upper)
    assert (float(lines.lower_slope), float(lines.upper_slope)) == (1, 0.75)
    assert float(lines.upper_offset) == pytest.approx(0.75, rel=1e-6)  # type: ignore[arg-type]


def test_tanh_compares_the_chord_with_the_slope_at_the_end_the_line_leaves():
    """On [-0.5, 3] the chord cuts below tanh only if it is flatter than tanh at -0.5, on [-3, 0.5] it never is."""
    lower, upper = torch.tensor([-0.5, -3.0]).double(), torch.tensor([3.0, 0.5]).double()
    lines = known(ops.Tanh()).lines(lower, upper)
    chord = (torch.tanh(upper) - torch.tanh(lower)) / (upper - lower)
    assert lines.lower_slope[0] == pytest.approx(float(chord[0]))
    assert lines.upper_slope[1] == pytest.approx(float(chord[1]))
    assert lines.lower_slope[1] < chord[1]


def test_the_tangent_of_exp_stays_positive_in_reach_of_its_lower_end():
    lower = torch.tensor([-3.0, 0.0, 2.0]).double()
    lines = known(ops.Exp()).lines(lower, lower + 20, torch.ones(3).double())
    assert (lines.lower_slope * lower + offset(lines.lower_offset) > 0).all()


def test_area_of_the_square_between_chord_and_middle_tangent():
    """(u - l)^3 / 4 on average height (u - l)^2 / 4: the closed form of the paper's example."""
    lower, upper = torch.tensor([-2.0, 0.5]).double(), torch.tensor([1.0, 4.0]).double()
    lines = known(ops.Power(2.0)).lines(lower, upper)
    middle = (lower + upper) / 2
    gap = (lines.upper_slope - lines.lower_slope) * middle + offset(lines.upper_offset) - offset(lines.lower_offset)
    torch.testing.assert_close(gap, (upper - lower) ** 2 / 4, rtol=1e-12, atol=1e-12)


def test_prelu_has_a_slope_for_each_channel():
    slope = torch.tensor([-0.5, 0.25, 1.0, 3.0]).double()[:, None]
    one = prelu(slope)
    lower, upper = -torch.rand(4, 50).double() * 3, torch.rand(4, 50).double() * 3
    x = torch.lerp(lower, upper, torch.rand(20, 4, 50).double())
    value = torch.where(x > 0, x, slope * x)
    assert one.lower_free
    assert one.upper_free
    for position in (None, torch.rand(4, 50).double()):
        lines = one.lines(lower, upper, position, position)
        assert (lines.lower_slope * x + offset(lines.lower_offset) <= value + 1e-12).all()
        assert (lines.upper_slope * x + offset(lines.upper_offset) >= value - 1e-12).all()


def test_free_parameters_broadcast_against_the_boxes():
    lower, upper = -torch.rand(3, 1, 5), torch.rand(3, 1, 5)
    lines = known(ops.Tanh()).lines(lower, upper, torch.rand(3, 4, 5), torch.rand(3, 4, 5))
    assert lines.lower_slope.shape == lines.upper_slope.shape == (3, 4, 5)


def test_sigmoid_in_float64_is_as_tight_as_bisection():
    """On [-2, u] the lower tangent at position 1 meets the sigmoid again at u."""
    upper = torch.tensor([0.5, 1.0, 2.0, 4.0]).double()
    lines = known(ops.Sigmoid()).lines(torch.full_like(upper, -6), upper, torch.ones(4).double())
    at_upper = lines.lower_slope * upper + offset(lines.lower_offset)
    torch.testing.assert_close(at_upper, torch.sigmoid(upper), rtol=0, atol=1e-5)  # the table's step, squared


@pytest.mark.parametrize("description", [{"pieces": (0.0,)}, {"second_derivative_bound": 1.3}], ids=str)
def test_a_registered_function_gets_sound_lines(description: dict):
    def twice(x: Tensor) -> Tensor:
        return 2 * torch.atan(x)

    register_function(twice, twice, lambda x: 2 / (1 + x * x), **description)
    op = Torch(twice, (Slot(0),))
    one = known(op)
    case = Case(op, "")
    lower, upper = boxes(case, 500, torch.float64)
    for position in (None, torch.rand(500).double(), torch.zeros(500).double(), torch.ones(500).double()):
        assert excess(one.lines(lower, upper, position, position), op, lower, upper).max() <= 1e-9
    lines = one.lines(torch.tensor([-1.0]).double(), torch.tensor([2.0]).double())
    gap = (lines.upper_slope - lines.lower_slope) * 0.5 + offset(lines.upper_offset) - offset(lines.lower_offset)
    assert float(gap) < 0.9  # against 3.8 of constants


def test_a_function_needs_exactly_one_description():
    with pytest.raises(BadInput, match="either `pieces`"):
        register_function(torch.atan, torch.atan, torch.cos)
    with pytest.raises(BadInput, match="op class or to the callable"):
        register_relaxation(3)


def test_an_op_without_lines_has_none():
    assert relaxation(ops.Softmax(1)) is None
    assert relaxation(Torch(torch.special.i0, (Slot(0),))) is None


def test_positions_of_the_offset_rule_span_the_derivatives():
    one = OffsetRule(lambda x: (x**3, 3 * x * x), (-INF, INF), (0.0,))
    lower, upper = torch.tensor([-1.0]).double(), torch.tensor([2.0]).double()
    slopes = [float(one.lines(lower, upper, torch.tensor([p]).double()).lower_slope) for p in (0.0, 1.0)]
    assert slopes == pytest.approx([0, 12])
