"""Scores of splits on networks small enough to work them out by hand, and the points where neurons are cut."""

import pytest
import torch
from torch import Tensor, nn

from cases import mlp
from corollary.graph import Node, values
from corollary.verify.branching import (
    Neurons,
    best_of_ranks,
    constant_scores,
    gap_scores,
    input_lines,
    middle_points,
    shortcut_scores,
    splittable,
    table_points,
)
from corollary.verify.branching_points import total_area
from corollary.verify.known import Known
from corollary.verify.layout import Rows
from corollary.verify.linear_bounds import Bounded, lower_bounds
from corollary.verify.prepared import Prepared, prepare
from corollary.verify.relaxations import Lines
from corollary.verify.sets import Box
from corollary.verify.sweep import sweep


def double(*values: float | list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def box(center: Tensor, radius: float | Tensor) -> Box:
    return Box(center - radius, center + radius)


def with_parameters(net: nn.Sequential, *values: Tensor) -> nn.Sequential:
    net = net.double()
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), values, strict=True):
            parameter.copy_(value)
    return net


def passed(network: Prepared, region: Box, known: Known, row: Tensor | None = None) -> Bounded:
    """The bound of the output, and what it carries at the nonlinear nodes."""
    rows = torch.ones(1, 1, dtype=torch.float64) if row is None else row
    with torch.no_grad():
        return lower_bounds(
            network, network.graph.outputs[0], Rows(rows, 1, len(rows)), [region], known, keep=network.nonlinear
        )


class Hand:
    """y = v . relu(z) + 7 with z = W x + b on the box [-1, 1]: l = b - |W|, u = b + |W|."""

    weight, bias = double([1.0], [2.0], [1.0], [2.0], [1.0]), double(0.5, -0.5, 0.25, -1.0, 3.0)
    v = double(2.0, 3.0, -4.0, -1.0, 1.0)
    lower, upper = [-0.5, -2.5, -0.75, -3.0, 2.0], [1.5, 1.5, 1.25, 1.0, 4.0]

    def __init__(self):
        net = with_parameters(mlp(1, 5, 1), self.weight, self.bias, self.v[None], double(7.0))
        self.region = box(double([0.0]), 1.0)
        self.network = prepare(net, torch.zeros(2, 1, dtype=torch.float64))
        self.neurons = Neurons(self.network)
        self.known = sweep(self.network, [self.region]).known
        self.points = middle_points(self.neurons, *self.neurons.ends(self.known))
        self.kept = passed(self.network, self.region, self.known).kept


def close(found: Tensor, wanted: list[float]) -> None:
    torch.testing.assert_close(found, double(wanted), rtol=1e-12, atol=1e-12)


def test_the_bounds_and_points_of_the_worked_network():
    hand = Hand()
    lower, upper = hand.neurons.ends(hand.known)
    close(lower, hand.lower)
    close(upper, hand.upper)
    # cut at the kink where it is inside, in the middle elsewhere
    close(hand.points, [0.0, 0.0, 0.0, 0.0, 3.0])


def test_constant_terms_by_hand():
    """BaBSR.

    Where v > 0 the lower line a z changes to 0 and to z, and the constant by (slope's change) v b:
    neuron 0, a = 1: left -2 * 0.5 = -1, right 0; neuron 1, a = 0: left 0, right 3 * (-0.5).
    Where v < 0 the chord s (z - l) changes to 0 and to z: the constant by v s l, and by the slopes as before:
    neuron 2, s = 1.25 / 2: v s l = 1.875; left 1.875 + 0.625 = 2.5, right 1.875 - 4 * 0.375 * 0.25 = 1.5;
    neuron 3, s = 1 / 4: v s l = 0.75; left 0.75 - 0.25 = 0.5, right 0.75 + 0.75 = 1.5.
    Neuron 4 is on one side of its kink, and nothing changes.
    """
    hand = Hand()
    close(constant_scores(hand.neurons, hand.known, hand.points, hand.kept, {}), [-1.0, -1.5, 1.5, 0.5, 0.0])


