"""Properties as sets: margins by hand, the constructors by their counterexamples, rounding by containment."""

import math

import pytest
import torch

from corollary.base.errors import BadInput
from corollary.verify.sets import Ball, Box
from corollary.verify.specification import Case, Halfspaces, Specification, contains, rounded

F64 = torch.float64


def box(*ends: tuple[float, float]) -> Box:
    lower, upper = torch.tensor(ends, dtype=F64).T
    return Box(lower[None], upper[None])


def halfspaces(rows: list[list[float]], offset: list[float]) -> Halfspaces:
    return Halfspaces(torch.tensor(rows, dtype=F64).reshape(len(rows), -1), torch.tensor(offset, dtype=F64))


def two_disjuncts() -> Case:
    """Unsafe: (y0 <= 1 and y1 >= 2), or y0 - y1 <= -5."""
    return Case(
        box((0.0, 1.0), (0.0, 1.0)),
        (halfspaces([[1.0, 0.0], [0.0, -1.0]], [1.0, -2.0]), halfspaces([[1.0, -1.0]], [-5.0])),
    )


def test_margins_are_the_least_over_disjuncts_of_the_largest_row():
    case = two_disjuncts()
    y = torch.tensor([[0.0, 3.0], [2.0, 3.0], [3.0, 8.5], [1.0, 2.0], [4.0, 0.0]], dtype=F64)
    assert case.margins(y).tolist() == [-1.0, 1.0, -0.5, 0.0, 3.0]


def test_rows_of_all_disjuncts_are_stacked_with_their_index():
    case = two_disjuncts()
    assert case.rows.tolist() == [[1.0, 0.0], [0.0, -1.0], [1.0, -1.0]]
    assert case.offsets.tolist() == [1.0, -2.0, -5.0]
    assert case.disjunct.tolist() == [0, 0, 1]


def test_a_case_is_proved_when_every_disjunct_has_a_positive_row():
    case = two_disjuncts()
    lower = torch.tensor([[-1.0, 0.5, 0.1], [0.5, 0.5, 0.0], [-1.0, -1.0, 9.0], [1e-12, -1.0, 1.0]], dtype=F64)
    assert case.proved(lower).tolist() == [True, False, False, True]
    assert case.proved(lower, above=1e-9).tolist() == [True, False, False, False]


def test_a_disjunct_without_rows_holds_for_every_output_and_is_never_proved():
    everything = Halfspaces(torch.zeros(0, 2, dtype=F64), torch.zeros(0, dtype=F64))
    case = Case(box((0.0, 1.0)), (halfspaces([[1.0, 0.0]], [0.0]), everything))
    assert case.margins(torch.ones(1, 2, dtype=F64)).tolist() == [-math.inf]
    assert not case.proved(torch.ones(1, dtype=F64))
    assert Specification((case,)).violated(torch.tensor([0.5]), torch.tensor([9.0, 9.0]))


def test_violated_needs_the_point_in_the_region_and_its_output_unsafe_boundaries_included():
    specification = Specification((two_disjuncts(),))
    unsafe, safe = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.0])
    inside, outside = torch.tensor([1.0, 0.0]), torch.tensor([math.nextafter(1.0, 2.0), 0.0], dtype=F64)
    assert specification.violated(inside, unsafe)
    assert not specification.violated(inside, safe)
    assert specification.violated(inside, safe, tolerance=0.5)
    assert not specification.violated(outside, unsafe, tolerance=0.5)
    assert not specification.violated(inside, torch.tensor([math.nan, 2.0]))


def test_each_case_has_its_own_region_and_unsafe_set():
    low = Case(box((0.0, 1.0)), (halfspaces([[1.0]], [0.0]),))
    high = Case(box((2.0, 3.0)), (halfspaces([[-1.0]], [0.0]),))
    specification = Specification((low, high))
    found = [specification.violated(torch.tensor([x]), torch.tensor([y])) for x in (0.5, 2.5) for y in (-1.0, 1.0)]
    assert found == [True, False, False, True]


@pytest.mark.parametrize("norm", [1.0, 2.0, 3.0, math.inf])
def test_robustness_is_violated_just_where_another_class_is_as_high(norm: float):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 2, 3, generator=generator, dtype=F64)
    specification = Specification.robustness(x, 0.3, 1, 4, norm=norm)
    for _ in range(200):
        y = torch.randint(0, 3, (4,), generator=generator).double()
        near = x + 0.3 * (2 * torch.rand(x.shape, generator=generator, dtype=F64) - 1)
        inside = float(torch.linalg.vector_norm((near - x).flatten(), norm)) <= 0.3
        wrong = float(torch.cat([y[:1], y[2:]]).max()) >= float(y[1])
        assert specification.violated(near, y) == (inside and wrong)


def test_robustness_cuts_a_box_to_the_range_of_the_data():
    x = torch.tensor([[0.05, 0.5, 0.98]])
    region = Specification.robustness(x, 0.1, 0, 2, clip=(0, 1)).cases[0].region
    assert isinstance(region, Box)
    torch.testing.assert_close(region.lower, torch.tensor([[0.0, 0.4, 0.88]]))
    torch.testing.assert_close(region.upper, torch.tensor([[0.15, 0.6, 1.0]]))


