"""Certified Lipschitz bounds: closed forms, a second solver, attacks, and certificates that can fail."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.verify.lipschitz import (
    Certificate,
    Equilibrium,
    NotWellPosed,
    lipschitz_bound,
    lipschitz_enumerate,
    lipschitz_lower,
    robust_radius,
    system_of,
)
from corollary.verify.lipschitz.certificate import certify
from corollary.verify.lipschitz.interior import minimise
from corollary.verify.lipschitz.program import program
from corollary.verify.lipschitz.start import strictly_feasible
from corollary.verify.sorting import GroupSort, Householder, MaxMin


def gaussian(sizes, activation, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for width, after in itertools.pairwise(sizes):
        layer = nn.Linear(width, after, dtype=torch.float64)
        weight = torch.randn(after, width, generator=generator, dtype=torch.float64) / width**0.5
        layer.load_state_dict({"weight": weight, "bias": torch.randn(after, generator=generator, dtype=torch.float64)})
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1])


def between_identities(layer, width):
    ends = [nn.Linear(width, width, bias=False, dtype=torch.float64) for _ in range(2)]
    for end in ends:
        end.load_state_dict({"weight": torch.eye(width, dtype=torch.float64)})
    return nn.Sequential(ends[0], layer, ends[1])


# ------------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(
    ("layer", "width"), [(MaxMin(), 6), (GroupSort(4), 8), (Householder(torch.tensor([0.3, -2.0, 1.0]).double()), 6)]
)
@pytest.mark.parametrize("method", ["eliminate", "chain", "product"])
def test_one_layer_that_sorts_or_reflects_has_constant_one(layer, width, method):
    bound = lipschitz_bound(between_identities(layer, width), method=method, tolerance=1e-8)
    assert 1 - 1e-12 <= bound.value <= 1 + 1e-6


def test_maxmin_as_two_relus_gets_root_two():
    bound = lipschitz_bound(between_identities(MaxMin(), 2), method="residual-relu", tolerance=1e-8)
    assert bound.value == pytest.approx(math.sqrt(2), abs=1e-6)


@pytest.mark.parametrize("depth", [2, 5])
def test_orthogonal_maxmin_networks_have_constant_one(depth):
    torch.manual_seed(0)
    layers = []
    for _ in range(depth):
        layers += [nn.Linear(8, 8, dtype=torch.float64), MaxMin()]
        with torch.no_grad():
            nn.init.orthogonal_(layers[-2].weight)
    bound = lipschitz_bound(nn.Sequential(*layers))
    assert 1 - 1e-12 <= bound.value <= 1 + 1e-3
    assert lipschitz_bound(nn.Sequential(*layers), method="residual-relu").value > 1.2


def test_a_chain_of_scalars_is_its_product():
    # x -> 2 relu(-3 x): steepest where the ReLU is on; and |.| has slopes of both signs.
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).double()
    net[0].weight.data.fill_(-3.0)
    net[2].weight.data.fill_(2.0)
    assert lipschitz_bound(net, tolerance=1e-9).value == pytest.approx(6, rel=1e-8)
    assert lipschitz_bound(net, "linf", tolerance=1e-9).value == pytest.approx(6, rel=1e-8)


def test_two_relus_are_unrelated_to_their_constraints():
    # relu(x) - relu(-x) = x has constant 1, and entrywise slopes allow both ReLUs to be on: 2, as the product of norms.
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    net[0].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
    net[2].weight.data.copy_(torch.tensor([[1.0, -1.0]]))
    assert lipschitz_bound(net, method="product").value == pytest.approx(2)
    assert lipschitz_bound(net, tolerance=1e-9).value == pytest.approx(2, rel=1e-7)


def test_a_linear_network_is_exact_and_a_constant_one_has_zero():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    matrix = (net[1].weight @ net[0].weight).detach()
    assert lipschitz_bound(net).value == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-9)
    assert lipschitz_bound(net, "linf", output=1).value == pytest.approx(float(matrix[1].abs().sum()), rel=1e-9)
    flat = gaussian((3, 4, 2), MaxMin)
    flat[2].weight.data.zero_()
    assert lipschitz_bound(flat).value == 0


def test_one_relu_for_a_pair_equals_elimination():
    # max = b + relu(a - b), min = a - relu(a - b) with one ReLU keeps the sum by construction.
    class OneRelu(nn.Module):
        def forward(self, x):
            a, b = x.unflatten(1, (-1, 2)).unbind(2)
            r = torch.relu(a - b)
            return torch.stack([b + r, a - r], dim=2).flatten(1)

    for sizes in ((6, 8, 3), (6, 8, 8, 3)):
        ours, plain = (lipschitz_bound(gaussian(sizes, kind)).value for kind in (MaxMin, OneRelu))
        assert ours == pytest.approx(plain, rel=1e-5)


# ----------------------------------------------------------------------------------------------- order, and soundness


@pytest.mark.parametrize("activation", [MaxMin, lambda: GroupSort(3), lambda: Householder(12), nn.Tanh])
def test_slope_found_below_every_bound_and_elimination_the_least(activation):
    torch.manual_seed(0)
    net = gaussian((6, 12, 12, 4), activation)
    net.double()
    found = lipschitz_lower(net, samples=3000)
    system = system_of(net)
    best = lipschitz_bound(system)
    chain, product = (lipschitz_bound(system, method=method).value for method in ("chain", "product"))
    assert found <= best.value <= chain * (1 + 1e-5)
    assert chain <= product * (1 + 1e-5)
    assert best.value < 0.95 * product
    assert best.lmi_min_eig is not None
    assert best.lmi_min_eig > 0
    assert best.gap is not None
    assert best.gap <= 1e-6


def test_sorted_networks_within_a_few_percent_of_the_largest_pattern():
    for seed in range(2):
        net = gaussian((6, 12, 4), MaxMin, seed)
        exact = lipschitz_enumerate(net)
        assert exact * (1 - 1e-9) <= lipschitz_bound(net).value <= 1.06 * exact


def test_the_largest_entry_bound_holds_for_pairs_and_is_below_the_product():
    net = gaussian((6, 12, 12, 4), MaxMin)
    bound = lipschitz_bound(net, "linf", output=2)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(20_000, 6, generator=generator, dtype=torch.float64)
    step = torch.randn(20_000, 6, generator=generator, dtype=torch.float64).sign() * torch.rand(20_000, 1).double()
    with torch.no_grad():
        slopes = (net(x + step) - net(x))[:, 2].abs() / step.abs().amax(1)
    assert float(slopes.max()) <= lipschitz_lower(net, "linf", 5000, output=2) * 1.2
    assert float(slopes.max()) <= bound.value
    assert lipschitz_lower(net, "linf", 5000, output=2) <= bound.value
    assert bound.value < 0.5 * lipschitz_bound(net, "linf", "product", output=2).value
    weights = torch.eye(4)[2]
    assert lipschitz_bound(net, "linf", output=weights).value == pytest.approx(bound.value, rel=1e-9)


def test_inputs_that_nothing_reads_change_nothing():
    net = gaussian((40, 6, 3), MaxMin)
    wide = lipschitz_bound(net)
    assert wide.certificate is not None
    assert wide.certificate.program.coordinates == 43
    q = torch.linalg.qr(net[0].weight.detach().T).Q
    small = nn.Sequential(nn.Linear(6, 6, dtype=torch.float64), *net[1:])
    small[0].weight.data = net[0].weight.detach() @ q
    assert wide.value == pytest.approx(lipschitz_bound(small).value, rel=1e-6)


# ------------------------------------------------------------------------------------------------------- certificates


def test_a_certificate_holds_and_less_does_not():
    bound = lipschitz_bound(gaussian((6, 8, 8, 3), MaxMin))
    proof = bound.certificate
    assert proof is not None
    assert proof.holds()
    assert proof.roundoff < proof.margin
    assert "smallest eigenvalue" in str(bound)
    for change in (
        lambda y: torch.cat([y[:1] * (1 - 1e-6), y[1:]]),
        lambda y: torch.cat([y[:1], 0.9 * y[1:]]),
        torch.neg,
    ):
        assert not dataclasses.replace(proof, multipliers=change(proof.multipliers)).holds()
    nan = torch.full_like(proof.multipliers, math.nan)
    assert not dataclasses.replace(proof, multipliers=nan).holds()


def test_any_point_is_repaired_into_a_certificate():
    system = system_of(gaussian((6, 8, 8, 3), MaxMin)).balanced()
    best = lipschitz_bound(system).value
    problem = program(system, "eliminate", "l2")
    safe = strictly_feasible(problem)
    poor = minimise(problem.atoms, problem.objective, problem.either_sign, safe, tolerance=1e-6).y
    for y in (poor * (1 + 0.01 * torch.sin(torch.arange(len(poor)))), 0.99 * poor, torch.zeros_like(poor), -poor):
        proof = certify(problem, y, safe)
        assert isinstance(proof, Certificate)
        assert proof.holds()
        assert proof.value >= best * (1 - 1e-6)
    assert certify(problem, 0.999 * poor, safe).value <= 1.05 * best


def test_the_rounding_bound_covers_what_float32_does_to_the_matrix():
    # The bound is linear in the unit roundoff: the matrix made in float32 must lie within it at 2^29 times the unit.
    problem = program(system_of(gaussian((6, 8, 8, 8, 3), nn.ReLU)).balanced(), "eliminate", "l2")
    y = strictly_feasible(problem)
    columns = torch.exp2((-problem.atoms.matrix(y).diagonal().log2() / 2).round())
    atoms = problem.scaled(columns)
    coarse = dataclasses.replace(atoms, rows=atoms.rows.float().double()).matrix(y)
    off = float(torch.linalg.matrix_norm(coarse - atoms.matrix(y), 2))
    assert 0 < off <= atoms.roundoff(y) * 2**29
    assert atoms.roundoff(y) < 1e-9


@pytest.mark.slow
def test_a_deep_network_is_still_certified():
    bound = lipschitz_bound(gaussian((8, *(8,) * 12, 4), MaxMin), tolerance=1e-4)
    assert bound.certificate is not None
    assert bound.certificate.holds()
    assert bound.value < 0.2 * lipschitz_bound(gaussian((8, *(8,) * 12, 4), MaxMin), method="product").value


# --------------------------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("method", ["eliminate", "chain", "residual-relu"])
def test_a_general_solver_finds_the_same(norm, method):
    pytest.importorskip("cvxpy")
    system = system_of(gaussian((5, 8, 8, 1), MaxMin))
    ours, peer = (lipschitz_bound(system, norm, method, solver=solver) for solver in ("structured", "clarabel"))
    assert ours.value == pytest.approx(peer.value, rel=2e-6)
    assert peer.certificate is not None
    assert peer.status == "optimal"


def test_free_multipliers_of_what_is_kept_give_the_same_as_elimination():
    pytest.importorskip("cvxpy")
    for layer in (MaxMin, lambda: Householder(torch.tensor([1.0, -2.0, 0.5, 0.2]).double())):
        system = system_of(gaussian((5, 8, 8, 3), layer))
        group, ours = lipschitz_bound(system, method="group"), lipschitz_bound(system)
        assert group.value == pytest.approx(ours.value, rel=1e-3)
        assert lipschitz_bound(system, method="chain").value > 1.02 * ours.value


def test_scs_is_repaired_to_a_bound():
    pytest.importorskip("cvxpy")
    system = system_of(gaussian((5, 6, 3), MaxMin))
    rough = lipschitz_bound(system, solver="scs", options={"eps": 1e-2})
    best = lipschitz_bound(system).value
    assert best * (1 - 1e-6) <= rough.value <= 1.2 * best


# ----------------------------------------------------------------------------------------------------- implicit layers


def scalar(a: float) -> Equilibrium:
    return Equilibrium(torch.tensor([[a]]).double(), torch.tensor([[2.0]]).double(), torch.zeros(1).double(), nn.ReLU())


@pytest.mark.parametrize("a", [-3.0, -0.5, 0.0, 0.5, 0.9])
def test_an_equilibrium_of_one_relu_has_the_slope_of_its_solution(a):
    # w = relu(a w + 2 x) is relu(2 x) / (1 - a) for every a < 1.
    assert lipschitz_bound(scalar(a), tolerance=1e-8).value == pytest.approx(2 / (1 - a), rel=1e-6)


def test_no_solution_or_two_are_not_certified():
    for a in (1.0, 1.5):
        with pytest.raises(NotWellPosed, match="exactly one"):
            lipschitz_bound(scalar(a))


@pytest.mark.parametrize("activation", [nn.ReLU(), MaxMin(), Householder(6), nn.Tanh()], ids=str)
def test_equilibria_are_bounded_inside_networks(activation):
    torch.manual_seed(0)
    state = torch.randn(6, 6)
    state = 0.9 * state / torch.linalg.matrix_norm(state, 2)
    layer = Equilibrium(state, torch.randn(6, 4), torch.randn(6), activation, tolerance=1e-9)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), layer, nn.Linear(6, 2)).double()
    bound = lipschitz_bound(net)
    found = lipschitz_lower(net, samples=300, refine=False)
    assert found <= bound.value * (1 + 1e-6)
    assert bound.value <= 2 * found
    assert bound.value < 0.5 * lipschitz_bound(net, method="product").value
    with pytest.raises(BadInput, match="group"):
        lipschitz_bound(net, method="group")


def test_an_equilibrium_solves_its_equation_or_says_that_it_did_not():
    layer = scalar(0.5)
    x = torch.tensor([[1.0], [-1.0]]).double()
    assert layer(x).detach().flatten().tolist() == pytest.approx([4.0, 0.0], abs=1e-4)
    with pytest.raises(NotWellPosed, match="not solved"):
        scalar(1.5)(x)
    with pytest.raises(BadInput, match="W \\(n, n\\)"):
        Equilibrium(torch.zeros(2, 3), torch.zeros(2, 1), torch.zeros(2), nn.ReLU())
    double = nn.Sequential(nn.ReLU(), nn.Linear(1, 1), nn.ReLU())
    with pytest.raises(BadInput, match="one nonlinearity"):
        lipschitz_bound(Equilibrium(torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1), double))


# ------------------------------------------------------------------------------------------------------------ the rest


def test_robust_radius_is_the_margin_over_root_two():
    net = gaussian((4, 6, 3), MaxMin)
    x = torch.randn(5, 4, dtype=torch.float64)
    best = net(x).detach().topk(2, dim=1).values
    bound = lipschitz_bound(net)
    assert torch.allclose(robust_radius(net, x, bound), (best[:, 0] - best[:, 1]) / (math.sqrt(2) * bound.value))
    with pytest.raises(BadInput, match="l-infinity"):
        robust_radius(net, x, lipschitz_bound(net, "linf", output=0))
    with pytest.raises(BadInput, match="two outputs"):
        robust_radius(gaussian((4, 6, 1), MaxMin), x, 1.0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"norm": "linf"}, "pass output="),
        ({"norm": "linf", "output": 7}, "output 7 does not exist"),
        ({"norm": "linf", "output": torch.ones(5)}, "one weight for each of 3"),
        ({"method": "group", "solver": "structured"}, "grow without limit"),
    ],
)
def test_misuse_is_said(arguments, text):
    with pytest.raises(BadInput, match=text):
        lipschitz_bound(gaussian((4, 6, 3), MaxMin), **arguments)
