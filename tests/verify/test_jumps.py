"""Floors that jump inside a region: its two parts cover it, and what is continuous all the same is proved."""

import pytest
import torch
from torch import Tensor, nn

from corollary.graph import values
from corollary.graph.ops import Floor
from corollary.verify.certify import certify
from corollary.verify.jumps import parts_at_jump
from corollary.verify.prepared import prepare
from corollary.verify.sets import Box
from corollary.verify.specification import Case, Halfspaces, Specification
from corollary.verify.sweep import sweep
from corollary.verify.verdict import CertifyConfig


class Wave(nn.Module):
    """The distances to the nearest integer, by way of the remainder; and their weighted sum."""

    def forward(self, x: Tensor) -> Tensor:
        rest = x - torch.floor(x)
        return (0.5 - (rest - 0.5).abs()) @ torch.tensor([[1.0], [-2.0]], dtype=x.dtype)


def box(lower: list[float], upper: list[float]) -> Box:
    return Box(torch.tensor([lower], dtype=torch.float64), torch.tensor([upper], dtype=torch.float64))


REGIONS = {
    "a jump of one entry": ([-0.1, 0.2], [0.15, 0.4]),
    "jumps of both": ([-0.1, 0.9], [0.15, 1.2]),
    "three of one": ([-0.1, 0.3], [2.15, 0.4]),
    "a jump at the end": ([0.7, 0.3], [1.0, 0.4]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", REGIONS)
def test_the_parts_cover_the_region_and_hold_all_values(name: str, dtype: torch.dtype):
    region = box(*REGIONS[name]).to(dtype)
    network = prepare(Wave(), region.center.expand(2, -1))
    known = sweep(network, [region]).known
    relevant = {node: torch.ones(1, network.sizes[node], dtype=torch.bool) for node in network.bounded}
    parts = parts_at_jump(network, known, relevant)
    assert parts is not None
    (floor,) = [node for node in network.nonlinear if isinstance(node.op, Floor)]
    source = floor.inputs[0]
    x = region.lower + (region.upper - region.lower) * torch.rand(2000, 2, dtype=dtype)
    x = torch.cat([x, region.lower, region.upper, x.round().clamp(region.lower, region.upper)])
    z = values(network.graph, (x,), [source])[source]
    inside = [((part.bounds[source].lower <= z) & (z <= part.bounds[source].upper)).all(1) for part in parts]
    assert bool((inside[0] | inside[1]).all())
    for part, here in zip(parts, inside, strict=True):
        assert bool(here.any())
        assert bool((part.cut.sign * (z[here][:, part.cut.entry] - part.cut.point) <= 0).all())
        found = sweep(network, [region], held=part.bounds).known
        taken = values(network.graph, (x[here],), list(network.bounded))
        for node in network.bounded:
            low, high = found.flat(node)
            reached = taken[node].flatten(1)
            assert float((low - reached).max()) <= 1e-6
            assert float((reached - high).max()) <= 1e-6


def test_no_part_where_no_floor_jumps_or_none_that_matters():
    network = prepare(Wave(), torch.zeros(2, 2).double())
    every = {node: torch.ones(1, network.sizes[node], dtype=torch.bool) for node in network.bounded}
    assert parts_at_jump(network, sweep(network, [box([0.0, 0.2], [0.9, 0.4])]).known, every) is None
    known = sweep(network, [box([-0.1, 0.2], [0.1, 0.4])]).known
    assert parts_at_jump(network, known, every) is not None
    assert parts_at_jump(network, known, {}) is None


def asked(region: Box, above: float) -> Specification:
    """Unsafe is an output of at least `above`."""
    piece = Halfspaces(torch.tensor([[-1.0]], dtype=torch.float64), torch.tensor([-above], dtype=torch.float64))
    return Specification((Case(region, (piece,)),))


@pytest.mark.parametrize("attack", [(0.0, 0.0), (1.0, 8.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", REGIONS)
def test_thresholds_on_both_sides_of_the_maximum(name: str, dtype: torch.dtype, attack: tuple[float, float]):
    lower, upper = REGIONS[name]
    region = box(lower, upper)
    axes = [torch.linspace(a, b, 801, dtype=torch.float64) for a, b in zip(lower, upper, strict=True)]
    most = float(Wave()(torch.cartesian_prod(*axes)).max())
    config = CertifyConfig(split="neurons", attack=attack, dtype=dtype)
    assert certify(Wave(), asked(region, most + 0.01), timeout=20, config=config).status == "unsat"
    assert certify(Wave(), asked(region, most - 0.01), timeout=2, config=config).status != "unsat"
