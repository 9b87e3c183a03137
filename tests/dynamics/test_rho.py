"""One scale and directions: the function is kept, the equilibrium is stationary, and what has no scale is refused."""

import math

import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.dynamics.rho import (
    RhoModel,
    equal_margin_output,
    equilibrium,
    margins_of,
    target_rows,
    with_constant,
)
from corollary.engine import seeded

TIGHT = 1e-12  # float64: rounding of a few dozen operations


def perceptron(outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 7, bias=False),
        nn.ReLU(),
        nn.Linear(7, 6, bias=False),
        nn.ReLU(),
        nn.Linear(6, outputs, bias=False),
    ).double()


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(12, 3, bias=False)
    ).double()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def signs() -> torch.Tensor:
    return torch.tensor([1.0, -1, 1, 1, -1, -1, 1, -1, 1]).double()


def test_scale_and_directions_give_the_same_function_and_leave_the_network_alone(x):
    net = seeded(perceptron, 0)
    before = {name: p.clone() for name, p in net.named_parameters()}
    model = RhoModel(net)
    torch.testing.assert_close(model(x), net(x), rtol=TIGHT, atol=TIGHT)
    assert model.rho.item() == pytest.approx(math.prod(p.norm().item() for p in net.parameters()), rel=TIGHT)
    assert all(v.norm().item() == pytest.approx(1, abs=TIGHT) for v in model.directions.values())
    assert all(torch.equal(before[name], p) for name, p in net.named_parameters())


def test_only_directions_count(x):
    model = RhoModel(seeded(perceptron, 0))
    outputs = model(x).detach()
    with torch.no_grad():
        model.net[2].weight.mul_(3)
    torch.testing.assert_close(model(x), outputs, rtol=TIGHT, atol=TIGHT)


def test_the_plain_network_has_the_same_function_and_balanced_norms(x):
    model = RhoModel(seeded(perceptron, 0))
    plain = model.network()
    torch.testing.assert_close(plain(x), model(x), rtol=TIGHT, atol=TIGHT)
    norms = [p.norm().item() for p in plain.parameters()]
    assert norms == pytest.approx([norms[0]] * 3, rel=TIGHT)


def test_a_scale_below_zero_has_no_plain_network():
    model = RhoModel(seeded(perceptron, 0))
    with torch.no_grad():
        model.rho.neg_()
    with pytest.raises(BadInput, match="rho is -"):
        model.network()


@pytest.mark.parametrize("make", [perceptron, convolutional])
def test_euler_derivative_along_each_layer_is_the_output(make, x):
    inputs = x if make is perceptron else torch.randn(4, 2, 4, 4, dtype=torch.float64)
    model = RhoModel(seeded(make, 1))
    outputs = model.normalised(inputs)
    along = model.homogeneity(inputs)
    assert set(along) == set(model.directions)
    for derivative in along.values():
        torch.testing.assert_close(derivative, outputs, rtol=1e-10, atol=1e-12)


def test_euler_derivative_agrees_with_the_gradient(x):
    model = RhoModel(seeded(perceptron, 1))
    directions = {name: v.detach().requires_grad_() for name, v in model.directions.items()}
    total = torch.func.functional_call(model.net, directions, (x,)).sum()
    gradients = torch.autograd.grad(total, list(directions.values()))
    for derivative, gradient, v in zip(model.homogeneity(x).values(), gradients, directions.values(), strict=True):
        assert derivative.sum().item() == pytest.approx((gradient * v).sum().item(), rel=1e-10)


def test_the_equilibrium_is_where_the_loss_is_stationary_in_the_scale(x, signs):
    model, penalty = RhoModel(seeded(perceptron, 0)), 0.03
    with torch.no_grad():
        model.rho.fill_(model.equilibrium(x, signs, penalty))
    loss = (model(x)[:, 0] - signs).square().mean() + penalty * model.rho**2
    assert float(torch.autograd.grad(loss, model.rho)[0]) == pytest.approx(0, abs=1e-13)


def test_the_equilibrium_of_classes_is_stationary_too(x):
    model, penalty, y = RhoModel(seeded(perceptron, 2, 3)), 0.03, torch.tensor([0, 1, 2] * 3)
    with torch.no_grad():
        model.rho.fill_(model.equilibrium(x, y, penalty))
    loss = (model(x) - nn.functional.one_hot(y, 3)).square().sum(1).mean() + penalty * model.rho**2
    assert float(torch.autograd.grad(loss, model.rho)[0]) == pytest.approx(0, abs=1e-13)


def test_the_equilibrium_in_closed_form_for_margins(x, signs):
    model = RhoModel(seeded(perceptron, 0))
    margins = model.margins(x, signs)
    expected = margins.mean() / (0.01 + margins.square().mean())
    assert model.equilibrium(x, signs, 0.01) == pytest.approx(float(expected), rel=TIGHT)


