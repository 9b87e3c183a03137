"""Ranks of layers: closed forms, both forms of a convolution, and the unrolled sum of gradients."""

import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput, NothingMeasured
from corollary.dynamics.ranks import rank_profile, unrolled_decay, weight_names
from corollary.engine import seeded
from corollary.graph import GraphModule, capture


def with_values(values: list[float], rows: int, columns: int) -> nn.Linear:
    """A layer of given singular values."""
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))[0]
    layer = nn.Linear(columns, rows).double()
    k = len(values)
    with torch.no_grad():
        layer.weight.copy_(u[:, :k] * torch.tensor(values, dtype=torch.float64) @ v[:, :k].T)
    return layer


def test_measures_of_known_singular_values():
    (layer,) = rank_profile(with_values([2.0, 1.0, 1.0, 0.0199], 5, 7)).layers
    assert (layer.form, layer.rows, layer.columns, layer.largest_possible) == ("dense", 5, 7, 5)
    assert layer.numerical() == 3
    assert layer.numerical(1e-3) == 4
    squares = 6 + 0.0199**2
    assert layer.participation == pytest.approx(4.0199**2 / squares, rel=1e-12)
    assert layer.stable == pytest.approx(squares / 4, rel=1e-12)
    assert layer.frobenius == pytest.approx(squares**0.5, rel=1e-12)


def test_equal_singular_values_have_full_rank_by_every_measure():
    (layer,) = rank_profile(with_values([3.0] * 4, 4, 6)).layers
    assert (layer.numerical(), layer.participation, layer.stable) == pytest.approx((4, 4, 4))


def test_a_layer_of_zeros_has_rank_zero():
    net = nn.Linear(3, 2)
    nn.init.zeros_(net.weight)
    profile = rank_profile(net)
    assert (profile.layers[0].numerical(), profile.layers[0].participation, profile.layers[0].stable) == (0, 0, 0)
    assert profile.figure().svg().startswith("<svg")


def brute_operator(conv: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    columns = [
        conv(row.reshape(1, *shape)).flatten() - conv(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
        for row in torch.eye(int(torch.tensor(shape).prod()), dtype=torch.float64)
    ]
    return torch.stack(columns, dim=1).detach()


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Conv2d(4, 4, 2, stride=2, groups=2),
        nn.ConvTranspose2d(2, 3, 2, stride=2),
        nn.Conv2d(3, 3, 3, groups=3),
    ],
    ids=str,
)
def test_a_convolution_has_two_forms(conv):
    conv = conv.double()
    shape = (conv.in_channels, 4, 4)
    kernel, operator = rank_profile(conv, inputs=torch.randn(2, *shape, dtype=torch.float64)).layers
    assert (kernel.form, operator.form) == ("kernel", "operator")
    dense = brute_operator(conv, shape)
    assert (operator.rows, operator.columns) == dense.shape
    torch.testing.assert_close(operator.singular_values, torch.linalg.svdvals(dense), atol=1e-10, rtol=1e-10)
    assert kernel.frobenius == pytest.approx(float(conv.weight.detach().norm()), rel=1e-12)
    assert operator.frobenius > kernel.frobenius  # the operator repeats the kernel at every position


def test_groups_are_blocks_of_a_block_diagonal_matrix():
    conv = nn.Conv2d(4, 6, 3, groups=2).double()
    (kernel,) = rank_profile(conv).layers
    dense = torch.block_diag(*conv.weight.detach().flatten(1).split(3))
    assert (kernel.rows, kernel.columns) == dense.shape
    torch.testing.assert_close(kernel.singular_values, torch.linalg.svdvals(dense), atol=1e-12, rtol=1e-12)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


def test_modules_and_graphs_have_the_same_ranks():
    net, x = seeded(network, 0), torch.randn(2, 1, 4, 4)
    graph = capture(net, x)
    tables = [rank_profile(each, inputs=x).table() for each in (net, graph, GraphModule(graph))]
    assert tables[0] == tables[1] == tables[2]
    assert list(tables[0]["layer"]) == ["0", "0", "3"]
    assert list(tables[0]["form"]) == ["kernel", "operator", "dense"]


def test_frozen_layers_of_a_graph_count():
    net = seeded(network, 0).requires_grad_(False)
    assert len(rank_profile(capture(net, torch.randn(2, 1, 4, 4))).layers) == 3


def test_tied_weights_count_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    assert len(rank_profile(net).layers) == 1


def test_what_is_left_out_is_named():
    net, x = seeded(network, 0), torch.randn(2, 1, 4, 4)
    profile = rank_profile(net, inputs=x, largest_operator=10)
    assert profile.skipped == {"0 (operator)": "8 x 16 is too large to form"}
    with torch.no_grad():
        net[3].weight[0, 0] = torch.nan
    assert rank_profile(net).skipped == {"3": "it has NaN or infinite weights"}
    assert [layer.layer for layer in rank_profile(net, layers=["0.weight"]).layers] == ["0"]


def test_sides_of_the_weights():
    assert weight_names(seeded(network, 0)) == {"0.weight": (2, 9), "3.weight": (3, 8)}


def test_nothing_to_measure_and_bad_settings():
    with pytest.raises(NothingMeasured):
        rank_profile(nn.BatchNorm1d(3))
    with pytest.raises(BadInput, match="rtol"):
        rank_profile(nn.Linear(2, 2), rtol=1.0)
    with pytest.raises(BadInput, match=r"Known: weight"):
        rank_profile(nn.Linear(2, 2), layers=["head"])


def test_many_layers_share_one_legend():
    figure = rank_profile(nn.Sequential(*(nn.Linear(3, 3) for _ in range(12)))).figure()
    assert figure.svg().startswith("<svg")
    wide = rank_profile(nn.Linear(300, 300)).figure()
    assert len(wide.data["relative"]) == 96
    assert (wide.data["index"][0], wide.data["index"][-1]) == (1, 300)


def test_decay_unrolled_is_the_run_of_pytorch():
    weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    initial = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=0.3, weight_decay=0.2)
    gradients = torch.randn(50, 3, 4, dtype=torch.float64)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    found = unrolled_decay(initial, gradients, learning_rate=0.3, weight_decay=0.2)
    torch.testing.assert_close(found, weight.detach(), rtol=1e-12, atol=1e-12)


def test_without_gradients_weights_decay_to_nothing():
    """After 3 / (rate * decay) steps, e^-3 of the initial weights is left: the time that low rank takes to show."""
    initial = torch.ones(2, 2, dtype=torch.float64)
    steps = round(3 / (0.01 * 0.05))
    left = unrolled_decay(initial, torch.zeros(steps, 2, 2).double(), learning_rate=0.01, weight_decay=0.05)
    assert float(left[0, 0]) == pytest.approx(torch.exp(torch.tensor(-3.0)).item(), rel=2e-3)
