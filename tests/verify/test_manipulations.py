import math

import pytest
import torch

from corollary.base.errors import BadInput
from corollary.verify.manipulations import PixelGrid, severity

OWN = torch.zeros(1, dtype=torch.int64)


def test_max_takes_each_channel_to_its_farther_end():
    image = torch.tensor([0.2, 0.9, 0.0, 1.0]).reshape(1, 2, 1, 2)  # two channels of two pixels
    grid = PixelGrid.of(image, "max")
    moved = grid.at(torch.tensor([[1, 0]]), OWN)
    assert moved.flatten().tolist() == pytest.approx([1.0, 0.9, 1.0, 1.0])
    assert grid.is_one_way


def test_a_white_pixel_cannot_be_made_white():
    grid = PixelGrid.of(torch.tensor([0.2, 1.0]).reshape(1, 1, 1, 2), "white")
    assert grid.highest.tolist() == [[1, 0]]
    assert grid.lowest.tolist() == [[0, 0]]


def test_levels_end_where_nothing_changes_any_more():
    image = torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64).reshape(1, 1, 1, 3)
    grid = PixelGrid.of(image, 0.25)
    assert grid.lowest.tolist() == [[0, -2, -4]]
    assert grid.highest.tolist() == [[4, 2, 1]]
    assert grid.at(grid.highest, OWN).flatten().tolist() == [1.0, 1.0, 1.0]
    assert grid.at(grid.lowest, OWN).flatten().tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("manipulation", ["max", "white", 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_level_zero_is_the_original_to_the_bit(manipulation, dtype):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 4, 5, generator=generator, dtype=dtype)
    grid = PixelGrid.of(images, manipulation)
    numbers = torch.tensor([2, 0])
    levels = grid.highest[numbers].clone()
    levels[:, :7] = 0
    moved = grid.at(levels, numbers)
    assert torch.equal(moved.flatten(2)[..., :7], images[numbers].flatten(2)[..., :7])
    assert not torch.equal(moved, images[numbers])
    assert torch.equal(grid.at(torch.zeros_like(levels), numbers), images[numbers])


def test_severity_in_each_norm():
    change = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    change[0, :, 0, 1] = torch.tensor([0.3, 0.0, -0.4])
    change[0, 1, 1, 0] = 1.2
    found = {norm: float(severity(change, torch.zeros_like(change), norm)) for norm in (0, 1, 2, math.inf)}
    assert found[0] == 2  # pixels, not channels
    assert found == pytest.approx({0: 2.0, 1: 1.9, 2: 1.3, math.inf: 1.2})


@pytest.mark.parametrize("tau", [0.0, -0.1, 1.5, math.nan])
def test_a_step_that_is_no_part_of_the_range_is_refused(tau):
    with pytest.raises(BadInput, match="a step tau lies in"):
        PixelGrid.of(torch.zeros(1, 1, 2, 2), tau)