def test_gaps_by_hand():
    """Areas between the line that the bound stands on and the function, |v| over the width of the range.

    v > 0: the triangle between a z and relu, l^2 / 2 for a = 1 and u^2 / 2 for a = 0; v < 0: that under the chord,
    -l u / 2.
    """
    hand = Hand()
    wanted = [2 * 0.125 / 2, 3 * 1.125 / 4, 4 * 0.46875 / 2, 1.5 / 4, 0.0]
    close(gap_scores(hand.neurons, hand.known, hand.points, hand.kept, {}), wanted)


def test_scores_use_the_slopes_that_the_bound_was_found_with():
    """With a = 1/4 for neuron 0: constants -0.25 * 2 * 0.5 and 0.75 * 2 * 0.5; areas l^2 / 8 and 3 u^2 / 8."""
    hand = Hand()
    (relu,) = hand.network.nonlinear
    free = {relu: (double([0.25, 0.0, 0.0, 0.0, 0.0])[None], None)}
    constants = constant_scores(hand.neurons, hand.known, hand.points, hand.kept, free)
    gaps = gap_scores(hand.neurons, hand.known, hand.points, hand.kept, free)
    assert float(constants[0, 0]) == pytest.approx(-0.25)
    assert float(gaps[0, 0]) == pytest.approx(2 * (0.25 / 8 + 3 * 2.25 / 8) / 2)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.SiLU])
def test_gaps_of_curved_functions_are_mean_rises_of_the_lines(activation: type[nn.Module]):
    torch.manual_seed(1)
    network = prepare(mlp(2, 4, 1, activation=activation).double(), torch.zeros(2, 2).double())
    region = box(double([0.1, -0.3]), 1.5)
    neurons, known = Neurons(network), sweep(network, [region]).known
    lower, upper = neurons.ends(known)
    points = lower + 0.37 * (upper - lower)
    (kept,) = passed(network, region, known).kept.values()
    found = gap_scores(neurons, known, points, passed(network, region, known).kept, {})
    (relaxation,) = network.relaxations.values()
    parent = relaxation.lines(lower, upper)
    wanted = torch.zeros_like(lower)
    for low, high in ((lower, points), (points, upper)):
        child = relaxation.lines(low, high)
        z = low + (torch.arange(1000, dtype=torch.float64)[:, None, None] + 0.5) / 1000 * (high - low)
        rise, fall = _between(parent, child, z)
        wanted += (high - low) / (upper - lower) * (kept[0].clamp(min=0) * rise - kept[0].clamp(max=0) * fall)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def _between(parent: Lines, child: Lines, z: Tensor) -> tuple[Tensor, Tensor]:
    """By how much the child's lower line lies above the parent's, and its upper line below, on average over z."""

    def line(slope: Tensor, offset: Tensor | None) -> Tensor:
        return slope * z + (0.0 if offset is None else offset)

    rise = line(child.lower_slope, child.lower_offset) - line(parent.lower_slope, parent.lower_offset)
    fall = line(parent.upper_slope, parent.upper_offset) - line(child.upper_slope, child.upper_offset)
    return rise.mean(0), fall.mean(0)


