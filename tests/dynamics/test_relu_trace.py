"""The trace of a two-layer ReLU network, in closed form."""

import math

import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.dynamics.losses import half_square
from corollary.dynamics.relu_trace import path_norm, relu_trace_closed_form
from corollary.dynamics.stability import fisher_trace


def network(units=7, d=4):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(d, units, bias=False), nn.ReLU(), nn.Linear(units, 1, bias=False)).double()
    first, second = (p.detach() for p in net.parameters())
    return net, first, second[0]


def test_points_with_the_moments_of_the_sphere_have_exactly_this_trace():
    net, first, second = network()
    frame = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    points = 2.0 * torch.cat([frame, -frame])  # of norm root d; one of x and -x is on the active side
    trace = fisher_trace(net, half_square, (points, torch.zeros(8, 1, dtype=torch.float64)))
    assert trace == pytest.approx(relu_trace_closed_form(first, second), rel=1e-13)


def test_gaussian_inputs_come_close():
    net, first, second = network()
    points = torch.randn(4000, 4, dtype=torch.float64)
    trace = fisher_trace(net, half_square, (points, torch.zeros(4000, 1, dtype=torch.float64)))
    assert trace == pytest.approx(relu_trace_closed_form(first, second), rel=0.1)  # 1 / root n, times the fourth moment


def test_it_bounds_the_path_norm_and_meets_it_where_the_layers_are_balanced():
    _, first, second = network()
    assert relu_trace_closed_form(first, second) > 2.0 * path_norm(first, second)
    balanced = first.norm(dim=1) / 2.0
    assert relu_trace_closed_form(first, balanced) == pytest.approx(2.0 * path_norm(first, balanced), rel=1e-13)


def test_what_is_refused():
    _, first, second = network()
    with pytest.raises(BadInput, match="the first layer has 28 NaN"):
        relu_trace_closed_form(first * math.nan, second)
    with pytest.raises(BadInput, match="the second layer"):
        relu_trace_closed_form(first, second * math.inf)
