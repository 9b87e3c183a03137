import math

import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.dynamics.losses import half_square
from corollary.dynamics.quadratic_models import (
    HomogeneousNet,
    PureQuadratic,
    QuadraticModel,
    UVRecursion,
    homogeneous_state,
    sphere_points,
)
from corollary.linalg import ntk_matrix


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def descend(net, x, y, rate, steps):
    """Plain gradient descent, written out: outputs at every step."""
    outputs = []
    for _ in range(steps):
        z = net(x)
        outputs.append(z.detach())
        gradients = torch.autograd.grad(half_square(z, y), list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), gradients, strict=True):
                p -= rate * g
    return torch.stack(outputs)


@pytest.mark.parametrize("target", [0.0, 1.5])
@pytest.mark.parametrize("rate", [0.4, 1.2])
def test_the_recursion_is_gradient_descent_on_the_uv_network(target, rate):
    torch.manual_seed(1)
    net = HomogeneousNet(1, 64, slope=1)
    x, y = torch.ones(1, 1, dtype=torch.float64), torch.tensor([target], dtype=torch.float64)
    kernel = float((net.inner.square().sum() + net.outer.square().sum()).detach() / 64)
    path = UVRecursion(64, target).run(net(x).detach()[0], kernel, rate, 19)
    outputs = descend(net, x, y, rate, 20)
    assert torch.allclose(path.outputs, outputs[:, 0], rtol=0, atol=1e-12 * float(outputs.abs().max()))
    assert kernel == pytest.approx(float(path.kernels[0]))


def test_the_recursion_runs_all_combinations_at_once():
    starts = torch.tensor([[0.5], [1.0]], dtype=torch.float64)
    rates = torch.tensor([0.5, 1.0, 1.4], dtype=torch.float64)
    together = UVRecursion(100).run(starts, 2.0, rates, 7)
    alone = UVRecursion(100).run(1.0, 2.0, 1.4, 7)
    assert together.outputs.shape == (8, 2, 3)
    assert torch.equal(together.outputs[:, 1, 2], alone.outputs)
    assert torch.equal(together.kernels[:, 1, 2], alone.kernels)


def test_small_outputs_are_linear_at_fixed_kernel():
    path = UVRecursion(10**9).run(1e-3, 2.0, 0.3, 20)
    assert torch.allclose(path.outputs, 1e-3 * (1 - 0.6) ** torch.arange(21.0, dtype=torch.float64), rtol=1e-6)


@pytest.mark.parametrize("slope", [0.0, 0.1, 1.0])
def test_closed_form_kernel_is_that_of_the_jacobian(slope, generator):
    x = sphere_points(5, 4, generator)
    torch.manual_seed(0)
    net = HomogeneousNet(4, 9, slope)
    found = homogeneous_state(dict(net.named_parameters()), x, slope)
    assert torch.allclose(found.outputs, net(x), atol=1e-14)
    assert torch.allclose(found.kernel, ntk_matrix(net, x) / 5, atol=1e-14)
    hidden = x @ net.inner.mT
    assert float(found.active) == pytest.approx(float((hidden > 0).double().mean()))
    assert float(found.dead) == pytest.approx(float((hidden <= 0).all(0).double().mean()))


def test_closed_form_takes_leading_axes(generator):
    x = sphere_points(3, 4, generator)
    nets = [HomogeneousNet(4, 6) for _ in range(2)]
    stacked = {name: torch.stack([dict(net.named_parameters())[name] for net in nets]) for name in ("inner", "outer")}
    found = homogeneous_state(stacked, x)
    assert torch.allclose(found.kernel[1], homogeneous_state(dict(nets[1].named_parameters()), x).kernel)
    assert found.active.shape == (2,)


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
def test_two_layers_are_homogeneous_of_degree_two(slope, generator):
    x, net = sphere_points(5, 4, generator), HomogeneousNet(4, 9, slope)
    before = net(x).detach()
    with torch.no_grad():
        for p in net.parameters():
            p *= 3
    assert torch.allclose(net(x), 9 * before)


