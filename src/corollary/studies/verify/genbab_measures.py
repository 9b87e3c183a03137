"""What the study `genbab` measures: instances on digits, areas of cuts, random graphs attacked, real instances."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from corollary.data import digits
from corollary.engine import fit
from corollary.graph import Graph, Node, ops, values
from corollary.graph.builder import Builder
from corollary.verify.attacks import pgd
from corollary.verify.batch import certify_files
from corollary.verify.bounded_graph import BoundedGraph
from corollary.verify.branch_and_bound import Branching, split_neurons
from corollary.verify.branching import Neurons, middle_points
from corollary.verify.branching_points import total_area
from corollary.verify.domain_bounds import Root
from corollary.verify.known import Known
from corollary.verify.linear_bounds import Splits, lower_bounds
from corollary.verify.prepared import Prepared, prepare
from corollary.verify.queries import Queries
from corollary.verify.relaxations import Lines, Relaxation, relaxation
from corollary.verify.relaxations.contacts import Curve
from corollary.verify.relaxations.offset_rule import OffsetRule
from corollary.verify.relaxations.s_shaped import sigmoid_curve, tanh_curve
from corollary.verify.relaxations.smooth import gelu_curve
from corollary.verify.search import Margin
from corollary.verify.sets import Box
from corollary.verify.slopes import Ascent, optimised
from corollary.verify.specification import Specification
from corollary.verify.sweep import sweep

RADII = {"sin": 0.04, "sigmoid": 0.05, "tanh": 0.045}
RULES: tuple[Literal["bbps", "babsr", "random"], ...] = ("bbps", "babsr", "random")


class Sine(nn.Module):
    """sin as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"sin": Sine, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


def trained(activation: str, epochs: int, seed: int) -> nn.Module:
    """A network 64-32-32-10 on digits, by Adam on all samples at once."""
    data = digits(dtype=torch.float64)
    assert data.train.y is not None
    make = ACTIVATIONS[activation]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 32), make(), nn.Linear(32, 32), make(), nn.Linear(32, 10)).double()
    run = fit(net, (data.train.x, data.train.y), epochs=epochs, optimizer=lambda p: torch.optim.Adam(p, lr=5e-3))
    return run.module.eval()


@dataclass(frozen=True, eq=False)
class Instances:
    """Images near which linear bounds prove nothing and an attack finds nothing.

    Args:
        x, y: (image, 64) and (image,).
        bounds: the least linear bound of the margins, (image,).
    """

    net: nn.Module
    x: Tensor
    y: Tensor
    radius: float
    bounds: Tensor

    @classmethod
    def hardest_to_bound(
        cls, net: nn.Module, radius: float, count: int, steps: int, generator: torch.Generator
    ) -> "Instances":
        """Of the images that linear bounds fail at and PGD cannot break, those with the largest bound."""
        test = digits(dtype=torch.float64).test
        assert test is not None
        assert test.y is not None
        right = net(test.x).argmax(1) == test.y
        x, y = test.x[right], test.y[right]
        rows = torch.eye(10, dtype=x.dtype)[y][:, None] - torch.eye(10, dtype=x.dtype)
        rows = rows[y[:, None] != torch.arange(10)].reshape(len(x), 9, 10)
        lower, _ = BoundedGraph(net, x[:2]).bounds(Box((x - radius).clamp(0, 1), (x + radius).clamp(0, 1)), rows)
        bound = lower.amin(1)
        failed = (bound <= 0).nonzero()[:, 0]
        failed = failed[~broken(net, x[failed], y[failed], radius, 5, steps, generator)]
        chosen = failed[bound[failed].argsort(descending=True)][:count]
        return cls(net, x[chosen], y[chosen], radius, bound[chosen])

    def specifications(self) -> list[Specification]:
        """Robustness of each image within the range of pixels."""
        pairs = zip(self.x.split(1), self.y.tolist(), strict=True)
        return [Specification.robustness(x, self.radius, label, 10, clip=(0, 1)) for x, label in pairs]


