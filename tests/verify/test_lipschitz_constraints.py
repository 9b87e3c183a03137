"""What is claimed of each nonlinearity holds between any two of its inputs, in every encoding."""

import pytest
import torch
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.graph import ops as op
from corollary.verify.lipschitz import activation_qc
from corollary.verify.lipschitz.constraints import Bounded, Slopes, reflected_groups, sorted_groups
from corollary.verify.lipschitz.reading import SLOPES
from corollary.verify.sorting import GroupSort, Householder

DIRECTION = torch.tensor([0.6, -1.0, 0.3], dtype=torch.float64)
CONSECUTIVE = torch.arange(12).reshape(4, 3)
HALVES = torch.arange(12).reshape(2, 6).T


def pairs(width: int, count: int = 400) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(count, width, generator=generator, dtype=torch.float64)
    far = torch.randn(count, width, generator=generator, dtype=torch.float64)
    scale = 10 ** (4 * torch.rand(count, 1, generator=generator, dtype=torch.float64) - 3)
    return a, a + scale * far


def sorted_halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=1)
    return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)


def entry(low: float, high: float) -> Slopes:
    one = torch.ones(12, dtype=torch.float64)
    return Slopes("entries", low * one, high * one, pieces=True)


CASES = {
    "groupsort": (sorted_groups("sort", CONSECUTIVE), GroupSort(3), ("eliminate", "chain", "group")),
    "maxmin of halves": (
        sorted_groups("sort", HALVES),
        sorted_halves,
        ("eliminate", "chain", "group", "residual-relu"),
    ),
    "householder": (
        reflected_groups("reflect", CONSECUTIVE, DIRECTION.expand(4, 3)),
        Householder(DIRECTION),
        ("eliminate", "chain", "group"),
    ),
    "relu": (entry(0, 1), torch.relu, ("eliminate", "chain", "group", "residual-relu")),
    "leaky": (entry(0.1, 1), lambda x: nn.functional.leaky_relu(x, 0.1), ("eliminate", "chain")),
    "abs": (entry(-1, 1), torch.abs, ("eliminate", "chain")),
    "softmax": (Bounded("softmax", 12, 12, 0.5), lambda x: torch.softmax(x, 1), ("eliminate", "chain")),
}


@pytest.mark.parametrize("name", CASES)
def test_differences_obey_every_encoding(name):
    nonlinearity, function, methods = CASES[name]
    a, b = pairs(12)
    with torch.no_grad():
        z, w = a - b, function(a) - function(b)
    for method in methods:
        encoding = nonlinearity.encoding(method)
        free = torch.linalg.lstsq(encoding.push, (w - z @ encoding.center.T).T).solution.T
        # What is kept is kept exactly: the difference has no other part than the free one.
        size = z.abs().amax(1)
        assert ((z @ encoding.center.T + free @ encoding.push.T - w).abs().amax(1) <= 1e-11 * (1 + size)).all()
        terms = (z @ encoding.from_input.T + free @ encoding.from_free.T) ** 2 * encoding.weight
        forms = torch.zeros(len(z), len(encoding.steady), dtype=z.dtype).index_add_(1, encoding.owner, terms)
        assert (forms >= -1e-11 * (1 + size[:, None] ** 2)).all()
        zero = forms[:, encoding.either_sign]
        assert (zero.abs() <= 1e-11 * (1 + size[:, None] ** 2)).all()


@pytest.mark.parametrize("name", CASES)
def test_no_pair_is_stretched_by_more_than_the_gain(name):
    nonlinearity, function, _ = CASES[name]
    a, b = pairs(12)
    with torch.no_grad():
        z, w = a - b, function(a) - function(b)
    assert (w.norm(dim=1) <= nonlinearity.gain("l2") * z.norm(dim=1) * (1 + 1e-9)).all()
    assert (w.abs().amax(1) <= nonlinearity.gain("linf") * z.abs().amax(1) * (1 + 1e-9)).all()


def test_a_reflection_stretches_the_largest_entry():
    unit = DIRECTION / DIRECTION.norm()
    rows = (torch.eye(3, dtype=torch.float64) - 2 * torch.outer(unit, unit)).abs().sum(1)
    assert CASES["householder"][0].gain("linf") == pytest.approx(float(rows.max()))
    assert float(rows.max()) > 1.2


@pytest.mark.parametrize("kind", ["groupsort", "householder"])
def test_the_lemma_holds_for_any_free_multipliers(kind):
    generator = torch.Generator().manual_seed(2)
    v = DIRECTION if kind == "householder" else None
    layer = Householder(DIRECTION) if v is not None else GroupSort(3)
    lam, gam, nu, tau = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    matrix = activation_qc(kind, 4, 3, v)(lam.abs(), gam, nu, tau).matrix()
    a, b = pairs(12)
    with torch.no_grad():
        z, w = a - b, layer(a) - layer(b)
    both = torch.cat([z, w], dim=1)
    form = torch.einsum("si,ij,sj->s", both, matrix, both)
    kept = (z**2 - w**2).reshape(-1, 4, 3).sum(2) @ lam.abs()
    assert ((form - kept).abs() <= 1e-12 * (1 + (both**2).sum(1)) * matrix.abs().sum()).all()


def test_one_multiplier_for_each_entry_would_be_wrong():
    # (0, 1) against (0, 0): sorting moves the difference z = (0, 1) to w = (1, 0).
    z, w = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    unequal = torch.tensor([2.0, 1.0])
    assert float(unequal @ (z**2 - w**2)) < 0
    assert float(torch.ones(2) @ (z**2 - w**2)) == 0


@pytest.mark.parametrize(
    ("kind", "size", "v"),
    [("maxmin", 3, None), ("householder", 3, None), ("groupsort", 3, DIRECTION), ("relu", 2, None)],
)
def test_activation_qc_refuses_what_does_not_fit(kind, size, v):
    with pytest.raises(BadInput):
        activation_qc(kind, 2, size, v) if kind != "relu" else activation_qc("groupsort", 2, 2)(*-torch.ones(4, 2))


def test_residual_relu_is_for_pairs():
    for nonlinearity in (CASES["groupsort"][0], CASES["householder"][0]):
        with pytest.raises(BadInput, match="sort of two entries"):
            nonlinearity.encoding("residual-relu")


def test_selections_are_the_pieces():
    orders = CASES["groupsort"][0].selections
    assert orders.shape == (6, 2, 2)
    assert torch.allclose(orders @ orders.mT, torch.eye(2, dtype=torch.float64).expand(6, 2, 2), atol=1e-14)
    assert Bounded("softmax", 3, 3, 0.5).selections is None


@pytest.mark.parametrize("kind", SLOPES)
def test_the_listed_slopes_enclose_the_derivative(kind):
    x = torch.linspace(-12, 12, 240_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(kind()(x).sum(), x)
    low, high = SLOPES[kind]
    assert low <= float(slope.min()) < low + 2e-2
    assert high - 2e-2 < float(slope.max()) <= high
    assert op.Abs in SLOPES