class Products(nn.Module):
    """Products of two numbers each."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :2] * x[:, 2:]) @ torch.tensor([[3.0], [-2.0]], dtype=torch.float64)


def test_gaps_of_products_by_hand():
    """Planes lie w_a w_b / 4 from the product in the middle of a box, and half as far in its halves."""
    network = prepare(Products(), torch.zeros(2, 4).double())
    width = double(1.0, 2.0, 0.5, 0.25)
    region = box(double([0.3, -1.0, 2.0, 0.0]), width / 2)
    neurons, known = Neurons(network), sweep(network, [region]).known
    points = middle_points(neurons, *neurons.ends(known))
    scores = gap_scores(neurons, known, points, passed(network, region, known).kept, {})
    assert sorted(scores[0].tolist()) == pytest.approx(sorted([3 * 0.5 / 8, 3 * 0.5 / 8, 2 * 0.5 / 8, 2 * 0.5 / 8]))
    assert bool(neurons.only_products.all())
    found = constant_scores(neurons, known, points, passed(network, region, known).kept, {})
    assert not bool(found.any())


# ------------------------------------------------------------------------------------------------------- the shortcut


def halves(neurons: Neurons, known: Known, neuron: int, point: float) -> list[Known]:
    """The bounds of both children of a split."""
    lower, upper = (end.clone() for end in neurons.ends(known))
    left, right = upper.clone(), lower.clone()
    left[0, neuron], right[0, neuron] = point, point
    return [neurons.known(lower, left), neurons.known(right, upper)]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid])
def test_stopping_at_the_first_layer_gives_the_children_s_own_bounds(activation: type[nn.Module]):
    """Neurons of the first layer are linear in the input, so nothing is lost by stopping there."""
    torch.manual_seed(3)
    net = mlp(2, 5, 4, 1, activation=activation).double()
    network = prepare(net, torch.zeros(2, 2).double())
    region = box(double([0.2, -0.1]), 1.0)
    neurons, known = Neurons(network), sweep(network, [region]).known
    points = table_points(neurons, *neurons.ends(known))
    parent = passed(network, region, known)
    lines = input_lines(network, neurons, known, region)
    assert lines is not None
    order = torch.zeros(1, len(neurons), dtype=torch.float64)
    scores = shortcut_scores(neurons, known, points, parent.kept, {}, lines, region, order, parent.lower)
    first = neurons.of(neurons.nodes[0])
    for i in range(first.start, first.stop):
        children = [passed(network, region, side) for side in halves(neurons, known, i, float(points[0, i]))]
        assert float(scores[0, i]) == pytest.approx(min(float(child.lower) for child in children), abs=1e-10)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_stopping_at_the_second_layer_uses_the_root_s_lines_of_its_neurons(activation: type[nn.Module]):
    """Against the bound summed neuron by neuron, and below everything that the network does."""
    torch.manual_seed(5)
    net = mlp(2, 5, 3, 1, activation=activation).double()
    network = prepare(net, torch.zeros(2, 2).double())
    region = box(double([0.2, -0.1]), 1.0)
    neurons, known = Neurons(network), sweep(network, [region]).known
    lower, upper = neurons.ends(known)
    points = lower + 0.6 * (upper - lower)
    parent = passed(network, region, known)
    lines = input_lines(network, neurons, known, region)
    assert lines is not None
    order = torch.zeros(1, len(neurons), dtype=torch.float64)
    scores = shortcut_scores(neurons, known, points, parent.kept, {}, lines, region, order, parent.lower)
    second = neurons.nodes[1]
    place, (reader,) = neurons.of(second), neurons.readers[second]

    def stopped(side: Known, only: int | None) -> float:
        """The least of what the neurons contribute over the box; `only` this one by the lines of the child."""
        slope, constant = torch.zeros(2, dtype=torch.float64), 0.0
        for i in range(network.sizes[second]):
            drawn = (side if i == only else known).lines(reader)
            weight = float(parent.kept[reader][0, 0, i])
            a, b = (drawn.lower_slope, drawn.lower_offset) if weight > 0 else (drawn.upper_slope, drawn.upper_offset)
            enters = weight * float(a[0, 0, i])
            constant += 0.0 if b is None else weight * float(b[0, 0, i])
            end = 0 if enters > 0 else 1
            slope = slope + enters * lines.slopes[end, place.start + i]
            constant += enters * float(lines.offsets[end, place.start + i])
        center, radius = region.center[0], region.radius[0]
        return constant + float(slope @ center - slope.abs() @ radius)

    base = stopped(known, None)
    with torch.no_grad():
        axis = torch.linspace(-1, 1, 101, dtype=torch.float64)
        least = float(net(torch.cartesian_prod(axis, axis) + region.center).min())
    for i in range(network.sizes[second]):
        number = place.start + i
        sides = halves(neurons, known, number, float(points[0, number]))
        wanted = float(parent.lower) + min(stopped(side, i) for side in sides) - base
        assert float(scores[0, number]) == pytest.approx(wanted, abs=1e-10)
        assert float(scores[0, number]) <= least


def test_the_shortcut_takes_the_worst_of_the_rows():
    torch.manual_seed(3)
    network = prepare(mlp(2, 5, 2, activation=nn.Tanh).double(), torch.zeros(2, 2).double())
    region = box(double([0.2, -0.1]), 1.0)
    neurons, known = Neurons(network), sweep(network, [region]).known
    points = table_points(neurons, *neurons.ends(known))
    lines = input_lines(network, neurons, known, region)
    assert lines is not None
    order = torch.zeros(1, len(neurons), dtype=torch.float64)

    def scored(row: Tensor) -> Tensor:
        parent = passed(network, region, known, row)
        return shortcut_scores(neurons, known, points, parent.kept, {}, lines, region, order, parent.lower)

    rows = double([1.0, -0.5], [-0.3, 2.0])
    torch.testing.assert_close(scored(rows), torch.minimum(scored(rows[:1]), scored(rows[1:])))


def test_the_best_of_each_score_comes_first():
    one, other = double([5.0, 1.0, 3.0, 2.0]), double([0.1, 0.2, 0.3, 0.9])
    order = best_of_ranks(one, other).argsort(dim=1, descending=True)
    assert set(order[0, :2].tolist()) == {0, 3}
    assert order[0, 2] == 2
    torch.testing.assert_close(best_of_ranks(one), best_of_ranks(one, one))


def test_lines_in_the_input_hold_the_neurons():
    torch.manual_seed(3)
    network = prepare(mlp(2, 6, 6, 1, activation=nn.Tanh).double(), torch.zeros(2, 2).double())
    region = box(double([0.2, -0.1]), 1.0)
    neurons, known = Neurons(network), sweep(network, [region]).known
    lines = input_lines(network, neurons, known, region)
    assert lines is not None
    x = region.center + 2 * torch.rand(3000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    low, high = (x @ slope.T + offset for slope, offset in zip(lines.slopes, lines.offsets, strict=True))
    reached = _values(network, list(neurons.nodes), x)
    assert float((low - reached).max()) <= 1e-12
    assert float((reached - high).max()) <= 1e-12
    first = neurons.of(neurons.nodes[0])
    torch.testing.assert_close(low[:, first], high[:, first])


def _values(network: Prepared, nodes: list[Node], x: Tensor) -> Tensor:
    found = values(network.graph, (x,), nodes)
    return torch.cat([found[node] for node in nodes], 1)


# ------------------------------------------------------------------------------------------------- points, splittable


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.SiLU])
def test_points_of_the_table_leave_no_more_area_than_the_best_of_many_cuts(activation: type[nn.Module]):
    network = prepare(mlp(1, 6, 1, activation=activation).double(), torch.zeros(2, 1).double())
    neurons = Neurons(network)
    lower, upper = double([-4.0, -1.0, -3.0, 0.5, -0.4, -2.0]), double([1.0, 3.0, 3.5, 4.0, 0.3, -0.5])
    found = table_points(neurons, lower, upper)
    relaxations = list(network.relaxations.values())

    def area(cut: Tensor) -> Tensor:
        ends = (lower.expand(cut.shape), cut), (cut, upper.expand(cut.shape))
        return sum((total_area(relaxations, *pair) for pair in ends), torch.zeros_like(cut))

    share = torch.linspace(0.002, 0.998, 499, dtype=torch.float64)[:, None]
    best = area(lower + share * (upper - lower)).amin(0)
    # ends are rounded inwards to a grid of 0.05, which moves the cut of the narrowest box by a twentieth of its width
    assert bool((area(found) <= best * 1.03).all())
    middle = area(lower + (upper - lower) / 2)
    assert bool((area(found) <= 1.03 * middle).all())
    if activation is not nn.SiLU:
        assert bool((area(found) < 0.98 * middle).any())


class Both(nn.Module):
    """A neuron that a kinked and a curved function read; one that a curved function alone reads."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(1, 2), nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        return torch.relu(z) + torch.tanh(z) + torch.tanh(self.b(x))