def broken(
    net: nn.Module, x: Tensor, y: Tensor, radius: float, restarts: int, steps: int, generator: torch.Generator
) -> Tensor:
    """Which images projected gradient on the margin brings to another class."""
    found = pgd(
        net, x, y, radius, steps=steps, restarts=restarts, loss="margin", clip=(0, 1), stop_early=True,
        generator=generator,
    )  # fmt: skip
    with torch.no_grad():
        return net(found).argmax(1) != y


def rooted(network: Prepared, specification: Specification, iterations: int) -> tuple[Queries, Root]:
    """What is open after the first bounds, optimised with so many steps."""
    margin = Margin.for_dtype(network.dtype)
    query = Queries.of(specification, network.dtype, network.device)
    output = network.graph.outputs[0]
    found = sweep(network, [query.region])
    best = optimised(network, output, query.on(output), [query.region], found, ascent=Ascent(iterations))
    bound = lower_bounds(network, output, query.on(output), [query.region], best.known, free=best.free)
    lower = margin.below(bound, query.offsets)
    open_ = query.open & ~(query.margins(lower) > 0)
    return replace(query, open=open_), Root(best.known, best.free, lower)


def searched(
    network: Prepared, specification: Specification, branching: Branching, iterations: int, generator: torch.Generator
) -> tuple[bool, int]:
    """Whether branch and bound proves a property, and in how many subdomains; none where first bounds do."""
    with torch.no_grad():
        query, root = rooted(network, specification, iterations)
        if not bool(query.open.any()):
            return True, 0
        margin = Margin.for_dtype(network.dtype)
        outcome = split_neurons(
            network, query, root, margin, deadline=time.monotonic() + 60, branching=branching, generator=generator
        )
    return outcome.status == "proved", outcome.domains


def compared_rules(
    activation: str, count: int, domains: int, epochs: int, steps: int, generator: torch.Generator
) -> dict[str, Any]:
    """The rules on the same instances, with bounds that nothing optimises; and the whole engine beside them."""
    net = trained(activation, epochs, 0)
    found = Instances.hardest_to_bound(net, RADII[activation], count, steps, generator)
    network = prepare(net, found.x[:1].expand(2, -1))
    columns: dict[str, list[Any]] = {"net": [activation] * len(found.x), "bound": found.bounds.tolist()}
    plain = Branching(candidates=1, batch=16, iterations=0, points=middle_points, most=domains)
    settings: dict[str, tuple[Branching, int]] = {rule: (replace(plain, rule=rule), 0) for rule in RULES}
    settings["optimised"] = (Branching(iterations=0, most=1), 20)
    settings["engine"] = (Branching(rule="bbps", most=domains), 20)
    for name, (branching, iterations) in settings.items():
        ends = [searched(network, s, branching, iterations, generator) for s in found.specifications()]
        columns[f"{name}_proved"], columns[f"{name}_domains"] = ([end[i] for end in ends] for i in (0, 1))
    columns["broken"] = broken(net, found.x, found.y, found.radius, 50, steps, generator).tolist()
    return columns


# ------------------------------------------------------------------------------------------------------------- cuts


@dataclass(frozen=True, eq=False)
class ChordRule(Relaxation):
    """Both lines parallel to the chord, at the offsets that fit."""

    curve: Curve
    pieces: tuple[float, ...]

    def lines(
        self, lower: Tensor, upper: Tensor, lower_free: Tensor | None = None, upper_free: Tensor | None = None
    ) -> Lines:
        """See `Relaxation`."""
        rule = OffsetRule(self.curve, (-math.inf, math.inf), self.pieces)
        ends = torch.stack([lower, upper, *(torch.full_like(lower, p).clamp(lower, upper) for p in self.pieces)])
        heights, slopes = self.curve(ends)
        least, most = slopes.amin(0), slopes.amax(0)
        chord = (heights[1] - heights[0]) / (upper - lower).clamp_min(1e-12)
        position = ((chord - least) / (most - least).clamp_min(1e-12)).clamp(0, 1)
        return rule.lines(lower, upper, position, position)


