import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.verify.output_ranges import output_ranges
from corollary.verify.sets import Box


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 4), nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.last(h + torch.relu(self.second(h)))


class Bends(nn.Module):
    """Every function of one variable with kinks, and one on the wrong side of all of them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 3) for _ in range(5))

    def forward(self, x):
        a, b, c, d, e = (layer(4 * x - 2) for layer in self.layers)
        h = torch.relu(a) + nn.functional.leaky_relu(b, 0.2) - c.abs() + d.clamp(-0.5, 0.7)
        return h - nn.functional.hardsigmoid(3 * e) + torch.relu(a + 100) - torch.relu(b - 100)


NETS = {
    "mlp": lambda: nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)),
    "residual": Residual,
    "bends": Bends,
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2)), nn.Conv1d(1, 3, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(9, 2)
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_ranges_are_those_of_a_fine_grid(name):
    torch.manual_seed(0)
    net = NETS[name]().double()
    lower = torch.tensor([[0.0, 0.1], [0.4, 0.4]], dtype=torch.float64)
    box = Box(lower, lower + torch.tensor([[0.8, 0.6], [0.5, 0.3]], dtype=torch.float64))
    low, high = output_ranges(net, box)
    steps = torch.linspace(0, 1, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(steps, steps)
    for i in range(2):
        reached = net(box.lower[i] + grid * (box.upper[i] - box.lower[i]))
        # outside the grid's range by no more than what half a step of it hides, inside by no more than the solver's
        assert bool((low[i] <= reached.amin(0) + 1e-6).all())
        assert bool((high[i] >= reached.amax(0) - 1e-6).all())
        assert torch.allclose(low[i], reached.amin(0), atol=0.02)
        assert torch.allclose(high[i], reached.amax(0), atol=0.02)


def test_a_linear_network_has_closed_ranges():
    net = nn.Linear(3, 2).double()
    box = Box(-torch.ones(1, 3).double(), torch.tensor([[1.0, -1.0, 3.0]]).double())
    rows = torch.tensor([[[1.0, -1.0]]]).double()
    low, high = output_ranges(net, box, rows)
    weight, offset = net.weight[0] - net.weight[1], net.bias[0] - net.bias[1]
    middle, reach = weight @ box.center[0] + offset, weight.abs() @ box.radius[0]
    assert torch.allclose(torch.stack([low, high]).flatten(), torch.stack([middle - reach, middle + reach]))


def test_a_tiny_box_is_resolved():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    with torch.no_grad():
        net[0].bias.copy_(-net[0].weight @ torch.tensor([0.5, 0.5]).double())  # all units bend at the centre
    center = torch.full((1, 2), 0.5, dtype=torch.float64)
    wide, tiny = (output_ranges(net, Box(center - eps, center + eps)) for eps in (0.1, 1e-7))
    offset = net[2].bias
    assert torch.allclose((tiny[1] - offset) / 1e-7, (wide[1] - offset) / 0.1, rtol=1e-5)
    assert torch.allclose((tiny[0] - offset) / 1e-7, (wide[0] - offset) / 0.1, rtol=1e-5)


def test_without_time_nothing_is_said():
    torch.manual_seed(0)
    net = NETS["mlp"]().double()
    low, high = output_ranges(net, Box(torch.zeros(1, 2).double(), torch.ones(1, 2).double()), timeout=0)
    assert bool(low.isnan().all())
    assert bool(high.isnan().all())


@pytest.mark.parametrize("layer", [nn.Tanh(), nn.Sequential(nn.Unflatten(1, (1, 4)), nn.MaxPool1d(2), nn.Flatten())])
def test_other_nonlinearities_are_named(layer):
    net = nn.Sequential(nn.Linear(2, 4), layer)
    with pytest.raises(BadInput, match=r"Tanh|Max.*not a piecewise-linear function of one variable"):
        output_ranges(net, Box(torch.zeros(1, 2), torch.ones(1, 2)))
