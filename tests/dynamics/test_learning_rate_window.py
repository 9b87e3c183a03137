import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.dynamics.learning_rate_window import learning_rate_window, ntk_lambda, weight_norm_step
from corollary.dynamics.losses import half_square
from corollary.dynamics.quadratic_models import HomogeneousNet, PureQuadratic, sphere_points
from corollary.linalg import ntk_matrix


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def squared_norm(net):
    return sum(float(p.detach().square().sum()) for p in net.parameters())


def test_the_eigenvalue_is_that_of_the_kernel_over_n(generator):
    x = sphere_points(6, 4, generator)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    wanted = torch.linalg.eigvalsh(ntk_matrix(net, x) / 6)[-1]
    assert ntk_lambda(net, x) == pytest.approx(float(wanted), rel=1e-9)


def test_a_sample_repeated_has_the_eigenvalue_of_the_sample():
    x, net = sphere_points(1, 4, torch.Generator().manual_seed(2)), HomogeneousNet(4, 8, 0.5)
    assert ntk_lambda(net, x.repeat(7, 1)) == pytest.approx(ntk_lambda(net, x), rel=1e-9)


def test_float32_networks_have_the_same_eigenvalue(generator):
    x = sphere_points(6, 4, generator)
    net = HomogeneousNet(4, 16)
    assert ntk_lambda(net.float(), x.float()) == pytest.approx(ntk_lambda(net.double(), x), rel=1e-4)


def test_the_window_is_two_and_four_over_the_eigenvalue(generator):
    x, net = sphere_points(6, 4, generator), HomogeneousNet(4, 16)
    window = learning_rate_window(net, x)
    assert window.lower * ntk_lambda(net, x) == pytest.approx(2)
    assert window.upper == 2 * window.lower


def test_just_below_the_window_a_linear_model_contracts_and_just_above_it_grows(generator):
    """A model linear in its weights: the threshold is exact, and 1/n belongs to it."""
    x, net = sphere_points(8, 3, generator), nn.Linear(3, 1, bias=False).double()
    lower = learning_rate_window(net, x).lower
    top = torch.linalg.eigh(x.mT @ x / 8).eigenvectors[:, -1]
    for factor, grows in ((0.99, False), (1.01, True)):
        with torch.no_grad():
            net.weight.copy_(top[None])
        (gradient,) = torch.autograd.grad(half_square(net(x), torch.zeros(8, dtype=torch.float64)), [net.weight])
        after = net.weight.detach() - factor * lower * gradient
        assert bool(after.norm() > 1) == grows


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("targets", ["zero", "signs"])
def test_the_weight_norm_steps_as_the_identity_says(slope, targets, generator):
    x = sphere_points(6, 4, generator)
    y = torch.zeros(6, dtype=torch.float64) if targets == "zero" else torch.tensor([1.0, -1] * 3, dtype=torch.float64)
    torch.manual_seed(0)
    net = HomogeneousNet(4, 32, slope)
    rate = 3.5 / ntk_lambda(net, x)
    found = weight_norm_step(net, x, y, rate)
    before = squared_norm(net)
    gradients = torch.autograd.grad(half_square(net(x), y), list(net.parameters()))
    with torch.no_grad():
        for p, g in zip(net.parameters(), gradients, strict=True):
            p -= rate * g
    assert found.change == pytest.approx(squared_norm(net) - before, abs=1e-12 * before)
    assert found.change == pytest.approx(found.predicted, abs=1e-12 * before)
    assert found.predicted <= found.bound + 1e-12 * before
    if targets == "zero":
        assert found.bound < 0


def test_with_zero_targets_the_bound_is_the_output_norm_times_its_factor(generator):
    net = PureQuadratic(3, 8)
    found = weight_norm_step(net, torch.arange(3), torch.zeros(3, dtype=torch.float64), 0.7)
    z = net(torch.arange(3)).detach()
    assert found.bound == pytest.approx(float(0.7 / 3 * z.square().sum() * (0.7 * found.kernel - 4)))


def test_a_network_of_another_degree_is_refused_unless_asked(generator):
    x, y = sphere_points(4, 3, generator), torch.zeros(4, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    with pytest.raises(BadInput, match="homogeneous of degree 2"):
        weight_norm_step(net, x, y, 0.1)
    found = weight_norm_step(net, x, y, 0.1, check=False)
    assert found.change != pytest.approx(found.predicted, abs=1e-9)


def test_a_float32_network_passes_the_check_of_its_degree(generator):
    x = sphere_points(4, 3, generator).float()
    found = weight_norm_step(HomogeneousNet(3, 64, dtype=torch.float32), x, torch.ones(4), 0.1)
    assert found.change == pytest.approx(found.predicted, rel=1e-3)


def test_no_samples_and_dead_networks_are_refused():
    net = HomogeneousNet(3, 4)
    with pytest.raises(BadInput, match="no samples"):
        ntk_lambda(net, torch.zeros(0, 3, dtype=torch.float64))
    with torch.no_grad():
        net.inner.copy_(-torch.ones(4, 3))
    with pytest.raises(BadInput, match="does not react"):
        learning_rate_window(net, torch.ones(2, 3, dtype=torch.float64))
