import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.verify.ibp_initialisation import init_tightness, product_radii
from corollary.verify.interval_margins import ibp_bounds, label_rows
from corollary.verify.tightness import (
    NotPiecewiseLinear,
    propagation_radii,
    propagation_tightness,
    tightness_by_layer,
    true_tightness,
)


def mlp(*widths, seed=0, activation=nn.ReLU):
    torch.manual_seed(seed)
    layers = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after, dtype=torch.float64), activation()]
    return nn.Sequential(*layers[:-1])


def data(*shape, classes=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(*shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (shape[0],), generator=generator)


def by_matrices(net, x, y, eps):
    """The formula of the paper with all matrices formed, for one sample."""
    *hidden, last = [layer.weight.detach() for layer in net if isinstance(layer, nn.Linear)]
    rows = label_rows(y[None], len(last))[0].double()[torch.arange(len(last)) != y]
    lower, upper = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    radius = (upper - lower) / 2
    product, spread, value = torch.eye(len(x), dtype=x.dtype), radius, x
    for weight, layer in zip(hidden, net[::2], strict=False):
        value = layer(value).detach()
        mask = (value > 0).to(x)
        value, product, spread = value * mask, mask[:, None] * (weight @ product), mask * (weight.abs() @ spread)
    return ((rows @ last @ product).abs() @ radius) / ((rows @ last).abs() @ spread)


def test_it_is_the_papers_formula():
    net, (x, y) = mlp(6, 9, 8, 3), data(5, 6)
    found = propagation_tightness(net, x, 0.3, y)
    wanted = torch.stack([by_matrices(net, x[i], y[i], 0.3) for i in range(5)])
    assert found.shape == (5, 2)
    assert torch.allclose(found, wanted, rtol=1e-12)
    assert float(propagation_tightness(net, x, 0.3, y, reduce="mean")) == pytest.approx(float(wanted.mean()))


def test_linear_networks_have_the_radii_of_their_products():
    net, (x, _) = mlp(6, 9, 8, 3), data(2, 6)
    wanted = product_radii([layer.weight.detach() for layer in net if isinstance(layer, nn.Linear)])
    found = propagation_radii(net, x, 0.5, mode="linear", data_range=None)
    assert torch.allclose(found.optimal, wanted.optimal.expand(2, 3))
    assert torch.allclose(found.interval, wanted.interval.expand(2, 3))


def test_one_layer_is_tight():
    net, (x, y) = mlp(6, 3), data(5, 6)
    for labels in (None, y):
        assert torch.allclose(propagation_tightness(net, x, 0.3, labels), torch.ones(1).double(), atol=1e-14)


def test_without_elision_the_bounds_are_looser():
    net, (x, y) = mlp(6, 9, 3), data(20, 6)
    elided = propagation_radii(net, x, 0.3, y)
    apart = propagation_radii(net, x, 0.3).interval
    others = (torch.arange(3) != y[:, None]).nonzero()[:, 1].reshape(20, 2)
    assert bool((elided.interval <= apart.gather(1, y[:, None]) + apart.gather(1, others) + 1e-12).all())
    assert float((elided.interval / (apart.gather(1, y[:, None]) + apart.gather(1, others))).mean()) < 0.95


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1, groups=2), nn.BatchNorm2d(2)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = (x - 0.3) / torch.tensor([0.2, 0.5], dtype=x.dtype).reshape(2, 1, 1)
        x = x + self.norm(self.conv(x)).relu()
        return self.head(nn.functional.avg_pool2d(x, 2).flatten(1))


NETS = {
    "residual, normalised inputs": Residual,
    "max pool, leaky": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 2), nn.LeakyReLU(0.2), nn.MaxPool2d(2, stride=1), nn.Flatten(), nn.Linear(16, 3)
    ),
    "learned slopes": lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 8), nn.PReLU(), nn.Linear(8, 3)),
    "clipped": lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 8), nn.Hardtanh(-0.1, 0.1), nn.Linear(8, 3)),
}


@pytest.mark.parametrize("name", NETS)
def test_it_is_the_limit_of_small_boxes(name):
    """Against the bound engine and an exact Jacobian: neither goes through the code that is tested."""
    torch.manual_seed(0)
    net = NETS[name]().double().eval()
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_var.uniform_(0.5, 2.0)
        norm.weight.data.uniform_(-1.0, 1.0)
    x, _ = data(3, 2, 4, 4)
    x, tiny = 0.1 + 0.8 * x, 1e-7
    lower, upper = ibp_bounds(net, x - tiny, x + tiny)
    slopes = torch.autograd.functional.jacobian(lambda z: net(z).sum(0), x)
    wanted = slopes.abs().flatten(2).sum(2).T / ((upper - lower) / 2 / tiny)
    # a difference of bounds of size 1 over 1e-7 is known to 1e-9
    assert torch.allclose(propagation_tightness(net, x, 0.1), wanted, rtol=1e-6)


def test_the_box_is_cut_to_the_range():
    net, x = mlp(2, 5, 3), torch.tensor([[0.0, 1.0], [0.5, 0.5]]).double()
    cut, whole = propagation_tightness(net, x, 0.1), propagation_tightness(net, x, 0.1, data_range=None)
    assert torch.allclose(cut, whole)  # all radii of a sample are cut alike here
    x = torch.tensor([[0.0, 0.5]]).double()
    assert not torch.allclose(propagation_tightness(net, x, 0.1), propagation_tightness(net, x, 0.1, data_range=None))


