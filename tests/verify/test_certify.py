"""Verdicts against exact answers (integer programming, closed forms, brute force), and what must never be proved."""

import importlib
import itertools
import math
import time

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from cases import mlp
from corollary.base.errors import BadInput
from corollary.graph import Network, capture
from corollary.verify.branch_and_bound import Branching
from corollary.verify.certify import certify
from corollary.verify.falsify import falsify
from corollary.verify.sets import Ball, Box
from corollary.verify.specification import Case, Halfspaces, Specification
from corollary.verify.verdict import CertifyConfig

certify_module = importlib.import_module("corollary.verify.certify")  # the package's attribute is the function
DTYPES = [torch.float64, torch.float32]
SPLITS = ["inputs", "neurons"]
BOUNDS_ALONE = (0.0, 0.0)
"""No attack before the bounds: these find and prove by themselves."""


def by_bounds(split: str = "auto", dtype: torch.dtype | None = None, **options) -> CertifyConfig:
    return CertifyConfig(split=split, dtype=dtype, attack=BOUNDS_ALONE, **options)


def box(lower: list[float], upper: list[float]) -> Box:
    return Box(torch.tensor([lower], dtype=torch.float64), torch.tensor([upper], dtype=torch.float64))


def below(row: list[float], offset: float) -> Halfspaces:
    """Unsafe is row . y <= offset."""
    return Halfspaces(torch.tensor([row], dtype=torch.float64), torch.tensor([offset], dtype=torch.float64))


def both(*pieces: Halfspaces) -> Halfspaces:
    return Halfspaces(torch.cat([p.matrix for p in pieces]), torch.cat([p.offset for p in pieces]))


def asked(region: Box | Ball, *unsafe: Halfspaces) -> Specification:
    return Specification((Case(region, unsafe),))