def test_a_neuron_with_a_kink_is_cut_there_whatever_else_reads_it():
    neurons = Neurons(prepare(Both().double(), torch.zeros(2, 1).double()))
    ends = double([-4.0, 1.0, -4.0, 1.0]), double([1.0, 2.0, 1.0, 2.0])
    shared = [node for node in neurons.nodes if len(neurons.readers[node]) == 2]
    assert len(shared) == 1
    place = neurons.of(shared[0])
    found = table_points(neurons, *ends)
    assert found[0, place].tolist() == [0.0, 1.5]
    other = [i for i in range(4) if i not in range(place.start, place.stop)]
    assert float(found[0, other[0]]) not in (0.0, -1.5)


@pytest.mark.parametrize(
    ("lower", "upper", "wanted"),
    [(-2.0, 3.0, 1.0), (-3.0, 2.0, -1.0), (0.0, 3.0, 1.0), (-0.5, 0.7, 0.1), (1.0, 5.0, 3.0), (-1.0, 1.0, 0.0)],
)
def test_of_two_kinks_the_one_nearer_to_the_middle_and_none_at_an_end(lower: float, upper: float, wanted: float):
    neurons = Neurons(prepare(mlp(1, 1, 1, activation=nn.Hardtanh).double(), torch.zeros(2, 1).double()))
    found = middle_points(neurons, double([lower]), double([upper]))
    assert float(found) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("activation", "lower", "upper", "wanted"),
    [
        (nn.ReLU, -1.0, 2.0, True),
        (nn.ReLU, 0.0, 2.0, False),
        (nn.ReLU, -2.0, 0.0, False),
        (nn.ReLU, -1e-9, 1e-9, True),
        (nn.Hardtanh, -2.0, -0.5, True),
        (nn.Hardtanh, -0.9, 0.9, False),
        (nn.Tanh, 0.5, 2.0, True),
        (nn.Tanh, 0.5, 0.50005, False),
        (nn.Tanh, 50.0, 50.004, False),
        (nn.Tanh, 50.0, 50.006, True),
        (nn.Tanh, 1.0, 1.0, False),
    ],
)
def test_what_can_be_split(activation: type[nn.Module], lower: float, upper: float, wanted: bool):
    neurons = Neurons(prepare(mlp(1, 1, 1, activation=activation).double(), torch.zeros(2, 1).double()))
    assert splittable(neurons, double([lower]), double([upper])).tolist() == [[wanted]]