def test_samples_in_parts_give_the_same(monkeypatch):
    net, (x, y) = mlp(6, 9, 8, 3), data(7, 6)
    whole = propagation_tightness(net, x, 0.3, y)
    monkeypatch.setattr("corollary.verify.tightness.ENTRIES_AT_ONCE", 40)
    assert torch.allclose(propagation_tightness(net, x, 0.3, y), whole, rtol=1e-12)


def test_dead_networks_have_no_tightness():
    net, (x, y) = mlp(6, 4, 3), data(5, 6)
    with torch.no_grad():
        net[0].bias.fill_(-100.0)
    assert bool(propagation_tightness(net, x, 0.3, y).isnan().all())


def test_tiny_tightness_is_resolved():
    depth = 40
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(20, 20, bias=False, dtype=torch.float64) for _ in range(depth)])
    x = torch.rand(1, 20, dtype=torch.float64)
    found = propagation_tightness(net, x, 1e-6, mode="linear", reduce="mean", data_range=None)
    weights = [layer.weight.detach() for layer in net]
    product = product_radii(weights).tightness.mean()
    assert float(found) == pytest.approx(float(product), rel=1e-9)
    # uniform weights are not normal ones, but the rate with depth is nearly theirs: e^-44 times a fluctuation
    assert math.log(float(found)) == pytest.approx(math.log(init_tightness([20] * (depth + 1))), abs=8)
    assert float(found) < 1e-15


def test_single_precision_inputs_are_computed_in_double():
    net, (x, y) = mlp(6, 9, 8, 3).float(), data(5, 6)
    found = propagation_tightness(net, x.float(), 0.3, y)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), propagation_tightness(net.double(), x.float().double(), 0.3, y), rtol=1e-6)


def test_layers_are_those_of_the_network_cut_off():
    net, (x, _) = mlp(6, 9, 8, 3), data(5, 6)
    layers = tightness_by_layer(net, x, 0.3)
    assert [layer.name for layer in layers] == ["0", "2", "4"]
    assert [(layer.units, layer.of) for layer in layers] == [(9, 9), (8, 8), (3, 3)]
    for layer, cut in zip(layers, (net[:1], net[:3], net), strict=True):
        assert layer.tightness == pytest.approx(float(propagation_tightness(cut, x, 0.3).mean()))
    some = tightness_by_layer(net, x, 0.3, units=4, generator=torch.Generator().manual_seed(0))
    assert [layer.units for layer in some] == [4, 4, 3]


def test_true_tightness_lies_between_zero_and_one_and_tends_to_the_local_one():
    net, (x, y) = mlp(4, 8, 6, 3), data(4, 4)
    true = true_tightness(net, x, 0.2, y)
    assert bool(((true > 0) & (true <= 1 + 1e-9)).all())
    assert float((true - propagation_tightness(net, x, 0.2, y)).abs().max()) > 0.01
    near = true_tightness(net, x, 1e-4, y)
    assert torch.allclose(near, propagation_tightness(net, x, 1e-4, y), rtol=1e-6)


def test_true_tightness_is_that_of_a_grid():
    net, x = mlp(2, 6, 2), torch.tensor([[0.5, 0.4]]).double()
    steps = torch.linspace(-0.2, 0.2, 801, dtype=torch.float64)
    reached = net(x + torch.cartesian_prod(steps, steps)).detach()
    lower, upper = ibp_bounds(net, x - 0.2, x + 0.2)
    wanted = (reached.amax(0) - reached.amin(0)) / (upper - lower)[0].detach()
    assert torch.allclose(true_tightness(net, x, 0.2)[0], wanted, rtol=2e-3)


def test_true_tightness_is_undefined_without_time():
    net, (x, y) = mlp(4, 8, 6, 3), data(2, 4)
    assert bool(true_tightness(net, x, 0.2, y, timeout=0).isnan().all())


def test_what_is_refused():
    (x, y), smooth = data(2, 6), mlp(6, 5, 3, activation=nn.GELU)
    with pytest.raises(TypeError, match=r"GELU.*layer '1'.*piecewise-linear") as caught:
        propagation_tightness(smooth, x, 0.1)
    assert isinstance(caught.value, NotPiecewiseLinear)
    assert isinstance(caught.value, BadInput)
    net = mlp(6, 5, 3)
    with pytest.raises(ValueError, match=r"needs eps > 0, got -0\.1"):
        propagation_tightness(net, x, -0.1)
    with pytest.raises(BadInput, match="has 3 outputs"):
        propagation_tightness(net, x, 0.1, y + 5)
    with pytest.raises(BadInput, match="out of data_range"):
        propagation_tightness(net, x + 1, 0.1)
    pooled = nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (1, 6)), nn.MaxPool1d(2), nn.Flatten()).double()
    with pytest.raises(NotPiecewiseLinear, match=r"MaxPool.*no linear map"):
        propagation_tightness(pooled, x, 0.1, mode="linear")


def test_smooth_activations_have_a_linear_network():
    net, (x, _) = mlp(6, 5, 3, activation=nn.GELU), data(2, 6)
    wanted = product_radii([net[0].weight.detach(), net[2].weight.detach()]).tightness
    found = propagation_tightness(net, x, 0.1, mode="linear", data_range=None)
    assert torch.allclose(found, wanted.expand(2, 3))
