"""Bounds through a softmax: its entries sum to one, and no layout or free parameter makes them false."""

import pytest
import torch
from torch import Tensor, nn

from corollary.graph import ops as O
from corollary.verify import BoundedGraph
from corollary.verify.linear_bounds import lower_bounds
from corollary.verify.prepared import Prepared, prepare
from corollary.verify.sets import Box
from corollary.verify.sweep import sweep
from soundness import outside, points_in, values_at


class Shares(nn.Module):
    """Softmax of an affine map along an axis of (batch, 4, 3), or with the batch moved to the middle."""

    def __init__(self, axis: int, turned: bool = False):
        super().__init__()
        self.layer, self.axis, self.turned = nn.Linear(3, 3), axis, turned

    def forward(self, x: Tensor) -> Tensor:
        z = 2 * self.layer(x)
        return torch.softmax(z.permute(1, 0, 2), self.axis).permute(1, 0, 2) if self.turned else z.softmax(self.axis)


LAYOUTS = [(-1, False), (1, False), (0, True), (2, True)]


def made(axis: int, turned: bool, dtype: torch.dtype = torch.float64) -> tuple[Prepared, Box, int]:
    torch.manual_seed(1)
    net = Shares(axis, turned).double()
    x = torch.randn(3, 4, 3, dtype=torch.float64)
    one = prepare(net, x)
    box = Box(x - 0.4 * (1 + x.sin()), x + 0.4 * (1 + x.cos())).to(dtype)
    sample = {(-1, False): 2, (1, False): 1, (0, True): 1, (2, True): 2}[axis, turned]
    return prepare(one.graph, dtype=dtype), box, sample


@pytest.mark.parametrize(("axis", "turned"), LAYOUTS)
def test_the_sum_of_the_entries_is_one_exactly(axis: int, turned: bool):
    network, box, sample = made(axis, turned)
    groups = torch.arange(12).reshape(4, 3).unbind(2 - sample)
    rows = torch.stack([torch.zeros(12).double().scatter(0, group, 1.0) for group in groups])
    lower, upper = BoundedGraph(network.graph).bounds(box, rows)
    torch.testing.assert_close(lower, torch.ones_like(lower), rtol=0, atol=1e-12)
    torch.testing.assert_close(upper, torch.ones_like(upper), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("axis", "turned"), LAYOUTS)
def test_no_point_is_outside_whatever_the_parameters(axis: int, turned: bool, dtype: torch.dtype):
    network, box, _ = made(axis, turned, dtype)
    exact = prepare(network.graph, dtype=torch.float64)
    output = network.graph.outputs[0]
    known = sweep(network, [box]).known
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    positions = torch.cat([torch.arange(1, 13), -torch.arange(1, 13)]).repeat(3, 1)
    free: dict = {}
    lower_bounds(network, output, positions, [box], known, collect=free)
    points = points_in(exact.graph, [box], count=300)
    value = values_at(exact.graph, points, [exact.graph.outputs[0]])[exact.graph.outputs[0]]
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for place in (0.0, 0.5, 1.0, None):
        drawn = {
            node: tuple(
                None
                if part is None
                else torch.rand(part.shape, generator=generator).to(dtype) * (place is None) + (place or 0.0)
                for part in pair
            )
            for node, pair in free.items()
        }
        found = lower_bounds(network, output, positions, [box], known, free=drawn).lower
        assert outside(found[:, :12], -found[:, 12:], value) <= tolerance
    lower, upper = BoundedGraph(network.graph, dtype=dtype).bounds(box, rows)
    assert outside(lower, upper, value @ rows.T) <= tolerance
    forward = BoundedGraph(network.graph, dtype=dtype).bounds(box, rows, method="forward+crown")
    assert outside(*forward, value @ rows.T) <= tolerance
    alone = BoundedGraph(network.graph, dtype=dtype).bounds(box, rows, method="forward")
    assert outside(*alone, value @ rows.T) <= tolerance


def test_it_is_tighter_than_the_quotient_written_out():
    """The same function in exponentials, their sum and its reciprocal, bounded term by term."""

    class Written(nn.Module):
        def __init__(self, layer: nn.Module):
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            e = torch.exp(2 * self.layer(x))
            return e / e.sum(-1, keepdim=True)

    torch.manual_seed(1)
    joint = Shares(-1).double()
    x = torch.randn(3, 4, 3, dtype=torch.float64)
    box = Box(x - 0.2, x + 0.2)
    rows = torch.randn(20, 12, dtype=torch.float64)
    widths = []
    for net in (joint, Written(joint.layer).double()):
        lower, upper = BoundedGraph(net, x).bounds(box, rows)
        widths.append((upper - lower).mean())
    assert float(widths[0]) < 0.75 * float(widths[1])


def test_a_convolution_that_tiles_is_transposed_as_any_other():
    for kernel, size in (((2, 2), 8), ((4, 2), 8), ((2, 2), 9)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 3, kernel, stride=kernel), nn.Flatten()).double()
        x = torch.randn(2, 2, size, size, dtype=torch.float64)
        network = prepare(net, x)
        output = network.graph.outputs[0]
        rows = torch.randn(5, network.sizes[output], dtype=torch.float64)
        lower, upper = BoundedGraph(net, x).bounds(Box(x, x), rows)
        torch.testing.assert_close(lower, net(x).detach() @ rows.T)
        torch.testing.assert_close(upper, lower)
        assert not network.nonlinear
        assert any(isinstance(node.op, O.Convolution) for node in network.graph)