def test_a_sum_over_samples_takes_n_times_the_penalty(x, signs):
    """The trap of sum and mean: with the summed loss the same scale belongs to n times the penalty."""
    model, penalty = RhoModel(seeded(perceptron, 0)), 0.03
    scale = model.equilibrium(x, signs, penalty)
    f = model.normalised(x)[:, 0]
    derivative = 2 * ((scale * f - signs) * f).sum() + 2 * len(x) * penalty * scale
    assert float(derivative) == pytest.approx(0, abs=1e-12)


def test_members_are_handled_together(x, signs):
    models = [RhoModel(seeded(perceptron, seed)) for seed in (0, 1)]
    outputs, rows = torch.stack([m.normalised(x) for m in models]), signs[:, None]
    together = equilibrium(outputs, rows, torch.tensor([0.1, 0.2]).double())
    assert together.tolist() == pytest.approx(
        [m.equilibrium(x, signs, p) for m, p in zip(models, (0.1, 0.2), strict=True)]
    )
    torch.testing.assert_close(margins_of(outputs, rows)[1], models[1].margins(x, signs))


def test_margins_of_classes_are_the_lead_over_the_best_other():
    outputs = torch.tensor([[1.0, 3.0, 2.0], [0.0, 5.0, 1.0]])
    assert margins_of(outputs, target_rows(torch.tensor([1, 2]), outputs)).tolist() == [1.0, -4.0]


@pytest.mark.parametrize(("penalty", "margin"), [(1e-3, 0.4), (0.05, 0.3)])
def test_equal_margins_give_the_closed_form(penalty, margin):
    rho = margin / (penalty + margin**2)
    assert equal_margin_output(penalty, rho) == pytest.approx(rho * margin, rel=1e-12)


def test_without_penalty_equal_margins_fit_exactly():
    assert equal_margin_output(0.0, 3.0) == 1.0


@pytest.mark.parametrize(("penalty", "rho"), [(0.26, 1.0), (-0.1, 1.0), (math.nan, 1.0)])
def test_no_equilibrium_of_equal_margins(penalty, rho):
    with pytest.raises(BadInput, match="1/4"):
        equal_margin_output(penalty, rho)


def test_a_constant_input_does_what_a_bias_does():
    x = torch.randn(4, 3)
    layer = nn.Linear(3, 2)
    wide = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        wide.weight.copy_(torch.cat([layer.weight, layer.bias[:, None]], dim=1))
    torch.testing.assert_close(wide(with_constant(x)), layer(x))


@pytest.mark.parametrize(
    ("net", "named"),
    [
        (nn.Sequential(nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 1)), "'2' has a bias"),
        (
            nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1, bias=False)),
            "'1'",
        ),
        (nn.Sequential(nn.Linear(5, 4, bias=False), nn.LayerNorm(4), nn.Linear(4, 1, bias=False)), "LayerNorm"),
        (nn.Sequential(nn.Linear(5, 4, bias=False), nn.PReLU(), nn.Linear(4, 1, bias=False)), "'1'"),
        (nn.ReLU(), "no weights"),
    ],
)
def test_what_is_not_homogeneous_by_its_parts_is_refused_by_name(net, named):
    with pytest.raises(BadInput, match=named):
        RhoModel(net)


def test_weights_of_zero_have_no_direction():
    net = perceptron()
    nn.init.zeros_(net[2].weight)
    with pytest.raises(BadInput, match="no direction"):
        RhoModel(net)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 5, bias=False).double(), nn.Linear(5, 1, bias=False).double()

    def forward(self, x):
        return self.last(x + self.first(x).relu())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 5, bias=False).double(), nn.Linear(5, 1, bias=False).double()

    def forward(self, x):
        return self.last(self.first(self.first(x).relu()))


@pytest.mark.parametrize(
    ("net", "layer"),
    [
        (Residual(), "first"),
        (Tied(), "first"),
        (nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 1, bias=False)).double(), "0"),
    ],
)
def test_what_is_not_homogeneous_in_its_function_is_refused_by_name(net, layer, x):
    with pytest.raises(BadInput, match=f"layer '{layer}'"):
        RhoModel(net).normalised(x)


@pytest.mark.parametrize(
    ("targets", "outputs"),
    [
        (torch.tensor([0.0, 1.0]), 1),
        (torch.tensor([0, 1, 1]), 1),
        (torch.tensor([0, 3]), 3),
        (torch.tensor([0.5, 1.0]), 3),
        (torch.zeros(2, 4), 3),
    ],
)
def test_targets_of_another_form_are_refused(targets, outputs):
    with pytest.raises(BadInput, match="targets for outputs"):
        target_rows(targets, torch.zeros(2, outputs))


def test_a_negative_penalty_is_refused(x, signs):
    with pytest.raises(BadInput, match="at least 0"):
        RhoModel(perceptron()).equilibrium(x, signs, -0.1)
