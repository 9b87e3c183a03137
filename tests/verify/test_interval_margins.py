from itertools import pairwise

import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.graph import capture
from corollary.verify.interval_margins import (
    IntervalNetwork,
    box_around,
    ibp_bounds,
    ibp_certified,
    ibp_margins,
    label_rows,
)


def mlp(*widths, seed=0):
    torch.manual_seed(seed)
    layers = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after, dtype=torch.float64), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def data(*shape, classes=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(*shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (shape[0],), generator=generator)


def by_hand(net, x, y, eps):
    """Centre and radius layer by layer, the label's rows times the last weights."""
    *hidden, last = [layer for layer in net if isinstance(layer, nn.Linear)]
    lower, upper = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    for layer in hidden:
        center, radius = (lower + upper) / 2 @ layer.weight.T + layer.bias, (upper - lower) / 2 @ layer.weight.abs().T
        lower, upper = (center - radius).relu(), (center + radius).relu()
    rows = label_rows(y, last.out_features).to(x) @ last.weight
    offset = label_rows(y, last.out_features).to(x) @ last.bias
    middle, radius = (lower + upper) / 2, (upper - lower) / 2
    return (rows @ middle[..., None] - rows.abs() @ radius[..., None])[..., 0] + offset


def test_margins_and_their_gradients_are_those_by_hand():
    net, (x, y) = mlp(5, 7, 6, 3), data(4, 5)
    found, wanted = ibp_margins(net, x, y, 0.1), by_hand(net, x, y, 0.1)
    assert torch.allclose(found, wanted, atol=1e-13)
    assert bool((found.gather(1, y[:, None]) == 0).all())
    slopes = torch.autograd.grad(found.square().sum(), list(net.parameters()))
    expected = torch.autograd.grad(wanted.square().sum(), list(net.parameters()))
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(slopes, expected, strict=True))


def test_many_classes_take_the_rows_of_each_sample_and_agree():
    net, (x, y) = mlp(5, 7, 40), data(6, 5, classes=40)
    assert torch.allclose(ibp_margins(net, x, y, 0.1), by_hand(net, x, y, 0.1), atol=1e-13)


def test_elision_is_tighter_than_differences_of_bounds():
    net, (x, y) = mlp(5, 7, 3), data(20, 5)
    lower, upper = ibp_bounds(net, *box_around(x, 0.1))
    others = torch.arange(3) != y[:, None]
    gain = (ibp_margins(net, x, y, 0.1) - (lower.gather(1, y[:, None]) - upper))[others].detach()
    assert bool((gain >= -1e-12).all())
    assert float(gain.mean()) > 0.01


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, dtype=torch.float64)
        self.second = nn.Linear(4, 4, dtype=torch.float64)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Joined(nn.Module):
    """The last layer is an Einstein sum, which is transposed by differentiation."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6, dtype=torch.float64)
        self.head = nn.Parameter(torch.randn(3, 2, 3, dtype=torch.float64))

    def forward(self, x):
        return torch.einsum("bij,ijk->bk", torch.relu(self.first(x)).reshape(-1, 3, 2), self.head) * 2.0


class Probabilities(nn.Module):
    """The output is not affine: there is no last layer."""

    def __init__(self):
        super().__init__()
        self.net = mlp(4, 5, 3)

    def forward(self, x):
        return self.net(x).softmax(1)


class Folding(nn.Module):
    """A transposed convolution, then sums over its places."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, dtype=torch.float64)
        self.last = nn.ConvTranspose2d(1, 3, 2, stride=2, dtype=torch.float64)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)).reshape(-1, 1, 2, 2)).mean((2, 3))


@pytest.mark.parametrize("make", [Tied, Joined, Probabilities, Folding])
def test_gradients_agree_with_differences(make):
    torch.manual_seed(3)
    net, (x, y) = make(), data(5, 4)
    network = IntervalNetwork(net, x[:2])
    loss = torch.nn.functional.cross_entropy(-ibp_margins(network, x, y, 0.05), y)
    loss.backward()
    for parameter in net.parameters():
        flat, slope = parameter.detach().view(-1), parameter.grad.view(-1)
        for i in range(0, len(flat), 5):
            values = []
            for step in (1e-6, -2e-6):
                flat[i] += step
                with torch.no_grad():
                    values.append(torch.nn.functional.cross_entropy(-ibp_margins(network, x, y, 0.05), y))
            flat[i] += 1e-6
            # a central difference of an analytic function errs by h^2 and by rounding over h: 1e-9 each
            assert float(values[0] - values[1]) / 2e-6 == pytest.approx(float(slope[i]), abs=1e-7)


@pytest.mark.parametrize(
    "net",
    [
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2),
                              nn.Flatten(), nn.Linear(27, 3)),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3)),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3), nn.Softmax(1)),
    ],
)  # fmt: skip
def test_bounds_hold_for_samples(net):
    torch.manual_seed(0)
    net, (x, y) = net().double().eval(), data(4, 1, 6, 6)
    lower, upper = box_around(x, 0.1)
    points = lower + torch.rand(300, *x.shape, dtype=torch.float64) * (upper - lower)
    outputs = net(points.flatten(0, 1)).unflatten(0, (300, 4))
    low, high = ibp_bounds(net, lower, upper)
    assert bool((outputs >= low - 1e-12).all())
    assert bool((outputs <= high + 1e-12).all())
    gaps = outputs.gather(2, y.expand(300, 4)[..., None]) - outputs
    assert bool((gaps >= ibp_margins(net, x, y, 0.1) - 1e-12).all())


def test_a_point_is_bounded_by_its_value():
    net, (x, y) = mlp(5, 7, 3), data(4, 5)
    outputs = net(x)
    wanted = outputs.gather(1, y[:, None]) - outputs
    assert torch.allclose(ibp_margins(net, x, y, 0.0), wanted, atol=1e-13)
    assert torch.equal(ibp_certified(net, x, y, 0), outputs.argmax(1) == y)


def test_one_radius_a_sample():
    net, (x, y) = mlp(5, 7, 3), data(4, 5)
    eps = torch.tensor([0.0, 0.05, 0.1, 0.2], dtype=torch.float64)
    wanted = torch.cat([ibp_margins(net, x[i : i + 1], y[i : i + 1], float(eps[i])) for i in range(4)])
    assert torch.allclose(ibp_margins(net, x, y, eps), wanted, atol=1e-13)


def test_a_graph_is_bounded_by_its_own_tensors():
    net, (x, y) = mlp(5, 7, 3), data(4, 5)
    graph = capture(net, x)
    before = ibp_margins(graph, x, y, 0.1)
    assert torch.allclose(before, ibp_margins(net, x, y, 0.1))
    with torch.no_grad():
        kept = IntervalNetwork(net, x[:2])
        net[0].weight.mul_(2.0)
    assert not torch.allclose(before, ibp_margins(kept, x, y, 0.1))


def test_what_is_refused():
    net, (x, y) = mlp(5, 7, 3), data(4, 5)
    with pytest.raises(BadInput, match=r"must be 0 or more, got -0\.1"):
        ibp_margins(net, x, y, -0.1)
    with pytest.raises(BadInput, match="out of data_range"):
        ibp_margins(net, 2 * x, y, 0.1)
    with pytest.raises(BadInput, match="has 3 outputs"):
        ibp_margins(net, x, y + 3, 0.1)
    with pytest.raises(BadInput, match="example of its input"):
        IntervalNetwork(net)
