"""Samples on a grid: the boundary between them against circles and lines, and against the exact regions."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from corollary.evidence import Figure
from corollary.geometry.regions import slice_regions
from corollary.geometry.slice_samples import draw_samples, grid, sample_slice
from corollary.geometry.slices import Plane, box_corners

BOX = box_corners([-1.0, -1.0], [1.0, 1.0])
PLANE = Plane.of_coordinates(torch.zeros(2, dtype=torch.float64))


def test_grid_holds_the_middles_of_the_cells_u_slowest():
    points = grid(box_corners([0.0, 0.0], [1.0, 2.0]), 2)
    assert points.tolist() == [[0.25, 0.5], [0.25, 1.5], [0.75, 0.5], [0.75, 1.5]]


def test_a_straight_boundary_is_exact_and_crosses_the_grid():
    sampled = sample_slice(lambda x: x[:, :1] + 0.5 * x[:, 1:] - 0.1, PLANE, BOX, 20)
    found = sampled.boundary()
    residual = found.ends[:, :, 0] + 0.5 * found.ends[:, :, 1] - 0.1
    assert float(residual.abs().max()) < 1e-12  # a linear score is its own interpolation
    height = 2 - 2 / 20  # the outermost points lie half a cell inside the box
    assert found.length == pytest.approx(height * math.sqrt(1.25), rel=1e-12)


def test_a_circle_is_found_to_second_order():
    errors = []
    for side in (20, 40, 80):
        found = sample_slice(lambda x: 0.49 - x.square().sum(1, keepdim=True), PLANE, BOX, side).boundary()
        errors.append(abs(found.length - 2 * math.pi * 0.7))
    assert errors[0] / errors[2] > 8  # 16 for an error of the square of the step


def test_several_classes_meet_in_one_point():
    directions = torch.tensor([[1.0, 0.0], [-0.5, math.sqrt(0.75)], [-0.5, -math.sqrt(0.75)]], dtype=torch.float64)
    sampled = sample_slice(lambda x: x @ directions.T, PLANE, BOX, 25)
    found = sampled.boundary()
    scores = (found.ends @ directions.T).sort(dim=2).values
    assert float((scores[:, :, 2] - scores[:, :, 1]).abs().max()) < 1e-12  # the two largest tie
    assert {tuple(pair) for pair in found.classes.tolist()} == {(0, 1), (0, 2), (1, 2)}
    assert float(found.ends.norm(dim=2).min()) < 1e-12
    assert float(sampled.class_shares().sum()) == pytest.approx(1)


def test_classes_that_nowhere_win_change_nothing():
    score = nn.Linear(2, 3).double()
    few = sample_slice(score, PLANE, BOX, 15)
    more = sample_slice(lambda x: torch.cat([torch.full((len(x), 4), -99.0), score(x)], dim=1), PLANE, BOX, 15)
    torch.testing.assert_close(few.boundary().ends, more.boundary().ends)
    assert torch.equal(few.boundary().classes + 4, more.boundary().classes)


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_single_class_has_no_boundary(outputs):
    levels = torch.arange(outputs, dtype=torch.float64) + 1
    sampled = sample_slice(lambda x: levels.expand(len(x), -1), PLANE, BOX, 5)
    assert len(sampled.boundary().ends) == 0
    assert float(sampled.class_shares()[max(1, outputs - 1)]) == 1


def test_samples_agree_with_the_exact_regions():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    exact = slice_regions(net, PLANE, box=((-1.0, -1.0), (1.0, 1.0)))
    with torch.no_grad():
        sampled = sample_slice(net, PLANE, BOX, 150)
    shares = exact.class_areas() / exact.areas.sum()
    assert float((sampled.class_shares() - shares).abs().max()) < 0.01
    assert sampled.boundary().length == pytest.approx(exact.boundary().length, rel=0.03)


@pytest.mark.parametrize("classes", [0, 3, 14])
def test_columns_draw_with_classes_many_classes_and_none(classes):
    angle = torch.arange(max(classes, 1), dtype=torch.float64) * 2 * math.pi / max(classes, 1)
    towards = torch.stack([angle.cos(), angle.sin()])
    sampled = sample_slice(lambda x: x @ towards, PLANE, BOX, 30)
    data = sampled.columns([str(i) for i in range(classes)])
    assert len(data["grid_u"]) == len(data["grid_v"]) == 30
    if classes:
        image = data["grid_class"].reshape(30, 30)
        assert image[-1, 15] == 0  # class 0 lies along u
        assert len(np.unique(image)) == classes
    svg = Figure("grid", "grid", "A grid.", data, draw_samples).svg()
    assert "<image" in svg