def relu_net(seed: int, widths: tuple[int, ...], dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(dtype)


class Program:
    """A ReLU network over an input box as a mixed-integer linear program: variables x, then z, a, d of each layer."""

    def __init__(self, net: nn.Sequential, lower: np.ndarray, upper: np.ndarray, extra: int = 0):
        self.lower, self.upper = list(lower), list(upper)
        self.rows: list[tuple[dict[int, float], float, float]] = []
        self.integer = [0] * len(lower)
        here, low, high = list(range(len(lower))), np.asarray(lower, float), np.asarray(upper, float)
        for layer in net:
            if isinstance(layer, nn.Linear):
                weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
                middle, radius = (low + high) / 2, (high - low) / 2
                low = weight @ middle + bias - abs(weight) @ radius
                high = weight @ middle + bias + abs(weight) @ radius
                out = [self.variable(l, h) for l, h in zip(low, high, strict=True)]
                for row, offset, z in zip(weight, bias, out, strict=True):
                    self.rows.append(({**dict(zip(here, row, strict=True)), z: -1.0}, -offset, -offset))
            else:
                out = [self.relu(z, l, h) for z, l, h in zip(here, low, high, strict=True)]
                low, high = low.clip(min=0), high.clip(min=0)
            here = out
        self.outputs = here
        self.extra = [self.variable(0.0, np.inf) for _ in range(extra)]

    def variable(self, lower: float, upper: float, integer: int = 0) -> int:
        self.lower.append(lower)
        self.upper.append(upper)
        self.integer.append(integer)
        return len(self.lower) - 1

    def relu(self, z: int, low: float, high: float) -> int:
        a, on = self.variable(0.0, max(high, 0.0)), self.variable(0.0, 1.0, integer=1)
        self.rows += [({a: 1.0, z: -1.0}, 0.0, np.inf), ({a: 1.0, on: -max(high, 0.0)}, -np.inf, 0.0)]
        self.rows.append(({a: 1.0, z: -1.0, on: -min(low, 0.0)}, -np.inf, -min(low, 0.0)))
        return a

    def minimum(self, cost: dict[int, float]) -> float:
        c = np.zeros(len(self.lower))
        c[list(cost)] = list(cost.values())
        matrix = np.zeros((len(self.rows), len(self.lower)))
        for i, (row, _, _) in enumerate(self.rows):
            matrix[i, list(row)] = list(row.values())
        limits = LinearConstraint(matrix, [row[1] for row in self.rows], [row[2] for row in self.rows])
        found = milp(c, constraints=limits, integrality=self.integer, bounds=Bounds(self.lower, self.upper))
        assert found.success
        return float(found.fun)


def least(net: nn.Sequential, row: list[float], lower: list[float], upper: list[float]) -> float:
    program = Program(net, np.array(lower), np.array(upper))
    return program.minimum(dict(zip(program.outputs, row, strict=True)))


def nearest_violation(net: nn.Sequential, x: Tensor, label: int, classes: int, reach: float) -> float:
    """The least change of any input, in the infinity norm, that raises another class to the label."""
    center = x[0].double().numpy()
    found = []
    for other in set(range(classes)) - {label}:
        program = Program(net, center - reach, center + reach, extra=1)
        (radius,) = program.extra
        for i, value in enumerate(center):
            program.rows += [({i: 1.0, radius: -1.0}, -np.inf, value), ({i: 1.0, radius: 1.0}, value, np.inf)]
        program.rows.append(({program.outputs[label]: 1.0, program.outputs[other]: -1.0}, -np.inf, 0.0))
        found.append(program.minimum({radius: 1.0}))
    return min(found)


# --------------------------------------------------------------------------------------------- ReLU networks, exactly


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", SPLITS)
def test_thresholds_on_both_sides_of_the_exact_minimum(split, dtype):
    net = relu_net(1, (3, 6, 5, 2))
    lower, upper, row = [-1.0, -0.5, 0.0], [1.0, 1.0, 0.7], [1.0, -0.5]
    minimum = least(net, row, lower, upper)
    holds = certify(net, asked(box(lower, upper), below(row, minimum - 1e-3)), config=by_bounds(split, dtype))
    assert holds.status == "unsat"
    broken = certify(net, asked(box(lower, upper), below(row, minimum + 1e-3)), config=by_bounds(split, dtype))
    assert broken.status == "sat"
    assert broken.counterexample is not None
    assert float(broken.counterexample.y @ torch.tensor(row, dtype=torch.float64)) <= minimum + 1e-3


@pytest.mark.parametrize("split", SPLITS)
def test_robust_below_the_exact_distance_to_the_boundary_and_not_above(split):
    net = relu_net(4, (3, 8, 3))
    x = torch.tensor([[0.2, -0.1, 0.4]], dtype=torch.float64)
    label = int(net(x).argmax())
    distance = nearest_violation(net, x, label, 3, reach=3.0)
    config = CertifyConfig(split=split, attack=(0.1, 1.0))
    inside = certify(net, Specification.robustness(x, 0.99 * distance, label, 3), config=config)
    outside = certify(net, Specification.robustness(x, 1.01 * distance, label, 3), config=config)
    assert (inside.status, outside.status) == ("unsat", "sat")
    assert outside.counterexample is not None
    assert float((outside.counterexample.x - x).abs().max()) <= 1.01 * distance


@pytest.mark.parametrize("make", [lambda net: capture(net, torch.zeros(2, 3).double()), Network, lambda net: net])
def test_a_network_is_taken_as_module_graph_or_loaded(make):
    net = relu_net(0, (3, 4, 1))
    given = make("tiny", net, capture(net, torch.zeros(2, 3).double()), "") if make is Network else make(net)
    minimum = least(net, [1.0], [0.0] * 3, [1.0] * 3)
    region = box([0.0] * 3, [1.0] * 3)
    assert certify(given, asked(region, below([1.0], minimum - 1e-3)), config=by_bounds()).status == "unsat"
    assert certify(given, asked(region, below([1.0], minimum + 1e-3)), config=by_bounds()).status == "sat"


# ---------------------------------------------------------------------------------- what a specification's logic asks


class Signs(nn.Module):
    """x as relu(x) - relu(-x), and -x in the same way: nothing but neurons to split."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x) - torch.relu(-x)
        return torch.cat([x, -x], dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", SPLITS)
def test_a_conjunction_is_excluded_by_another_row_in_each_half(split, dtype):
    """y = (x, -x) is never <= -0.1 in both, though each is somewhere."""
    never = both(below([1.0, 0.0], -0.1), below([0.0, 1.0], -0.1))
    assert certify(Signs(), asked(box([-1.0], [1.0]), never), config=by_bounds(split, dtype)).status == "unsat"


@pytest.mark.parametrize("split", SPLITS)
def test_a_disjunction_needs_every_disjunct_excluded(split):
    """The first disjunct is impossible, the second occurs for x <= -0.5 alone: excluding one row is no proof."""
    never = both(below([1.0, 0.0], -0.1), below([0.0, 1.0], -0.1))
    found = certify(Signs(), asked(box([-1.0], [1.0]), never, below([1.0, 0.0], -0.5)), config=by_bounds(split))
    assert found.status == "sat"
    assert found.counterexample is not None
    assert float(found.counterexample.x) <= -0.5


@pytest.mark.parametrize("split", SPLITS)
def test_every_case_counts(split):
    """Two regions with their own unsafe sets; only the last is violated, and only its region may be searched for it."""
    low = Case(box([-1.0], [-0.5]), (below([0.0, 1.0], 0.4),))
    fine = Case(box([0.5], [1.0]), (below([1.0, 0.0], 0.4),))
    bad = Case(box([0.5], [1.0]), (below([0.0, 1.0], -0.9),))
    assert certify(Signs(), Specification((low, fine)), config=by_bounds(split)).status == "unsat"
    found = certify(Signs(), Specification((low, bad)), config=by_bounds(split))
    assert found.status == "sat"
    assert found.counterexample is not None
    assert 0.9 <= float(found.counterexample.x) <= 1.0


def test_unsafe_sets_are_closed():
    """y = x + 1 on [0, 1] reaches 1 exactly, at a corner."""
    net = nn.Linear(1, 1).double()
    nn.init.ones_(net.weight)
    nn.init.ones_(net.bias)
    assert certify(net, asked(box([0.0], [1.0]), below([1.0], 1.0)), config=by_bounds()).status == "sat"
    assert certify(net, asked(box([0.0], [1.0]), below([1.0], 1.0 - 1e-6)), config=by_bounds()).status == "unsat"


# --------------------------------------------------------------------------------------------- what splitting must do


def four_neurons() -> nn.Sequential:
    """relu(x) + relu(-x) - relu(x) - relu(-x) = 0, with each of them a neuron of its own."""
    net = nn.Sequential(nn.Linear(1, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]))
        net[2].weight.copy_(torch.tensor([[1.0, 1.0, -1.0, -1.0]]))
    return net


def test_four_neurons_that_cancel_are_proved_to_within_31_domains():
    """Every neuron is split at most once on each path; `test_planted` has the network that needs the multipliers."""
    found = certify(four_neurons(), asked(box([-1.0], [1.0]), below([1.0], -1e-6)), config=by_bounds("neurons"))
    assert found.status == "unsat"
    assert 1 < found.domains <= 31


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


@pytest.mark.parametrize("split", SPLITS)
def test_a_product_with_itself_needs_one_cut(split):
    found = certify(Square(), asked(box([-1.0], [1.0]), below([1.0], -1e-4)), config=by_bounds(split))
    assert found.status == "unsat"
    assert found.domains <= 3


def test_no_split_means_bounds_alone():
    found = certify(four_neurons(), asked(box([-1.0], [1.0]), below([1.0], -0.5)), config=by_bounds("none"))
    assert found.status == "unknown"
    assert found.reason


def test_an_affine_network_has_nothing_to_split():
    """y = x on [0, 1] is never both <= 0.1 and >= 0.9, which no single row shows, and there is no neuron to cut."""
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(net.weight)
    never = both(below([1.0], 0.1), below([-1.0], -0.9))
    assert certify(net, asked(box([0.0], [1.0]), never), config=by_bounds("neurons")).status == "unknown"
    assert certify(net, asked(box([0.0], [1.0]), never), config=by_bounds("inputs")).status == "unsat"


def test_a_point_short_of_the_margin_of_proof_is_unknown_and_not_cut_for_ever():
    """y = x at x = 0.5 against y <= 0.5 - 5e-10: true, but by less than what counts as proof."""
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(net.weight)
    found = certify(net, asked(box([0.5], [0.5]), below([1.0], 0.5 - 5e-10)), config=by_bounds("inputs"))
    assert found.status == "unknown"
    assert found.domains <= 3


@pytest.mark.parametrize("batch", [2, 3])
def test_a_leaf_that_cannot_be_proved_is_not_dropped_beside_others(batch):
    """In a ball no corner gives the search a point: a violated leaf stays open, and must not vanish from the queue."""
    config = by_bounds("neurons", branching=Branching(batch=batch, iterations=2, most=40))
    for seed in range(2):
        net = relu_net(seed, (2, 5, 1))
        with torch.no_grad():
            reached = float(net(_in_ball(20_000, 2)).min())
        found = certify(net, asked(Ball(torch.zeros(1, 2).double(), 1.0, 2.0), below([1.0], reached)), config=config)
        assert found.status != "unsat"


def _in_ball(count: int, inputs: int) -> Tensor:
    draw = torch.randn(count, inputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return draw / draw.norm(dim=1, keepdim=True).clamp(min=1.0)


# --------------------------------------------------------------------------------------------------- other operations


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh, Sine])
def test_smooth_networks_against_a_grid(activation, split):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 5), activation(), nn.Linear(5, 1)).double()
    axis = torch.linspace(-1, 1, 201, dtype=torch.float64)
    with torch.no_grad():
        minimum = float(net(torch.cartesian_prod(axis, axis)).min())
        # All three activations have slope at most 1, and no point is further than half a diagonal from the grid.
        slope = float(net[2].weight.abs() @ net[0].weight.norm(dim=1, keepdim=True))
    gap = slope * 0.01 * math.sqrt(0.5)
    region = box([-1.0, -1.0], [1.0, 1.0])
    assert certify(net, asked(region, below([1.0], minimum - gap)), config=by_bounds(split)).status == "unsat"
    assert certify(net, asked(region, below([1.0], minimum + 1e-9)), config=by_bounds(split)).status != "unsat"


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_images_with_convolution_and_pooling(pool, dtype):
    """Certified at a radius of which the interval bounds know nothing; and never where an attack has found a way."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), pool, nn.Flatten(), nn.Linear(27, 8), nn.ReLU(), nn.Linear(8, 3)
    ).to(dtype)
    x = torch.rand(1, 1, 6, 6, dtype=dtype)
    label = int(net(x).argmax())
    config = CertifyConfig(dtype=dtype, split="neurons", attack=(0.05, 1.0))
    small = certify(net, Specification.robustness(x, 0.005, label, 3, clip=(0.0, 1.0)), config=config)
    large = certify(net, Specification.robustness(x, 0.9, label, 3, clip=(0.0, 1.0)), config=config)
    assert (small.status, large.status) == ("unsat", "sat")
    assert large.counterexample is not None
    with torch.no_grad():
        assert int(net(large.counterexample.x.to(dtype)).argmax()) != label


