"""Networks as linear maps between nonlinearities: what is read gives back the network's derivatives."""

import pytest
import torch
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.graph import capture
from corollary.verify.lipschitz import System, UnsupportedLayer, lipschitz_bound, lipschitz_lower, system_of
from corollary.verify.lipschitz.constraints import Groups, Slopes
from corollary.verify.sorting import GroupSort, Householder, MaxMin


class Residual(nn.Module):
    """x - f(x) / 2, twice as wide inside."""

    def __init__(self, width: int, activation: nn.Module):
        super().__init__()
        self.into, self.back, self.activation = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), activation

    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5 * self.back(self.activation(self.into(x)))


class Halves(nn.Module):
    """MaxMin of the halves, written with maximum and minimum."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.inner, self.function = nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner(x))


def dense(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers).double().eval()


def network(name: str) -> tuple[nn.Sequential, tuple[int, ...]]:
    torch.manual_seed(0)
    return {
        "chain": (dense(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), MaxMin(), nn.Linear(6, 3)), (4,)),
        "residual": (dense(Residual(4, nn.ReLU()), Residual(4, MaxMin()), nn.Linear(4, 3)), (4,)),
        "halves": (dense(nn.Linear(4, 6), Halves(), nn.Linear(6, 3)), (4,)),
        "householder": (dense(nn.Linear(4, 6), Householder(6), nn.Linear(6, 3)), (4,)),
        "shared": (dense(nn.Linear(4, 4), *[Householder(torch.rand(2))] * 2, nn.Linear(4, 3)), (4,)),
        "convolution": (
            dense(nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), GroupSort(2), nn.Conv2d(4, 2, 2), nn.PReLU(2), nn.Flatten()),
            (1, 4, 4),
        ),
        "skip around": (
            dense(nn.Linear(4, 5), nn.LeakyReLU(0.2), nn.Dropout(0.5), nn.Linear(5, 3), nn.Hardtanh()),
            (4,),
        ),
    }[name]


NAMES = ("chain", "residual", "halves", "householder", "shared", "convolution", "skip around")


def derivative(system: System, net: nn.Module, x: Tensor) -> float:
    """How far the network's change along a tiny segment is from some choice of the free directions in the system."""
    step = 1e-7 * torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=x.dtype)
    with torch.no_grad():
        change = (net(x + step) - net(x)).flatten(1)[0] / 1e-7
    z0 = step.flatten() / 1e-7
    # Every nonlinearity gives w = C z + V s: the changes that are possible form an affine space around the true one.
    free = [unit.nonlinearity.encoding("eliminate") for unit in system.units]
    width = sum(e.push.shape[1] for e in free)
    sources, used = torch.cat([z0[:, None], torch.zeros(len(z0), width)], dim=1), 0
    for unit, encoding in zip(system.units, free, strict=True):
        read = unit.map[:, : len(sources)] @ sources
        output = encoding.center @ read
        output[:, 1 + used : 1 + used + encoding.push.shape[1]] += encoding.push
        used += encoding.push.shape[1]
        sources = torch.cat([sources, output])
    space = system.scale * system.output @ sources
    solved = torch.linalg.lstsq(space[:, 1:], (change - space[:, 0])[:, None], driver="gelsd").solution
    return float((space[:, 1:] @ solved - (change - space[:, 0])[:, None]).norm())


@pytest.mark.parametrize("name", NAMES)
def test_every_jacobian_is_one_that_the_system_allows(name):
    net, shape = network(name)
    example = torch.zeros(2, *shape, dtype=torch.float64)
    system = system_of(net, example)
    generator = torch.Generator().manual_seed(3)
    for form in (system, system.balanced()):
        x = torch.randn(1, *shape, generator=generator, dtype=torch.float64)
        assert derivative(form, net, x) < 1e-6
    # The whole of it: with all slopes free, no Jacobian can be larger than the bound.
    bound = lipschitz_bound(system, tolerance=1e-4).value
    found = lipschitz_lower(net, samples=400, refine=False, example=example)
    assert found <= bound <= 3 * found


def test_a_network_without_nonlinearities_is_its_matrix():
    torch.manual_seed(0)
    net = dense(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(12, 4))
    system = system_of(net, torch.zeros(2, 2, 5))
    x = torch.randn(6, 2, 5, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(x.flatten(1) @ system.output.T, net(x) - net(torch.zeros_like(x)), atol=1e-12)


def test_activations_are_known_by_their_kind():
    net, _ = network("householder")
    (unit,) = system_of(net).units
    assert isinstance(unit.nonlinearity, Groups)
    assert not unit.nonlinearity.sorts
    (unit,) = system_of(capture(net, torch.zeros(2, 4, dtype=torch.float64))).units
    assert isinstance(unit.nonlinearity, Slopes)  # a graph does not say what class a layer was; the bound is the same
    assert len(system_of(network("halves")[0]).units) == 1  # maximum and minimum share their distance


def test_systems_compose():
    torch.manual_seed(0)
    first, second = dense(nn.Linear(4, 6), MaxMin(), nn.Linear(6, 5)), dense(nn.ReLU(), nn.Linear(5, 3))
    apart = system_of(first).then(system_of(second, torch.zeros(2, 5)))
    whole = system_of(nn.Sequential(first, second))
    assert torch.allclose(apart.output, whole.output)
    assert all(torch.allclose(a.map, b.map, atol=1e-14) for a, b in zip(apart.units, whole.units, strict=True))


def test_balancing_changes_no_product():
    system = system_of(network("residual")[0])
    for norm in ("l2", "linf"):
        assert system.balanced().gains(norm)[-1] == pytest.approx(system.gains(norm)[-1], rel=1e-12)
    assert all(0.4 < gain < 2.5 for gain in system.balanced().gains("l2")[1:-1])


def test_the_product_sums_over_paths():
    torch.manual_seed(0)
    block = Residual(4, nn.ReLU()).double()
    norm = lambda w: float(torch.linalg.matrix_norm(w.detach(), 2))  # noqa: E731
    expected = 1 + 0.5 * norm(block.back.weight) * norm(block.into.weight)
    assert system_of(nn.Sequential(block)).gains("l2")[-1] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("net", "text"),
    [
        (dense(nn.Linear(4, 4), nn.LayerNorm(4)), "LayerNorm.*layer '1'"),
        (dense(Calls(lambda y: y * y)), "multiplies or compares"),
        (dense(Calls(lambda y: y - y.mean(0))), "mixes samples"),
        (dense(Calls(torch.exp)), "Exp.*no bound that is known"),
    ],
)
def test_a_layer_that_no_bound_passes_is_a_type_error(net, text):
    with pytest.raises(TypeError, match=text) as error:
        system_of(net)
    assert isinstance(error.value, UnsupportedLayer)


def test_what_cannot_be_bounded_is_said():
    with pytest.raises(BadInput, match="pass example="):
        system_of(nn.Sequential(nn.Conv2d(1, 2, 3)))
    with pytest.raises(BadInput, match="at most 6000"):
        system_of(dense(nn.Linear(4, 7000), nn.ReLU()))
    with pytest.raises(BadInput, match="does not depend"):
        system_of(dense(Calls(lambda y: torch.zeros_like(y))))
