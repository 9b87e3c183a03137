"""Linear bounds of inner nodes over a box, used on its parts."""

import pytest
import torch
from torch import Tensor, nn

from cases import mlp
from corollary.graph import Node, forward
from corollary.verify.planes import Planes
from corollary.verify.prepared import Prepared, prepare
from corollary.verify.sets import Box
from corollary.verify.sweep import sweep


def prepared(activation: type[nn.Module], dtype: torch.dtype) -> Prepared:
    torch.manual_seed(3)
    return prepare(mlp(3, 12, 10, 8, 2, activation=activation).to(dtype), torch.zeros(2, 3, dtype=dtype))


def boxes(dtype: torch.dtype) -> Box:
    middle = torch.linspace(-1, 1, 15, dtype=dtype).reshape(5, 3)
    return Box(middle - 0.4, middle + 0.5)


def parts(whole: Box, origin: Tensor, seed: int = 0) -> Box:
    """A random part of each box."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(2, len(origin), 3, generator=generator, dtype=whole.lower.dtype).sort(0).values
    low, width = whole.lower[origin], (whole.upper - whole.lower)[origin]
    return Box(low + share[0] * width, torch.minimum(low + share[1] * width, whole.upper[origin]))


def values(network: Prepared, x: Tensor) -> dict[Node, Tensor]:
    wanted = set(network.bounded) | set(network.graph.outputs)
    return forward(network.graph, (x,), network.graph.tensors, lambda node, op, v: op(*v), batch=len(x), keep=wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_bounds_of_parts_hold_and_are_within_those_of_the_whole(activation: type[nn.Module], dtype: torch.dtype):
    network, whole = prepared(activation, dtype), boxes(dtype)
    planes: dict[Node, Planes] = {}
    known = sweep(network, [whole], collect=planes).known
    assert planes
    origin = torch.arange(5).repeat(8)
    part = parts(whole, origin)
    found = sweep(
        network, [part], linear=False, planes={node: plane.at(origin) for node, plane in planes.items()}
    ).known
    slack = 1e-5 if dtype == torch.float32 else 1e-12
    for node in network.bounded:
        lower, upper = found.flat(node)
        least, most = (end[origin] for end in known.flat(node))
        assert bool((lower >= least - slack).all()), node.name
        assert bool((upper <= most + slack).all()), node.name
    points = part.sample(200, torch.Generator().manual_seed(1))
    points[:2] = torch.stack([part.lower, part.upper])
    seen = values(network, points.flatten(0, 1))
    for node in network.bounded:
        lower, upper = found.flat(node)
        value = seen[node].reshape(200, len(origin), -1)
        assert bool((value >= lower - slack).all()), node.name
        assert bool((value <= upper + slack).all()), node.name


def test_on_the_whole_box_planes_give_its_own_bounds():
    network, whole = prepared(nn.ReLU, torch.float64), boxes(torch.float64)
    planes: dict[Node, Planes] = {}
    known = sweep(network, [whole], collect=planes).known
    again = sweep(network, [whole], linear=False, planes=planes).known
    for node in network.bounded:
        for a, b in zip(known.flat(node), again.flat(node), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_parts_are_bounded_tighter_than_by_intervals():
    network, whole = prepared(nn.ReLU, torch.float64), boxes(torch.float64)
    planes: dict[Node, Planes] = {}
    sweep(network, [whole], collect=planes)
    origin = torch.arange(5).repeat(8)
    part = parts(whole, origin)
    node = list(planes)[-1]
    plain = sweep(network, [part], linear=False).known.flat(node)
    cut = {n: plane.at(origin) for n, plane in planes.items()}
    sharp = sweep(network, [part], linear=False, planes=cut).known.flat(node)
    assert float((sharp[1] - sharp[0]).sum()) < 0.8 * float((plain[1] - plain[0]).sum())
