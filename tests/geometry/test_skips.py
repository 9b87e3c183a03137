"""Skip connections taken out: against products of the blocks' matrices, and against the same net written without."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.base.errors import BadInput
from corollary.geometry.skips import other_sums, skip_comparison, skip_sums, without_skips
from corollary.graph import capture, evaluate


class Block(nn.Module):
    def __init__(self, width: int, *, skip: bool = True, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.linear, self.skip, self.activation = nn.Linear(width, width), skip, activation or nn.ReLU()

    def forward(self, z: Tensor) -> Tensor:
        branch = self.activation(self.linear(z))
        return z + branch if self.skip else branch


class Projected(nn.Module):
    """A shortcut with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut, self.branch = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, z: Tensor) -> Tensor:
        return self.shortcut(z) + F.relu(self.branch(z))


def network(*, skip: bool = True, activation: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    blocks = [Block(6, skip=skip, activation=activation) for _ in range(3)]
    return nn.Sequential(nn.Linear(5, 6), *blocks, nn.Linear(6, 4)).double()


X = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_taken_out_skips_leave_the_network_of_the_branches():
    graph = capture(network(), X)
    plain, place = without_skips(graph)
    assert len(skip_sums(graph)) == 3
    assert skip_sums(plain) == ()
    torch.testing.assert_close(evaluate(plain, X), network(skip=False)(X))
    torch.testing.assert_close(evaluate(graph, X), network()(X))  # the graph given is left as it was
    assert set(place) == set(graph.nodes)


def test_values_are_those_of_products_of_the_blocks_matrices():
    net = network(activation=nn.Identity())
    weights = [net[i].linear.weight.detach() for i in (1, 2, 3)]
    identity = torch.eye(6, dtype=torch.float64)
    found = skip_comparison(net, X)
    assert (found.removed, found.end) == (3, "the last block")
    for values, shift in ((found.with_skips, identity), (found.without_skips, 0 * identity)):
        a, b, c = (weight + shift for weight in weights)
        torch.testing.assert_close(values, torch.linalg.svdvals(c @ b @ a).expand(7, -1))


def test_the_plain_network_has_patterns_of_its_own():
    found, plain = skip_comparison(network(), X), network(skip=False)
    jacobian = torch.func.vmap(torch.func.jacrev(plain[1:4]))(plain[0](X))
    torch.testing.assert_close(found.without_skips, torch.linalg.svdvals(jacobian).detach(), atol=1e-12, rtol=1e-9)


def test_a_map_too_large_leads_to_the_output(monkeypatch):
    monkeypatch.setattr("corollary.geometry.singular_values.DENSE_SIDE", 4)
    found = skip_comparison(network(), X)
    assert found.end == "the output"
    assert found.with_skips.shape == (7, 4)
    monkeypatch.setattr("corollary.geometry.singular_values.DENSE_SIDE", 3)
    with pytest.raises(BadInput, match="is not formed: its map is 4 x 6"):
        skip_comparison(network(), X)


def test_shortcuts_with_weights_are_kept_and_counted():
    graph = capture(nn.Sequential(nn.Linear(5, 6), Projected(), Block(6)).double(), X)
    assert len(skip_sums(graph)) == len(other_sums(graph)) == 1
    plain, _ = without_skips(graph)
    assert len(other_sums(plain)) == 1


def test_a_relu_written_as_a_sum_is_no_residual_block():
    class Half(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return 0.5 * (z + z.abs())

    graph = capture(nn.Sequential(nn.Linear(5, 6), Half(), nn.Linear(6, 2)).double(), X)
    assert skip_sums(graph) == ()
    with pytest.raises(BadInput, match="no residual blocks"):
        skip_comparison(graph, X)
