"""Cut points: the areas of the paper's example, tables against direct search, and what is kept on disk."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.graph import ops
from corollary.verify.branching_points import BranchingTable, area_between, branching_table, total_area
from corollary.verify.relaxations import Lines, Relaxation, relaxation
from corollary.verify.relaxations.contacts import Curve
from corollary.verify.relaxations.offset_rule import OffsetRule
from corollary.verify.relaxations.s_shaped import sigmoid_curve, tanh_curve
from corollary.verify.relaxations.smooth import gelu_curve


@dataclass(frozen=True, eq=False)
class ChordRule(Relaxation):
    """Both lines parallel to the chord: the relaxation that the claim's numbers were computed with."""

    curve: Curve
    pieces: tuple[float, ...]

    def lines(
        self, lower: Tensor, upper: Tensor, lower_free: Tensor | None = None, upper_free: Tensor | None = None
    ) -> Lines:
        rule = OffsetRule(self.curve, (-math.inf, math.inf), self.pieces)
        ends = torch.stack([lower, upper, *(torch.full_like(lower, p).clamp(lower, upper) for p in self.pieces)])
        slopes, values = self.curve(ends)[1], self.curve(ends)[0]
        least, most = slopes.amin(0), slopes.amax(0)
        chord = (values[1] - values[0]) / (upper - lower).clamp_min(1e-12)
        position = ((chord - least) / (most - least).clamp_min(1e-12)).clamp(0, 1)
        return rule.lines(lower, upper, position, position)


def pairs(step: float) -> tuple[Tensor, Tensor]:
    """Every box of positive width with ends on a grid of [-5, 5]."""
    grid = torch.linspace(-5, 5, round(10 / step) + 1, dtype=torch.float64)
    lower, upper = torch.meshgrid(grid, grid, indexing="ij")
    return lower[lower < upper], upper[lower < upper]


RATIOS: list[tuple[str, Curve, tuple[float, ...], float]] = [
    ("tanh", tanh_curve, (0.0,), 0.925),
    ("sigmoid", sigmoid_curve, (0.0,), 0.928),
    ("sin", lambda x: (torch.sin(x), torch.cos(x)), (-math.pi, 0.0, math.pi), 0.929),
    ("gelu", gelu_curve, (-math.sqrt(2), math.sqrt(2)), 0.61),
    ("exp", lambda x: (torch.exp(x), torch.exp(x)), (), 0.57),
    ("cube", lambda x: (x**3, 3 * x**2), (0.0,), 0.83),
    ("square", lambda x: (x**2, 2 * x), (), 1.0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "curve", "pieces", "ratio"), RATIOS, ids=[row[0] for row in RATIOS])
def test_best_cuts_leave_this_share_of_the_area_of_cuts_in_the_middle(
    name: str, curve: Curve, pieces: tuple[float, ...], ratio: float
):
    one = ChordRule(curve, pieces)
    lower, upper = pairs(0.25)

    def area(point: Tensor) -> Tensor:
        return total_area([one], lower, point) + total_area([one], point, upper)

    shares = torch.linspace(0, 1, 102, dtype=torch.float64)[1:-1]
    best = torch.stack([area(torch.lerp(lower, upper, share)) for share in shares]).amin(0)
    assert float(best.sum() / area((lower + upper) / 2).sum()) == pytest.approx(ratio, abs=0.02)


def test_area_of_the_square_under_chord_and_middle_tangent():
    lower, upper = torch.tensor([-2.0, 0.5]).double(), torch.tensor([1.0, 4.0]).double()
    square = relaxation(ops.Power(2.0))
    assert square is not None
    area = area_between(square.lines(lower, upper), lower, upper)
    torch.testing.assert_close(area, (upper - lower) ** 3 / 4, rtol=1e-12, atol=1e-12)


def table(*ops_: Any, **options: Any) -> BranchingTable:
    return BranchingTable.build([one for op in ops_ if (one := relaxation(op)) is not None], 0.25, **options)