CURVES: dict[str, tuple[Curve, tuple[float, ...]]] = {
    "tanh": (tanh_curve, (0.0,)),
    "sigmoid": (sigmoid_curve, (0.0,)),
    "sin": (lambda x: (torch.sin(x), torch.cos(x)), (-math.pi, 0.0, math.pi)),
    "gelu": (gelu_curve, (-math.sqrt(2), math.sqrt(2))),
    "exp": (lambda x: (torch.exp(x), torch.exp(x)), ()),
    "x^3": (lambda x: (x**3, 3 * x**2), (0.0,)),
    "x^2": (lambda x: (x**2, 2 * x), ()),
}


def cut_areas(step: float, candidates: int) -> dict[str, Any]:
    """Area left by the best of equally spaced cuts, over that left by the middle, summed over boxes in [-5, 5].

    `off_middle`: of the square, how far the best cut lies from the middle; of tanh and sin, from zero on boxes
    (-a, a); in spacings of the candidates. `square`: how far its area is from the closed form.
    """
    grid = torch.linspace(-5, 5, round(10 / step) + 1, dtype=torch.float64)
    low, high = torch.meshgrid(grid, grid, indexing="ij")
    lower, upper = low[low < high], high[low < high]
    shares = torch.linspace(0, 1, candidates + 2, dtype=torch.float64)[1:-1]
    symmetric = lower == -upper
    table: dict[str, list[Any]] = {"name": [], "ratio": [], "off_middle": [], "square": []}
    square = relaxation(ops.Power(2.0))
    assert square is not None
    error = total_area([square], lower, upper) - (upper - lower) ** 3 / 4
    for name, (curve, pieces) in CURVES.items():
        one = ChordRule(curve, pieces)

        def area(point: Tensor, one: Relaxation = one) -> Tensor:
            return total_area([one], lower, point) + total_area([one], point, upper)

        found = torch.stack([area(torch.lerp(lower, upper, share)) for share in shares])
        best, place = found.min(0)
        spacings = (place.double() - (candidates - 1) / 2).abs()
        judged = spacings[symmetric] if name in ("tanh", "sin") else spacings
        table["name"].append(name)
        table["ratio"].append(float(best.sum() / area((lower + upper) / 2).sum()))
        table["off_middle"].append(float(judged.max()))
        table["square"].append(float((error.abs() / (upper - lower) ** 3).max()))
    return table


# ------------------------------------------------------------------------------------------------------------ graphs

WIDTH = 6
UNARY: tuple[ops.Op, ...] = (
    ops.ReLU(), ops.LeakyReLU(0.1), ops.ELU(0.7), ops.GELU(), ops.GELU("tanh"), ops.SiLU(), ops.Mish(), ops.Sigmoid(),
    ops.Tanh(), ops.Sin(), ops.Cos(), ops.Softplus(), ops.Abs(), ops.Clamp(-0.5, 0.7), ops.HardSigmoid(),
    ops.HardSwish(), ops.Erf(), ops.Power(2.0), ops.Power(3.0), ops.Softmax(1), ops.LogSoftmax(1), ops.Sort(1),
    ops.LayerNorm((WIDTH,)), ops.Negate(), ops.Flip((1,)), ops.Exp(), ops.Sign(), ops.Floor(),
)  # fmt: skip
POSITIVE: tuple[ops.Op, ...] = (ops.Log(), ops.Sqrt(), ops.Reciprocal())
BINARY: tuple[ops.Op, ...] = (
    ops.Add(), ops.Subtract(), ops.Multiply(), ops.Maximum(), ops.Minimum(), ops.Divide(), ops.MatMul(),
    ops.Concatenate(1),
)  # fmt: skip
EVERY = (*UNARY, *POSITIVE, *BINARY)