def test_a_pure_quadratic_model_is_its_forms():
    net = PureQuadratic(4, 6, seed=3)
    wanted = torch.stack([0.5 * net.theta @ form @ net.theta for form in net.forms])
    assert torch.allclose(net(torch.arange(4)), wanted)
    assert torch.allclose(net(torch.tensor([2, 2, 0])), wanted[[2, 2, 0]])
    assert torch.equal(net.forms, net.forms.mT)
    assert float(net.forms.diagonal(dim1=1, dim2=2).sum(1).abs().max()) < 1e-14
    jacobian = torch.stack([form @ net.theta for form in net.forms])
    assert torch.allclose(ntk_matrix(net, torch.arange(4)), jacobian @ jacobian.mT)


def test_forms_with_trace_differ_by_the_identity_alone():
    with_trace, without = PureQuadratic(2, 5, zero_trace=False, seed=1), PureQuadratic(2, 5, seed=1)
    difference = with_trace.forms - without.forms
    assert torch.allclose(difference, difference[:, :1, :1] * torch.eye(5, dtype=torch.float64))


def displaced(net, vector, scale):
    """The network at its weights plus `scale` times a flat vector."""
    with torch.no_grad():
        start = 0
        for p in net.parameters():
            p += scale * vector[start : start + p.numel()].reshape(p.shape)
            start += p.numel()
    return net


def test_the_taylor_model_misses_the_network_by_the_third_order(generator):
    x = sphere_points(5, 3, generator)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    model = QuadraticModel.from_module(net)
    assert torch.equal(model(x), net(x))
    vector = torch.randn(model.displacement.numel(), generator=generator, dtype=torch.float64)
    errors = []
    for scale in (1e-2, 5e-3):
        with torch.no_grad():
            model.displacement.copy_(scale * vector)
        moved = displaced(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double(), vector, 0.0)
        moved.load_state_dict(net.state_dict())
        errors.append(float((model(x) - displaced(moved, vector, scale)(x)).detach().abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(3, abs=0.1)


def test_the_taylor_model_of_a_quadratic_network_is_the_network():
    net = PureQuadratic(3, 5)
    model = QuadraticModel(net)
    vector = torch.randn(5, dtype=torch.float64)
    with torch.no_grad():
        model.displacement.copy_(vector)
        net.theta += vector
    assert torch.allclose(model(torch.arange(3)), net(torch.arange(3)), atol=1e-13)


def test_the_taylor_model_starts_with_the_kernel_of_its_network(generator):
    x = sphere_points(4, 3, generator)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    assert torch.allclose(ntk_matrix(QuadraticModel(net), x), ntk_matrix(net, x))


def test_the_taylor_model_leaves_its_network_alone_and_in_evaluation_mode(generator):
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)).double()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    model = QuadraticModel(net).train()
    half_square(model(sphere_points(4, 3, generator)), torch.zeros(4, dtype=torch.float64)).backward()
    assert not model.origin.training
    assert net.training
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["displacement"]
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_sphere_points_have_the_radius_of_gaussian_points(generator):
    assert torch.allclose(sphere_points(7, 9, generator).norm(dim=1), torch.full((7,), 3.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: UVRecursion(0), "width=0"),
        (lambda: UVRecursion(3).run(1.0, 1.0, 1.0, -1), "steps=-1"),
        (lambda: PureQuadratic(0, 3), "got 0 and 3"),
        (lambda: HomogeneousNet(3, 4, slope=1.5), "slope=1.5"),
        (lambda: HomogeneousNet(0, 4), "inputs=0"),
        (lambda: QuadraticModel(nn.ReLU()), "no trainable parameters"),
    ],
)
def test_what_cannot_be_built_is_refused(make, says):
    with pytest.raises(BadInput, match=says):
        make()
