"""Planes of products, maxima and softmax against samples of the boxes they hold on."""

import pytest
import torch
from torch import Tensor

from corollary.graph import ops
from corollary.verify.log_odds import LogOdds
from corollary.verify.relaxations import largest_lines, odds_lines, product_lines


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_planes_hold_the_product(dtype: torch.dtype):
    center, radius = (draw(2, 400) - 0.5) * 10 ** (4 * draw(2, 400, seed=1) - 2), 10 ** (4 * draw(2, 400, seed=2) - 2)
    radius[:, :20] = 0
    lower, upper = (center - radius).to(dtype), (center + radius).to(dtype)
    ends = (lower[0], upper[0], lower[1], upper[1])
    for free in ((None, None), tuple(draw(2, 400, seed=3).to(dtype)), (torch.zeros(400, dtype=dtype),) * 2):
        lines = product_lines(*ends, *free)
        a, b = torch.lerp(lower.double(), upper.double(), draw(300, 2, 400, seed=4).round(decimals=1)).unbind(1)
        below = lines.lower_slope_a.double() * a + lines.lower_slope_b.double() * b + lines.lower_offset.double()
        above = lines.upper_slope_a.double() * a + lines.upper_slope_b.double() * b + lines.upper_offset.double()
        slack = (1e-9 if dtype == torch.float64 else 1e-6) * (1 + (a * b).abs())
        assert (below <= a * b + slack).all()
        assert (above >= a * b - slack).all()


def test_half_and_half_bounds_the_product_of_unit_intervals_by_one():
    """On [-1, 1]^2 one plane alone gives -3, the mean of both exactly -1."""
    low, high = -torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)

    def least(share: float | None) -> float:
        free = None if share is None else torch.full((1,), share, dtype=torch.float64)
        lines = product_lines(low, high, low, high, free)
        return float(lines.lower_offset - lines.lower_slope_a.abs() - lines.lower_slope_b.abs())

    assert least(1.0) == pytest.approx(-3, abs=1e-12)
    assert least(None) == pytest.approx(-1, abs=1e-12)


def test_a_product_with_an_infinite_end_gets_constants():
    inf = torch.inf
    lower_a, upper_a = torch.tensor([1.0, 0.0, -inf]), torch.tensor([inf, 0.0, inf])
    lower_b, upper_b = torch.tensor([2.0, -inf, -1.0]), torch.tensor([3.0, inf, 1.0])
    lines = product_lines(lower_a, upper_a, lower_b, upper_b)
    assert lines.lower_offset.tolist() == [2, 0, -inf]
    assert lines.upper_offset.tolist() == [inf, 0, inf]
    assert not any(part.isnan().any() for part in vars(lines).values())


POOLS = [
    (ops.MaxPool((2, 2), (2, 2), (0, 0), (1, 1)), (3, 6, 6)),
    (ops.MaxPool((3, 2), (2, 1), (1, 1), (1, 2), True), (2, 7, 6)),
    (ops.MaxPool((3,), (2,), (1,), (1,)), (4, 9)),
    (ops.MaxPool((2, 2, 2), (1, 2, 2), (0, 1, 0), (1, 1, 1)), (2, 3, 4, 5)),
    (ops.AdaptiveMaxPool((2, 3)), (2, 7, 5)),
    (ops.Max((1,)), (4, 5)),
    (ops.Max((2, 3), True), (4, 5, 3)),
    (ops.Max((-1,)), (7, 3)),
]


@pytest.mark.parametrize(("op", "shape"), POOLS, ids=str)
def test_the_selected_entry_is_below_the_largest_and_equals_it_where_it_leads(
    op: ops.MaxPool | ops.AdaptiveMaxPool | ops.Max, shape: tuple[int, ...]
):
    center, radius = draw(4, *shape) * 2, draw(4, *shape, seed=1) / 2
    lines = largest_lines(op, center - radius, center + radius)
    assert 0 < lines.upper_is_selected.double().mean() < 1
    for seed in range(20):
        x = center + (2 * draw(4, *shape, seed=seed + 2).round() - 1) * radius
        value = op(x)
        selected = x.flatten(1).gather(1, lines.selected.flatten(1)).reshape(value.shape)
        assert (selected <= value).all()
        assert (value <= lines.upper_constant).all()
        assert (selected == value)[lines.upper_is_selected].all()


def test_a_pool_of_points_is_exact():
    op, x = ops.MaxPool((2, 2), (2, 2), (1, 1), (1, 1)), draw(3, 2, 5, 5).round(decimals=1) - 1  # ties, padding
    lines = largest_lines(op, x, x)
    assert lines.upper_is_selected.all()
    torch.testing.assert_close(lines.upper_constant, op(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_lines_hold_log_odds(dtype: torch.dtype, scale: float):
    center, radius = 8 * (draw(200, 5) - 0.5) * max(1.0, scale), scale * draw(200, 5, seed=1)
    radius[:20], radius[20:40, 2] = 0, 0
    lower, upper = (center - radius).to(dtype), (center + radius).to(dtype)
    lines = odds_lines(lower, upper)
    for seed in range(40):
        part = draw(200, 5, seed=seed + 2)
        x = torch.lerp(lower.double(), upper.double(), part if seed % 2 else part.round())
        value = LogOdds(-1)(x)
        below = x - (lines.lower_weights.double() @ x[..., None])[..., 0] + lines.lower_offset.double()
        above = x - (lines.upper_weights.double() @ x[..., None])[..., 0] + lines.upper_offset.double()
        slack = 1e-12 * (1 + value.abs())
        assert (below <= value + slack).all()
        assert (above >= value - slack).all()


def test_the_lines_of_two_entries_are_the_log_odds_themselves():
    lower, upper = draw(50, 2) - 2, draw(50, 2) + 3
    lines = odds_lines(lower, upper)
    difference = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64).expand(50, 2, 2)
    torch.testing.assert_close(lines.upper_weights, difference)
    torch.testing.assert_close(lines.upper_offset, torch.zeros(50, 2, dtype=torch.float64))
    torch.testing.assert_close(lines.lower_weights, difference)
    torch.testing.assert_close(lines.lower_offset, torch.zeros(50, 2, dtype=torch.float64))


def test_log_odds_of_boxes_without_end_have_infinite_lines():
    lines = odds_lines(torch.tensor([-torch.inf, 0.0, 1.0]), torch.tensor([0.0, 1.0, 2.0]))
    assert lines.lower_offset.tolist() == [-torch.inf] * 3
    assert lines.upper_offset.tolist() == [torch.inf] * 3
    assert not any(part.isnan().any() for part in vars(lines).values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_sigmoid_of_log_odds_is_softmax(dtype: torch.dtype):
    x = torch.cat([draw(50, 6) * scale - scale / 2 for scale in (1.0, 20.0, 160.0)]).to(dtype)
    x[0], x[1, :3] = 1.5, x[1, 0]
    exact = torch.softmax(x.double(), -1)
    torch.testing.assert_close(
        LogOdds(-1)(x).double().sigmoid(), exact, rtol=1e-4 if dtype == torch.float32 else 1e-11, atol=0
    )
    torch.testing.assert_close(LogOdds(0)(x.mT).mT, LogOdds(-1)(x))