def test_output_bounds_are_violated_at_and_beyond_the_ends():
    bounds = torch.tensor([-1.0, -math.inf]), torch.tensor([1.0, 2.0])
    specification = Specification.output_bounds(box((0.0, 1.0)), *bounds)
    x = torch.tensor([0.5])
    outputs = [(0.0, 0.0), (-1.0, 0.0), (1.0, 0.0), (0.0, -99.0), (0.0, 2.0), (0.0, 1.9)]
    assert [specification.violated(x, torch.tensor(y)) for y in outputs] == [False, True, True, False, True, False]


def test_output_bounds_of_several_samples_are_several_cases():
    several = Box(torch.zeros(3, 2), torch.ones(3, 2))
    assert len(Specification.output_bounds(several, upper=torch.ones(1)).cases) == 3


def test_reshape_keeps_the_order_of_entries():
    specification = Specification((Case(box(*((float(i), i + 1.0) for i in range(6))), (halfspaces([[1.0]], [0.0]),)),))
    shaped = specification.reshape((1, 2, 3))
    assert shaped.input_shape == (1, 2, 3)
    x = torch.arange(6.0) + 0.5
    assert shaped.violated(x.reshape(1, 1, 2, 3), torch.zeros(1, 1))
    assert not shaped.violated(x.flip(0).reshape(1, 1, 2, 3), torch.zeros(1, 1))


@pytest.mark.parametrize("norm", [1.0, 2.0, math.inf, None])
def test_the_enclosing_specification_contains_regions_and_unsafe_sets(norm: float | None):
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        center = torch.randn(1, 7, generator=generator, dtype=F64)
        region = Box(center, center + 1e-9) if norm is None else Ball(center, 1e-8, norm)
        offset = torch.randn(1, generator=generator, dtype=F64)
        specification = Specification((Case(region, (Halfspaces(torch.ones(1, 1, dtype=F64), offset),)),))
        wide = specification.enclosing(torch.float32).cases[0]
        assert wide.rows.dtype == torch.float32
        assert wide.offsets.double() >= offset
        if isinstance(region, Box):
            points = [region.lower, region.upper]
        else:
            direction = torch.randn(1, 7, generator=generator, dtype=F64)
            length = torch.linalg.vector_norm(direction, region.norm)
            points = [center + direction / length * 0.999999e-8]
        assert all(contains(wide.region, point) for point in points)


def test_rounding_is_directed_and_keeps_what_fits():
    values = torch.tensor([0.1, 0.5, -0.1, 1e30], dtype=F64)
    up, down = rounded(values, torch.float32, up=True), rounded(values, torch.float32, up=False)
    assert bool((down.double() <= values).all())
    assert bool((values <= up.double()).all())
    assert float(up[1]) == float(down[1]) == 0.5
    torch.testing.assert_close(torch.nextafter(down[0], up[0]), up[0], rtol=0, atol=0)


def test_what_does_not_fit_is_refused_in_words():
    good = halfspaces([[1.0]], [0.0])
    with pytest.raises(BadInput, match=r"2 are given: make a case of each"):
        Case(Box(torch.zeros(2, 1), torch.ones(2, 1)), (good,))
    with pytest.raises(BadInput, match=r"one or more unsafe sets on outputs of one length, got lengths \[1, 2\]"):
        Case(box((0.0, 1.0)), (good, halfspaces([[1.0, 0.0]], [0.0])))
    with pytest.raises(BadInput, match="finite coefficients"):
        halfspaces([[math.inf]], [0.0])
    with pytest.raises(BadInput, match=r"matrix \(row, output\) and an offset"):
        Halfspaces(torch.zeros(2, 1), torch.zeros(3))
    with pytest.raises(BadInput, match="no case"):
        Specification(())
    specification = Specification((Case(box((0.0, 1.0)), (good,)),))
    with pytest.raises(BadInput, match=r"about 1 inputs and 1 outputs of one sample, got shapes \(2,\) and \(1,\)"):
        specification.violated(torch.zeros(2), torch.zeros(1))
    with pytest.raises(BadInput, match=r"has 1 inputs, .* holds 6: do network and property belong together"):
        specification.reshape((2, 3))
    with pytest.raises(BadInput, match="got 3 of 3"):
        Specification.robustness(torch.zeros(1, 2), 0.1, 3, 3)
    with pytest.raises(BadInput, match="is no ball: leave clip out"):
        Specification.robustness(torch.zeros(1, 2), 0.1, 0, 2, norm=2.0, clip=(0, 1))
    with pytest.raises(BadInput, match="leaves the range"):
        Specification.robustness(torch.full((1, 2), 99.0), 0.1, 0, 2, clip=(0, 1))
    with pytest.raises(BadInput, match="no output is bounded"):
        Specification.output_bounds(box((0.0, 1.0)), torch.tensor([-math.inf]))
    tenth = Specification((Case(box((0.0, 1.0)), (halfspaces([[0.1]], [0.0]),)),))
    with pytest.raises(BadInput, match=r"cannot hold: use torch\.float64"):
        tenth.enclosing(torch.float32)