@pytest.mark.parametrize("norm", [1.0, 2.0, 3.0, math.inf])
def test_balls_around_a_linear_classifier_by_their_dual_norm(norm):
    """The distance to the hyperplane w.x + b = 0 is |w.x + b| / ||w||_q, 1/p + 1/q = 1."""
    torch.manual_seed(0)
    net = nn.Linear(4, 2).double()
    x = torch.randn(1, 4, dtype=torch.float64)
    label = int(net(x).argmax())
    with torch.no_grad():
        difference = net.weight[label] - net.weight[1 - label]
        gap = float(net(x)[0, label] - net(x)[0, 1 - label])
    dual = 1.0 if math.isinf(norm) else math.inf if norm == 1 else norm / (norm - 1)
    distance = gap / float(torch.linalg.vector_norm(difference, dual))
    inside = certify(net, Specification.robustness(x, 0.999 * distance, label, 2, norm=norm), config=by_bounds())
    outside = certify(net, Specification.robustness(x, 1.02 * distance, label, 2, norm=norm), timeout=20.0)
    assert (inside.status, outside.status) == ("unsat", "sat")


@pytest.mark.parametrize("norm", [1.0, 2.0])
def test_balls_through_neurons_are_split_to_a_proof(norm):
    net = relu_net(5, (2, 5, 1))
    points = _in_ball(50_000, 2)
    points = points[torch.linalg.vector_norm(points, norm, dim=1) <= 1]
    with torch.no_grad():
        reached = float(net(points).min())
    ball = Ball(torch.zeros(1, 2).double(), 1.0, norm)
    # 50,000 points leave the minimum of a function of slope below 3 open by far less than 0.05.
    found = certify(net, asked(ball, below([1.0], reached - 0.05)), config=by_bounds("neurons"))
    assert found.status == "unsat"


