"""Hidden counterexamples that training planted: bounds and searches must never prove them away.

Source: Zhou et al. 2024, arXiv 2412.03154 (SoundnessBench).
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from cases import mlp
from corollary.verify import branch_and_bound
from corollary.verify.branch_and_bound import Branching
from corollary.verify.certify import certify
from corollary.verify.known import Known
from corollary.verify.leaves import Constraints
from corollary.verify.prepared import Prepared
from corollary.verify.sets import Box, Region
from corollary.verify.specification import Case, Halfspaces, Specification
from corollary.verify.verdict import CertifyConfig, Verdict

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
DEPTH = 5e-3
"""How far below zero the output falls at the planted point; about 0.5 elsewhere."""
KEEP = 0.25
"""Training holds the output up at points of which some input differs by so much from the planted point."""


@cache
def planted(inputs: int, activation: str) -> tuple[nn.Module, Tensor]:
    """A network on [-1, 1]^n trained to be positive but near one hidden point, where it is -DEPTH; and the point."""
    generator = torch.Generator().manual_seed(10 * inputs + 1)
    hidden = 1.2 * torch.rand(1, inputs, generator=generator, dtype=torch.float64) - 0.6
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(inputs)
        net = mlp(inputs, 20, 12, 1, activation=ACTIVATIONS[activation]).double()
    first, last = net[0], net[-1]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    with torch.no_grad():  # steep neurons that bend near the point: what falls there has something to fall with
        first.weight.mul_(4.0 if activation == "relu" else 8.0)
        first.bias.copy_(-(first.weight @ hidden[0]) + 0.2 * torch.randn(20, generator=generator, dtype=torch.float64))
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(200):
        spread = 2 * torch.rand(128, inputs, generator=generator, dtype=torch.float64) - 1
        near = hidden + 0.5 * (2 * torch.rand(128, inputs, generator=generator, dtype=torch.float64) - 1)
        away = torch.cat([spread, near.clamp(-1, 1)])
        away = away[(away - hidden).abs().amax(1) >= KEEP]
        loss = (net(away) - 0.5).square().mean() + 5 * (net(hidden) + 0.05).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.no_grad():
        last.bias.sub_(net(hidden)[0] + DEPTH)
    return net.eval(), hidden


def certified(net: nn.Module, region: Box, split: str, dtype: torch.dtype, timeout: float) -> Verdict:
    """Whether the output falls to zero somewhere, by bounds alone."""
    unsafe = Halfspaces(torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    config = CertifyConfig(split=split, dtype=dtype, attack=(0.0, 0.0), iterations=10)  # type: ignore[arg-type]
    return certify(net, Specification((Case(region, (unsafe,)),)), timeout=timeout, config=config)


def around(point: Tensor, radius: float) -> Box:
    """A box around a point that is nowhere near its middle."""
    lopsided = torch.linspace(0.3, 1.7, point.shape[1], dtype=point.dtype)
    return Box((point - radius * lopsided).clamp(min=-1), (point + radius * (2 - lopsided)).clamp(max=1))


def uniform(region: Box, count: int) -> Tensor:
    share = torch.rand(count, *region.lower.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return region.lower + share * (region.upper - region.lower)


PLACES = [(2, "inputs"), (2, "neurons"), (5, "inputs"), (8, "inputs"), (16, "neurons")]


@pytest.mark.parametrize(("inputs", "activation"), [(n, name) for n in (2, 5, 8, 16) for name in ACTIVATIONS])
def test_the_trap_is_set(inputs: int, activation: str):
    """The planted point violates the property by little, and random points of the whole region hardly ever do."""
    net, hidden = planted(inputs, activation)
    region = Box(-torch.ones_like(hidden), torch.ones_like(hidden))
    with torch.no_grad():
        assert float(net(hidden)) == pytest.approx(-DEPTH)
        values = net(uniform(region, 2000))
    assert float(values.mean()) > 0.3
    allowed = 2e-2 if inputs == 2 else 0.0  # of two inputs the dip is no speck
    assert float((values <= 0).double().mean()) <= allowed


@pytest.mark.parametrize("radius", [0.02, 2.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("inputs", "split"), PLACES)
def test_a_region_with_the_planted_point_is_never_proved(inputs: int, split: str, activation: str, radius: float):
    net, hidden = planted(inputs, activation)
    dtype = torch.float32 if inputs in {5, 16} else torch.float64
    found = certified(net, around(hidden, radius), split, dtype, timeout=0.3)
    assert found.status != "unsat"
    if found.status == "sat":
        assert found.counterexample is not None
        with torch.no_grad():
            assert float(net(found.counterexample.x)) <= 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_of_two_inputs_the_planted_point_is_found(activation: str):
    net, hidden = planted(2, activation)
    assert certified(net, around(hidden, 0.05), "inputs", torch.float64, timeout=60.0).status == "sat"


@pytest.mark.parametrize("split", ["inputs", "neurons"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_region_without_the_neighbourhood_is_decided_as_dense_sampling_says(activation: str, split: str):
    """Of two inputs: a strip beside the point whose least value on a grid of step 0.0025 is well above zero."""
    net, hidden = planted(2, activation)
    axis = torch.linspace(-1, 1, 801, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        values = net(points)[:, 0]
    low = points[values <= 0.05, 0]
    start = float(low.max()) + 0.02  # right of everything that is low
    assert start < 0.95
    assert float(hidden[0, 0]) < start
    end = 1.0 if split == "inputs" else start + 0.02  # neurons are split for ever where inputs are cut a few times
    strip = Box(
        torch.tensor([[start, -1.0 if split == "inputs" else float(hidden[0, 1])]]).double(),
        torch.tensor([[end, 1.0 if split == "inputs" else float(hidden[0, 1]) + 0.02]]).double(),
    )
    found = certified(net, strip, split, torch.float64, timeout=60.0)
    assert found.status == "unsat"


# ------------------------------------------------------------------------------------------------- the four-ReLU trap


def four_relus() -> nn.Sequential:
    """y = relu(u) - 4 relu(w) - 1 with u = 4 a - b + 1, w = 0.5 - 3 b, a = relu(3 x + 1), b = relu(0.5 - 3 x).

    u <= 0 only where b >= 1, and w >= 0 only where b <= 1/6: never both, and y >= -1 everywhere. But with u held below
    zero and w above it, y = 12 b - 3 is -3 where b is 0, unless a multiplier says that there u is not below zero.
    """
    net = mlp(1, 2, 2, 1).double()
    values = ([[3.0], [-3.0]], [1.0, 0.5], [[4.0, -1.0], [0.0, -3.0]], [1.0, 0.5], [[1.0, -4.0]], [-1.0])
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), values, strict=True):
            parameter.copy_(torch.tensor(value))
    return net


def trapped(rate: float, iterations: int) -> Verdict:
    branching = Branching(rule="babsr", multiplier_rate=rate, iterations=iterations)
    config = CertifyConfig(split="neurons", dtype=torch.float64, attack=(0.0, 0.0), branching=branching)
    one = torch.ones(1, 1, dtype=torch.float64)
    unsafe = Halfspaces(one, torch.tensor([-1.75], dtype=torch.float64))
    return certify(four_relus(), Specification((Case(Box(-one, one), (unsafe,)),)), config=config, timeout=60.0)


def without_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves get no multipliers from linear programs, and the middle of the region for a worst point."""

    def nothing(
        network: Prepared, region: Region, known: Known, constraints: Constraints, slopes: Tensor, offsets: Tensor
    ) -> tuple[Tensor, Tensor]:
        return slopes.new_zeros(len(slopes), len(constraints.sign)), region.center.flatten()

    monkeypatch.setattr(branch_and_bound, "multipliers_and_point", nothing)


def test_the_property_of_the_four_relus_holds():
    with torch.no_grad():
        assert float(four_relus()(torch.linspace(-1, 1, 20001, dtype=torch.float64)[:, None]).min()) >= -1.0


def test_without_multipliers_the_four_relus_are_split_to_the_end_and_not_proved(monkeypatch: pytest.MonkeyPatch):
    without_programs(monkeypatch)
    found = trapped(rate=0.0, iterations=2)
    assert found.status == "unknown"
    assert found.reason == "nothing was left to split"
    assert found.worst is not None
    assert found.worst < -0.4


def test_with_multipliers_by_gradient_alone_they_are_proved(monkeypatch: pytest.MonkeyPatch):
    without_programs(monkeypatch)
    assert trapped(rate=0.3, iterations=20).status == "unsat"


def test_with_multipliers_by_linear_programs_alone_they_are_proved():
    assert trapped(rate=0.0, iterations=2).status == "unsat"
