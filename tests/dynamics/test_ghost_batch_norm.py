"""Ghost batch normalisation equals calls of batch normalisation one after the other, to rounding."""

import pytest
import torch
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.dynamics.ghost_batch_norm import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d, ghostify
from corollary.engine import population

LAYERS = [
    (GhostBatchNorm1d, nn.BatchNorm1d, (5,)),
    (GhostBatchNorm1d, nn.BatchNorm1d, (5, 7)),
    (GhostBatchNorm2d, nn.BatchNorm2d, (5, 3, 4)),
    (GhostBatchNorm3d, nn.BatchNorm3d, (5, 2, 3, 2)),
]


def pair(ghost: type, plain: type, channels: int, virtual_batch: int, **settings) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    a, b = ghost(channels, virtual_batch, **settings).double(), plain(channels, **settings).double()
    if b.weight is not None:
        with torch.no_grad():
            b.weight.uniform_(0.5, 2)
            b.bias.normal_()
    a.load_state_dict(b.state_dict())
    return a, b


def one_by_one(layer: nn.Module, x: Tensor, sizes: list[int]) -> Tensor:
    return torch.cat([layer(part) for part in x.split(sizes)])


def gradients(layer: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad((y * torch.randn_like(y)).sum(), [x, *layer.parameters()]))


def check_same(a: nn.Module, b: nn.Module, x: Tensor, sizes: list[int]) -> None:
    for _ in range(2):  # the second call starts from other running statistics
        y, wanted = a(x), one_by_one(b, x, sizes)
        torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12)
        for found, other in zip(gradients(a, x, y), gradients(b, x, wanted), strict=True):
            torch.testing.assert_close(found, other, rtol=0, atol=1e-11)
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in b.state_dict().items():
        torch.testing.assert_close(a.state_dict()[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("ghost", "plain", "shape"), LAYERS)
@pytest.mark.parametrize(
    ("batch", "sizes"),
    [(12, [4, 4, 4]), (14, [4, 4, 4, 2]), (13, [4, 4, 5]), (5, [5]), (3, [3]), (4, [4])],
)
def test_virtual_batches_equal_calls_in_sequence(ghost, plain, shape, batch, sizes):
    a, b = pair(ghost, plain, shape[0], 4)
    check_same(a, b, torch.randn(batch, *shape, dtype=torch.float64, requires_grad=True), sizes)


@pytest.mark.parametrize("settings", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}])
def test_settings_of_the_layer_are_kept(settings):
    a, b = pair(GhostBatchNorm1d, nn.BatchNorm1d, 3, 2, **settings)
    check_same(a, b, torch.randn(7, 3, dtype=torch.float64, requires_grad=True), [2, 2, 3])


def test_evaluation_is_that_of_batch_normalisation():
    a, b = pair(GhostBatchNorm2d, nn.BatchNorm2d, 3, 2)
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    a(x), one_by_one(b, x, [2, 2, 2])
    torch.testing.assert_close(a.eval()(x), b.eval()(x), rtol=0, atol=1e-14)


def test_a_network_is_copied_with_its_state():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.3), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(9, 1, 5, 5)
    net(x)
    ghost = ghostify(net, 3)
    assert type(net[1]) is nn.BatchNorm2d
    assert isinstance(ghost[1], GhostBatchNorm2d)
    assert (ghost[1].eps, ghost[1].momentum, ghost[1].virtual_batch) == (1e-3, 0.3, 3)
    torch.testing.assert_close(ghost.eval()(x), net.eval()(x))
    assert "virtual_batch=3" in repr(ghost)
    assert not torch.allclose(ghost.train()(x), net.train()(x))


def test_a_layer_alone_and_nested_ones_are_replaced():
    assert isinstance(ghostify(nn.BatchNorm1d(3).double(), 2), GhostBatchNorm1d)
    nested = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    assert isinstance(ghostify(nested, 2)[0][1], GhostBatchNorm1d)


def test_members_of_a_population_equal_single_runs():
    x, y = torch.randn(24, 3, dtype=torch.float64), torch.randint(2, (24,))

    def make() -> nn.Module:
        return ghostify(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)), 4).double()

    both = population(make, (x, y), seeds=[3, 5], batch_size=8, steps=7)
    alone = population(make, (x, y), seeds=[5], batch_size=8, steps=7)
    for name, value in alone.member(0).state_dict().items():
        torch.testing.assert_close(both.member(1).state_dict()[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "x", "word"),
    [
        (lambda: GhostBatchNorm1d(3, 1), None, "at least 2"),
        (lambda: GhostBatchNorm1d(3, 2), torch.zeros(4, 5), "takes"),
        (lambda: GhostBatchNorm2d(3, 2), torch.zeros(4, 3), "takes"),
        (lambda: GhostBatchNorm1d(3, 2), torch.zeros(1, 3), "variance"),
    ],
)
def test_bad_input(layer, x, word):
    with pytest.raises(BadInput, match=word):
        layer()(x)


def test_a_network_without_batch_normalisation_is_refused():
    with pytest.raises(BadInput, match="Linear has no BatchNorm"):
        ghostify(nn.Linear(2, 2), 4)