def test_neurons_are_numbered_by_node_and_back():
    torch.manual_seed(0)
    neurons = Neurons(prepare(mlp(3, 5, 4, 2).double(), torch.zeros(2, 3).double()))
    assert len(neurons) == 9
    assert [(neurons.of(node).start, neurons.of(node).stop) for node in neurons.nodes] == [(0, 5), (5, 9)]
    lower = torch.randn(2, 9, dtype=torch.float64)
    upper = lower + 1
    for ours, theirs in zip(neurons.ends(neurons.known(lower, upper)), (lower, upper), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_samples_are_scored_independently_of_their_neighbours():
    """The scores of a domain are its own: two domains together score as each by itself."""
    torch.manual_seed(2)
    network = prepare(mlp(2, 5, 4, 1, activation=nn.Tanh).double(), torch.zeros(2, 2).double())
    centers = double([0.2, -0.1], [1.0, 0.4])
    neurons = Neurons(network)
    region = box(centers, 0.8)

    def scores(part: Box) -> tuple[Tensor, Tensor]:
        known = sweep(network, [part]).known
        points = table_points(neurons, *neurons.ends(known))
        row = Rows(torch.ones(len(part), 1, dtype=torch.float64), len(part), 1)
        kept = lower_bounds(network, network.graph.outputs[0], row, [part], known, keep=network.nonlinear).kept
        return gap_scores(neurons, known, points, kept, {}), constant_scores(neurons, known, points, kept, {})

    together = scores(region)
    for i in range(2):
        for joint, alone in zip(together, scores(region[i : i + 1]), strict=True):
            torch.testing.assert_close(joint[i : i + 1], alone)