# ------------------------------------------------------------------------------------------ what must never be proved


class Planted(nn.Module):
    """1 everywhere but within `width` of one hidden point, where it falls to -1; flat: gradients say nothing."""

    def __init__(self, hidden: list[float], width: float):
        super().__init__()
        self.hidden = nn.Parameter(torch.tensor([hidden], dtype=torch.float64))
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        away = torch.relu(x - self.hidden) + torch.relu(self.hidden - x)
        return 1 - 2 * torch.relu(1 - away.sum(1, keepdim=True) / self.width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", SPLITS)
def test_a_planted_counterexample_is_found_or_left_open_but_never_proved_away(split, dtype):
    net = Planted([0.3127, -0.7361], width=1e-3)
    specification = asked(box([-1.0, -1.0], [1.0, 1.0]), below([1.0], 0.0))
    with torch.no_grad():  # the trap is set: a million random points do not fall into it
        points = torch.rand(1_000_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
        assert float(net(points).min()) > 0
    found = certify(net, specification, timeout=1.0, config=by_bounds(split, dtype))
    assert found.status != "unsat"
    if split == "inputs" and dtype == torch.float64:
        assert found.status == "sat"


def test_a_margin_below_the_rounding_of_float32_is_no_proof():
    """y = x - x/3 - x/3 - x/3 is 0 but for rounding: no side of it is provable in float32 at 1e-8."""

    class Rounding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1e4 * (x - x / 3 - x / 3 - x / 3)

    region = box([0.9], [1.0])
    for sign in (1.0, -1.0):
        found = certify(
            Rounding(), asked(region, below([sign], -1e-8)), timeout=2.0, config=by_bounds("none", torch.float32)
        )
        assert found.status != "unsat"


def test_a_margin_of_the_size_of_rounding_is_proved_in_float64():
    """The second output is zero everywhere, and 1e-6 from unsafe: float32 allows for as much."""
    torch.manual_seed(0)
    net = mlp(24, 8, 8, 2)
    with torch.no_grad():
        net[4].weight[1], net[4].bias[1] = 0.0, 0.0
    region = Box(-torch.ones(1, 24).double(), torch.ones(1, 24).double())
    near = asked(region, below([0.0, -1.0], -1e-6), below([-1.0, 0.0], -1e3))
    assert certify(net, near, timeout=20.0, config=by_bounds()).status == "unsat"
    assert certify(net, near, timeout=2.0, config=by_bounds(dtype=torch.float32)).status != "unsat"
    for offset in (0.0, 1e-12):
        assert certify(net, asked(region, below([0.0, -1.0], offset)), timeout=2.0).status != "unsat"


# -------------------------------------------------------------------------------------------------- limits and misuse


def test_a_network_with_nan_is_refused_by_name():
    net = relu_net(0, (2, 3, 1))
    with torch.no_grad():
        net[2].weight[0, 1] = math.nan
    with pytest.raises(BadInput, match=r"2\.weight has 1 NaN of 3"):
        certify(net, asked(box([0.0, 0.0], [1.0, 1.0]), below([1.0], 0.0)))


def test_an_operation_without_bounds_is_unknown_with_the_reason():
    class Bessel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.i0(x)

    found = certify(Bessel(), asked(box([0.0], [1.0]), below([1.0], 0.0)), config=by_bounds())
    assert found.status == "unknown"
    assert "i0" in found.reason


@pytest.mark.parametrize(
    ("region", "unsafe", "said"),
    [
        (box([0.0], [1.0]), below([1.0], 0.0), "do network and property belong together"),
        (box([0.0, 0.0], [1.0, 1.0]), below([1.0, 0.0], 0.0), "about 2 outputs; the network has 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(region, unsafe, said):
    graph = capture(relu_net(0, (2, 3, 1)), torch.zeros(2, 2).double())
    with pytest.raises(BadInput, match=said):
        certify(graph, asked(region, unsafe))


def test_a_ball_is_not_split_by_its_inputs():
    region = Ball(torch.zeros(1, 2).double(), 1.0, 2.0)
    with pytest.raises(BadInput, match="in boxes only"):
        certify(relu_net(0, (2, 3, 1)), asked(region, below([1.0], -9.0)), config=by_bounds("inputs"))


def _hard() -> tuple[nn.Module, Specification]:
    """Proved only after thousands of cuts."""
    net = relu_net(7, (4, 12, 12, 1))
    minimum = least(net, [1.0], [-1.0] * 4, [1.0] * 4)
    return net, asked(box([-1.0] * 4, [1.0] * 4), below([1.0], minimum - 1e-5))


@pytest.mark.parametrize("split", SPLITS)
def test_the_time_limit_is_kept(split, monkeypatch):
    """By a clock that goes on whenever it is read: what follows the limit may read it a few times, and no more."""
    net, specification = _hard()
    graph = capture(net, torch.zeros(2, 4).double())
    now = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: 0.05 * next(now))
    found = certify(graph, specification, timeout=1.0, config=CertifyConfig(split=split))
    assert found.status == "timeout"
    assert 1.0 <= sum(found.seconds.values()) <= 1.5


def test_less_memory_means_fewer_boxes_at_once(monkeypatch):
    tried = []
    search = certify_module.split_inputs

    def poor(*args, at_once, **options):
        tried.append(at_once)
        if at_once is None or at_once > 20:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
        return search(*args, at_once=at_once, **options)

    monkeypatch.setattr(certify_module, "split_inputs", poor)
    net = relu_net(0, (3, 4, 1))
    minimum = least(net, [1.0], [0.0] * 3, [1.0] * 3)
    found = certify(net, asked(box([0.0] * 3, [1.0] * 3), below([1.0], minimum - 1e-3)), config=by_bounds())
    assert found.status == "unsat"
    assert tried == [None, 256, 64, 16]


def test_no_memory_at_all_is_unknown_and_a_bug_is_not_hidden(monkeypatch):
    def without(error):
        def search(*_, **__):
            raise error

        return search

    specification = asked(box([0.0, 0.0], [1.0, 1.0]), below([1.0], -9.0))
    net = relu_net(0, (2, 3, 1))
    monkeypatch.setattr(certify_module, "split_inputs", without(MemoryError()))
    found = certify(net, specification, config=by_bounds())
    assert (found.status, found.reason) == ("unknown", "the bounds of a single region do not fit into memory")
    monkeypatch.setattr(certify_module, "split_inputs", without(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        certify(net, specification, config=by_bounds())


# --------------------------------------------------------------------------------------------------- what is reported


def test_the_log_is_told_as_it_is_written_and_the_verdict_is_json_and_html():
    told: list[str] = []
    net = relu_net(0, (2, 3, 1))
    found = certify(net, asked(box([0.0, 0.0], [1.0, 1.0]), below([1.0], 9.0)), tell=told.append)
    assert told == found.log
    assert told
    content = found.as_json()
    assert content["verdict"] == "sat"
    assert len(content["counterexample"]["x"]) == 2
    assert content["seconds"].keys() == found.seconds.keys()
    assert "<b>sat</b>" in found._repr_html_()


def test_the_same_seed_finds_the_same_counterexample():
    net = relu_net(2, (3, 6, 2))
    minimum = least(net, [1.0, -1.0], [-1.0] * 3, [1.0] * 3)
    specification = asked(box([-1.0] * 3, [1.0] * 3), below([1.0, -1.0], minimum + 1e-3))
    first, again = (certify(net, specification, config=CertifyConfig(seed=5)) for _ in range(2))
    assert first.counterexample is not None
    assert again.counterexample is not None
    assert torch.equal(first.counterexample.x, again.counterexample.x)


def test_a_module_is_left_as_it_was():
    net = relu_net(0, (2, 3, 1)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    certify(net, asked(box([0.0, 0.0], [1.0, 1.0]), below([1.0], -9.0)), config=by_bounds())
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_the_attack_alone_finds_what_random_points_would():
    """The order of work: an easy violation is found before any bound."""
    net = relu_net(0, (2, 3, 1))
    specification = asked(box([0.0, 0.0], [1.0, 1.0]), below([1.0], 9.0))
    found = certify(net, specification)
    assert found.status == "sat"
    assert "linear bounds" not in found.seconds
    assert falsify(net, specification, generator=torch.Generator().manual_seed(0)) is not None
