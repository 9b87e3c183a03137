"""The entries that rows depend on: against derivatives at many points, and by hand."""

import pytest
import torch
from torch import Tensor, nn

from cases import mlp
from corollary.graph import values
from corollary.verify.layout import Rows, pack, sample_shape
from corollary.verify.prepared import Prepared, prepare
from corollary.verify.relevance import relevant_entries
from corollary.verify.sets import Box
from corollary.verify.slopes import Ascent, optimised, sharper
from corollary.verify.sweep import sweep


class Formula(nn.Module):
    """Two outputs that share no angle and no factor, and a third of both."""

    def forward(self, x: Tensor) -> Tensor:
        size, angle = torch.sigmoid(x[:, :3]), x[:, 3:]
        first = size * angle.sin()
        return torch.cat([first[:, :2], first.sum(1, keepdim=True) * size[:, 2:]], 1)


class Attending(nn.Module):
    """A product of two matrices of the input."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.tanh(x[:, :6]).reshape(-1, 2, 3), torch.tanh(x[:, 6:]).reshape(-1, 3, 2)
        return torch.relu(a @ b).flatten(1)


class Pooled(nn.Module):
    """Maxima over windows between layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.reshape(-1, 1, 6, 6))


NETWORKS = {
    "formula": (Formula, 6, 1.0),
    "attending": (Attending, 12, 0.5),
    "pooled": (Pooled, 36, 0.3),
    "layers": (lambda: mlp(4, 7, 5, 3), 4, 0.6),
}


def made(name: str) -> tuple[Prepared, Box]:
    build, inputs, radius = NETWORKS[name]
    torch.manual_seed(1)
    center = 0.4 * torch.randn(2, inputs).double()
    return prepare(build().double(), center), Box(center - radius, center + radius)


def rows_of(network: Prepared, matrix: Tensor, batch: int) -> Rows:
    output = network.graph.outputs[0]
    return Rows(pack(output, matrix.expand(batch, *matrix.shape).reshape(batch, len(matrix), *sample_shape(output))),
                batch, len(matrix))  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("row", [0, 1, 2])
def test_every_entry_that_moves_a_row_is_relevant(name: str, row: int):
    """Entries whose derivative is not zero somewhere in the region."""
    network, region = made(name)
    output = network.graph.outputs[0]
    matrix = torch.eye(sum(sample_shape(output)), dtype=torch.float64)[row : row + 1]
    with torch.no_grad():
        found = relevant_entries(network, output, rows_of(network, matrix, 2), sweep(network, [region]).known)
    generator = torch.Generator().manual_seed(0)
    for sample in range(2):
        x = region.center[sample] + region.radius[sample] * (
            2 * torch.rand(200, region.center.shape[1], generator=generator, dtype=torch.float64) - 1
        )
        x.requires_grad_()
        bounded = list(network.bounded)
        taken = values(network.graph, (x,), [*bounded, output])
        flows = torch.autograd.grad(
            taken[output].flatten(1)[:, row].sum(), [taken[n] for n in bounded], allow_unused=True
        )
        for node, flow in zip(bounded, flows, strict=True):
            if flow is not None:
                moves = (flow.flatten(1) != 0).any(0)
                assert not bool(moves.any()) or not bool((moves & ~found[node][sample]).any())


def test_a_row_of_separate_formulas_has_its_own_entries_only():
    network, region = made("formula")
    output = network.graph.outputs[0]
    known = sweep(network, [region]).known
    found = relevant_entries(network, output, rows_of(network, torch.tensor([[1.0, 0, 0]]).double(), 2), known)
    counts = [int(entries.sum(1).max()) for entries in found.values()]
    assert max(counts) == 1
    assert counts.count(1) >= 3


def test_an_inactive_neuron_ends_the_way():
    torch.manual_seed(2)
    net = mlp(3, 5, 4, 1).double()
    with torch.no_grad():
        net[2].bias[1] = -100.0
        net[0].weight[3], net[0].bias[3] = 0.0, 1.0
        net[2].weight[[0, 2, 3], 4] = 0.0  # entry 4 of the first layer is read by the inactive neuron only
    network = prepare(net, torch.zeros(2, 3).double())
    region = Box(-torch.ones(1, 3).double(), torch.ones(1, 3).double())
    first, second = network.nonlinear[0].inputs[0], network.nonlinear[1].inputs[0]
    known = sweep(network, [region]).known
    found = relevant_entries(network, network.graph.outputs[0], rows_of(network, torch.ones(1, 1).double(), 1), known)
    assert found[second].tolist() == [[True, False, True, True]]
    assert found[first].tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize("name", NETWORKS)
def test_bounds_of_a_row_are_those_that_all_entries_give(name: str):
    network, region = made(name)
    output = network.graph.outputs[0]
    rows = rows_of(network, torch.eye(sum(sample_shape(output)), dtype=torch.float64)[:1], 2)
    with torch.no_grad():
        found = sweep(network, [region])
        relevant = relevant_entries(network, output, rows, found.known)
        how = Ascent(5)
        everything, some = sharper(network, [region], found, how), sharper(network, [region], found, how, relevant)
        for node, entries in relevant.items():
            for wanted, given in zip(everything.flat(node), some.flat(node), strict=True):
                torch.testing.assert_close(given[entries], wanted[entries], atol=2e-2, rtol=2e-2)
        least = optimised(network, output, rows, [region], found, ascent=how).lower
    x = region.center + region.radius * (2 * torch.rand(500, *region.center.shape, dtype=torch.float64) - 1)
    reached = values(network.graph, (x.flatten(0, 1),), [output])[output].reshape(500, 2, -1)[..., :1]
    assert float((least - reached).max()) <= 1e-9