def random_graph(number: int, generator: torch.Generator, length: int = 6) -> tuple[Graph, set[str]]:
    """A graph of `length` ops on vectors, each of a value drawn at random, linear layers between; and the ops' names.

    The ops go round, so that many graphs use every one.
    """
    builder = Builder(f"random graph {number}")
    size = ops.BatchSize()
    pool = [builder.input("x", (size, WIDTH), torch.float64)]
    names = set()

    def linear(x: Node, width: int = WIDTH) -> Node:
        weight = torch.randn(WIDTH, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
        bias = 0.3 * torch.randn(WIDTH, generator=generator, dtype=torch.float64)
        return builder.emit(ops.Linear(), x, builder.constant("weight", weight), builder.constant("bias", bias))

    def drawn() -> Node:
        return pool[int(torch.randint(len(pool), (), generator=generator))]

    for place in range(length):
        op = EVERY[(number * length + place) % len(EVERY)]
        names.add(type(op).__name__)
        x = linear(drawn())
        if op in UNARY:
            found = builder.emit(op, builder.emit(ops.Tanh(), x) if isinstance(op, ops.Exp) else x)
        elif op in POSITIVE:
            found = builder.emit(op, _positive(builder, x))
        elif isinstance(op, ops.MatMul):
            a = builder.emit(ops.Reshape((size, 2, 3)), x)
            b = builder.emit(ops.Permute((0, 2, 1)), builder.emit(ops.Reshape((size, 2, 3)), linear(drawn())))
            found = linear(builder.emit(ops.Reshape((size, 4)), builder.emit(op, a, b)), 4)
        elif isinstance(op, ops.Concatenate):
            found = linear(builder.emit(op, x, drawn()), 2 * WIDTH)
        else:
            y = linear(drawn())
            found = builder.emit(op, x, _positive(builder, y) if isinstance(op, ops.Divide) else y)
        pool.append(found)
    return builder.finish([linear(builder.emit(ops.Add(), pool[-1], pool[-2]))]), names


def _positive(builder: Builder, x: Node) -> Node:
    return builder.emit(ops.Add(), builder.emit(ops.Softplus(), x), builder.scalar(0.3, torch.float64))


def attacked_graph(number: int, samples: int, generator: torch.Generator) -> dict[str, Any]:
    """How far points lie outside of the bounds of a random graph, all figures relative to 1 + the value's size.

    `outside`: random points and corners, of the outputs by every method and of every inner node; `child`: points of
    one half of a split against its bound with random multipliers; `point`: a box of no width against the value;
    `optimised`: by how much optimised bounds are worse than the first.
    """
    graph, names = random_graph(number, generator)
    center = torch.randn(1, WIDTH, generator=generator, dtype=torch.float64)
    radius = 0.3 * torch.rand(1, WIDTH, generator=generator, dtype=torch.float64)
    box = Box(center - radius, center + radius)
    points = box.sample(samples, generator)[:, 0]
    points[::2] = torch.where(points[::2] > center, box.upper, box.lower)
    bounded = BoundedGraph(graph)
    network = bounded.network
    found = sweep(network, [box]).known
    inner = list(found.bounds)
    known_values = values(network.graph, (points,), [*inner, bounded.output])
    y = known_values[bounded.output]
    ends = {method: bounded.bounds(box, method=method, iterations=3) for method in ("interval", "crown", "alpha-crown")}
    outside = [_outside(low[0], high[0], y) for low, high in ends.values()]
    outside += [
        _outside(found.flat(node)[0][0], found.flat(node)[1][0], known_values[node].flatten(1)) for node in inner
    ]
    exact = bounded.bounds(Box(center, center))
    at = values(network.graph, (center,), [bounded.output])[bounded.output]
    worse = torch.cat(
        [ends["crown"][0] - ends["alpha-crown"][0], ends["alpha-crown"][1] - ends["crown"][1], torch.zeros(1, WIDTH)]
    )
    return {
        "outside": max(outside),
        "child": _child_outside(network, box, points, known_values, found, generator),
        "point": float(torch.stack([(end - at).abs() / (1 + at.abs()) for end in exact]).max()),
        "optimised": float((worse / (1 + y.abs().amax())).max()),
        "ops": " ".join(sorted(names)),
    }


def _child_outside(
    network: Prepared, box: Box, points: Tensor, at: dict[Node, Tensor], known: Known, generator: torch.Generator
) -> float:
    """One neuron held to each half of its range, with random multipliers of the split constraint."""
    neurons = Neurons(network)
    if not len(neurons):
        return 0.0
    lower, upper = neurons.ends(known)
    width = upper - lower
    entry = int(torch.multinomial(width.clamp(1e-9, 1e3)[0], 1, generator=generator))
    point = float(middle_points(neurons, lower, upper)[0, entry])
    node = next(node for node in neurons.nodes if neurons.of(node).start <= entry < neurons.of(node).stop)
    place = entry - neurons.of(node).start
    z = at[node].flatten(1)[:, place]
    output = network.graph.outputs[0]
    rows = torch.arange(1, WIDTH + 1)[None]
    worst = 0.0
    for sign, inside in ((1.0, z <= point), (-1.0, z >= point)):
        low, high = lower.clone(), upper.clone()
        (high if sign > 0 else low)[0, entry] = point
        multiplier = torch.rand(1, WIDTH, 1, generator=generator, dtype=torch.float64)
        split = Splits(
            torch.tensor([[place]]), torch.tensor([[sign]]).double(), torch.tensor([[point]]).double(), multiplier
        )
        bound = lower_bounds(network, output, rows, [box], neurons.known(low, high), splits={node: split}).lower[0]
        if bool(inside.any()):
            worst = max(worst, _outside(bound, torch.full_like(bound, math.inf), at[output][inside]))
    return worst


def _outside(lower: Tensor, upper: Tensor, value: Tensor) -> float:
    gap = torch.maximum(lower - value, value - upper) / (1 + value.abs())
    return float(gap.nan_to_num(nan=math.inf).max().clamp(min=0))


def affine_error(generator: torch.Generator) -> float:
    """How far the bounds of an affine network are from W c + b and |W| r, the widest."""
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    radius = torch.rand(4, 5, generator=generator, dtype=torch.float64)
    lower, upper = BoundedGraph(net, x).bounds(Box(x - radius, x + radius))
    first, second = (parameter.detach() for name, parameter in net.named_parameters() if name.endswith("weight"))
    reach = radius @ (second @ first).abs().T
    exact = net(x).detach()
    return float(torch.maximum((lower - exact + reach).abs(), (upper - exact - reach).abs()).max())


# --------------------------------------------------------------------------------------------------- real instances


def real_instances(folder: Path, chosen: Sequence[tuple[str, str, str, str]], seconds: float) -> dict[str, Any]:
    """Verdicts on instances (suite, network, property, published verdict), with so many seconds for all of them."""
    table: dict[str, list[Any]] = {"suite": [], "instance": [], "published": [], "verdict": [], "seconds": []}
    ends = time.monotonic() + seconds
    for place, (suite, network, property_, published) in enumerate(chosen):
        start = time.monotonic()
        share = 3 * (ends - start) / (len(chosen) - place)
        paths = folder / suite / "onnx" / f"{network}.onnx", folder / suite / "vnnlib" / f"{property_}.vnnlib"
        verdict = certify_files(*paths, timeout=max(1.0, min(share, ends - start)))
        table["suite"].append(suite)
        table["instance"].append(f"{network} {property_}")
        table["published"].append(published)
        table["verdict"].append(verdict.status)
        table["seconds"].append(time.monotonic() - start)
    return table