@pytest.mark.parametrize("op", [ops.Sigmoid(), ops.Tanh(), ops.Sin(), ops.GELU(), ops.Exp(), ops.Power(3.0)], ids=str)
def test_a_table_is_never_worse_than_the_middle_and_as_good_as_a_direct_search(op: ops.Elementwise):
    one = relaxation(op)
    assert one is not None
    lower, upper = pairs(0.5)
    found = table(op).point(lower, upper)
    assert ((found > lower) & (found < upper)).all()
    best = total_area([one], lower, found) + total_area([one], found, upper)
    points = [torch.lerp(lower, upper, share) for share in torch.linspace(0, 1, 102, dtype=torch.float64)[1:-1]]
    others = torch.stack([total_area([one], lower, p) + total_area([one], p, upper) for p in points])
    middle = (lower + upper) / 2
    halves = total_area([one], lower, middle) + total_area([one], middle, upper)
    assert (best <= halves * (1 + 1e-9) + 1e-9).all()
    assert float(best.sum()) <= 1.01 * float(others.amin(0).sum())


def test_odd_functions_are_cut_at_zero_and_the_square_in_the_middle():
    """At zero under lines parallel to the chord, as the claim has it; under tighter lines other cuts are better."""
    ends = torch.tensor([0.5, 1.0, 2.0, 4.5]).double()
    tanh = BranchingTable.build([ChordRule(tanh_curve, (0.0,))], 0.25)
    sine = BranchingTable.build([ChordRule(*RATIOS[2][1:3])], 0.25)
    torch.testing.assert_close(tanh.point(-ends, ends), torch.zeros(4).double())
    torch.testing.assert_close(sine.point(-ends[:3], ends[:3]), torch.zeros(3).double())
    lower, upper = pairs(0.5)
    torch.testing.assert_close(table(ops.Power(2.0)).point(lower, upper), (lower + upper) / 2, rtol=0, atol=1e-6)


def test_relu_is_cut_at_its_kink_however_far_the_box_reaches():
    cut = table(ops.ReLU(), ops.LeakyReLU(0.1))
    lower, upper = torch.tensor([-1.0, -100.0, 1.0]), torch.tensor([3.0, 1.0, 3.0])
    assert cut.point(lower, upper).tolist() == [0, 0, 2]
    assert table(product=True).point(lower, upper).tolist() == [0, 0, 2]


def test_boxes_that_the_table_does_not_reach_are_cut_in_the_middle():
    lower, upper = torch.tensor([-9.0, 0.01, 4.0, 1.0]), torch.tensor([1.0, 0.02, 6.0, 1.0])
    torch.testing.assert_close(table(ops.GELU()).point(lower, upper), (lower + upper) / 2)


def test_a_product_draws_the_cut_to_the_middle_the_more_the_wider_its_other_factor_is():
    cut = table(ops.GELU(), product=True)
    lower, upper = torch.tensor([-3.0]), torch.tensor([4.0])
    off = [float((cut.point(lower, upper, torch.tensor([width])) - 0.5).abs()) for width in (0.25, 2.0, 8.0)]
    assert off[0] >= off[1] >= off[2]
    assert off[0] > off[2]


def test_tables_come_back_from_disk_and_damaged_ones_are_refused(tmp_path: Path):
    built = table(ops.Sigmoid())
    built.save(tmp_path / "table.safetensors")
    loaded = BranchingTable.load(tmp_path / "table.safetensors")
    lower, upper = pairs(0.5)
    assert torch.equal(loaded.point(lower, upper), built.point(lower, upper))
    (tmp_path / "broken").write_bytes(b"not a table")
    with pytest.raises(BadInput, match="not a table of branching points"):
        BranchingTable.load(tmp_path / "broken")


def test_tables_are_kept_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    branching_table.cache_clear()
    first = branching_table((ops.Tanh(),), step=0.5)
    (path,) = (tmp_path / "corollary" / "branching").iterdir()
    branching_table.cache_clear()
    assert torch.equal(branching_table((ops.Tanh(),), step=0.5).points, first.points)
    path.write_bytes(b"damaged")
    branching_table.cache_clear()
    assert torch.equal(branching_table((ops.Tanh(),), step=0.5).points, first.points)
    branching_table.cache_clear()


def test_a_step_that_does_not_divide_the_range_and_an_op_without_lines_are_refused():
    with pytest.raises(BadInput, match="divides its range"):
        BranchingTable.build([], 0.3, -5, 5)
    with pytest.raises(BadInput, match="no relaxation"):
        branching_table((ops.Softmax(1),))
