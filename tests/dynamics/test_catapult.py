from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.base.seeds import Seeds
from corollary.dynamics.catapult import catapult_sweep, phases, stacked_activity, stacked_ntk_lambda
from corollary.dynamics.learning_rate_window import ntk_lambda
from corollary.dynamics.losses import half_square
from corollary.dynamics.quadratic_models import HomogeneousNet, PureQuadratic, QuadraticModel, sphere_points
from corollary.engine import seeded, stack

SAMPLES, INPUTS = 5, 6


@pytest.fixture
def points():
    return sphere_points(SAMPLES, INPUTS, torch.Generator().manual_seed(0))


@pytest.fixture
def signs():
    return torch.tensor([1.0, -1, 1, -1, 1], dtype=torch.float64)


def net_with_outputs():
    return nn.Sequential(nn.Linear(INPUTS, 7), nn.ReLU(), nn.Linear(7, 2)).double()


def test_the_uv_network_has_three_phases():
    x, y = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    make = partial(HomogeneousNet, 1, 256, 1.0)
    found = catapult_sweep(make, x, y, (0.5, 1.9, 3.0, 4.5), steps=100, seeds=2)
    assert found.phase.tolist() == ["lazy"] * 4 + ["catapult"] * 2 + ["divergent"] * 2
    inside = found.phase == "catapult"
    assert (found.edge[inside] < 2).all()
    assert (found.peak[inside] > 3).all()
    assert (found.norm_change[inside] < 0).all()
    assert (found.peak[:4] == 1).all()
    assert np.isnan(found.edge[-2:]).all()
    assert found.seed.tolist() == [0, 1] * 4


def test_one_run_of_a_sweep_is_plain_gradient_descent(points, signs):
    make = partial(HomogeneousNet, INPUTS, 32)
    found = catapult_sweep(make, points, signs, (2.5,), steps=20, seeds=2, seed=3)
    torch.manual_seed(0)  # has no effect on the sweep's own streams
    again = catapult_sweep(make, points, signs, (1.0, 2.5), steps=20, seeds=2, seed=3)
    assert np.array_equal(found.record["loss"], again.record["loss"][:, 2:])
    starts = found.record["loss"][0]
    net = seeded(make, Seeds(3).integer("run 1"))
    rate = 2.5 / ntk_lambda(net, points)
    assert float(half_square(net(points), signs).detach()) == pytest.approx(starts[1])
    losses = []
    for _ in range(20):
        loss = half_square(net(points), signs)
        losses.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), gradients, strict=True):
                p -= rate * g
    assert np.allclose(losses, found.record["loss"][:-1, 1], rtol=1e-8)


def test_a_killed_sweep_resumes_to_the_bit(points, signs, tmp_path):
    make, file = partial(HomogeneousNet, INPUTS, 16), tmp_path / "sweep"
    sweep = partial(catapult_sweep, make, points, signs, (1.0, 2.5), seeds=2)
    whole = sweep(steps=30)
    sweep(steps=12, checkpoint=file)
    resumed = sweep(steps=30, checkpoint=file)
    assert np.array_equal(whole.record["loss"], resumed.record["loss"])
    assert whole.phase.tolist() == resumed.phase.tolist()


def test_stacked_eigenvalues_are_those_of_each_network(points):
    nets = [seeded(net_with_outputs, seed) for seed in range(3)]
    found = stacked_ntk_lambda(stack(nets, points), points)
    assert found.tolist() == pytest.approx([ntk_lambda(net, points) for net in nets], rel=1e-8)


def test_several_outputs_are_one_kernel(points):
    targets = torch.zeros(SAMPLES, 2, dtype=torch.float64)
    found = catapult_sweep(net_with_outputs, points, targets, (1.0,), steps=5, seeds=1)
    assert found.phase.tolist() == ["lazy"]
    assert found.initial_kernel[0] * found.learning_rate[0] == pytest.approx(1)


def test_activity_counts_pairs_and_dead_units(points):
    nets = [seeded(net_with_outputs, seed) for seed in range(2)]
    with torch.no_grad():
        nets[0][0].bias[:3] = -100  # three units that no sample reaches
    found = stacked_activity(stack(nets, points), points)
    for index, net in enumerate(nets):
        positive = net[0](points) > 0
        assert float(found.active[index]) == pytest.approx(float(positive.double().mean()))
        assert float(found.dead[index]) == pytest.approx(float((~positive.any(0)).double().mean()))
    assert float(found.dead[0]) >= 3 / 7


def test_networks_without_relu_layers_have_no_activity(points, signs):
    found = catapult_sweep(partial(HomogeneousNet, INPUTS, 8, 1.0), points, signs, (1.0,), steps=2, seeds=1)
    assert np.isnan(found.active).all()


def test_taylor_models_and_forms_sweep_too(signs):
    forms = catapult_sweep(
        partial(PureQuadratic, SAMPLES, 30), torch.arange(SAMPLES), signs, (1.5, 6.0), steps=20, seeds=1
    )
    assert forms.phase.tolist() == ["lazy", "divergent"]
    x = sphere_points(SAMPLES, INPUTS, torch.Generator().manual_seed(0))
    taylor = catapult_sweep(
        lambda: QuadraticModel(HomogeneousNet(INPUTS, 64, 1.0)), x, signs, (1.0, 3.0), steps=30, seeds=1
    )
    exact = catapult_sweep(lambda: HomogeneousNet(INPUTS, 64, 1.0), x, signs, (1.0, 3.0), steps=30, seeds=1)
    assert np.isnan(taylor.norm_change).all()  # a displacement starts at zero
    assert np.allclose(taylor.record["loss"], exact.record["loss"], rtol=1e-6, atol=1e-20)


def test_a_dead_network_is_not_called_converged():
    assert phases(
        np.array([1.0, 9.0, 9.0, 9.0, 1.0]),
        np.array([0.1, 0.5, 0.5, 2.0, 0.5]),
        np.array([1.0, 0.0, 0.3, 0.3, 0.9]),
        np.array([False, False, False, False, True]),
    ).tolist() == ["lazy", "dead", "catapult", "unsettled", "divergent"]


def test_one_sample_can_kill_all_units():
    """Far above the window a single sample pushes every unit to where it is off: loss half y squared, kernel zero."""
    x, y = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    found = catapult_sweep(partial(HomogeneousNet, 1, 64), x, y, (8.0,), steps=60, seeds=6)
    assert "dead" in found.phase.tolist()
    dead = found.phase == "dead"
    assert (found.active[dead] == 0).all()
    assert (found.final[dead] == 0).all()


def test_figure_draws_every_phase(points, signs):
    found = catapult_sweep(partial(HomogeneousNet, INPUTS, 32), points, signs, (1.0, 2.5, 8.0), steps=30, seeds=2)
    figure = found.figure()
    assert figure.svg().startswith("<svg")
    shares = sum(np.asarray(figure.data[phase]) for phase in ("lazy", "catapult", "unsettled", "dead", "divergent"))
    assert (shares == 1).all()
    assert len(found.table()["phase"]) == len(found) == 6


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": torch.zeros(0, INPUTS, dtype=torch.float64), "y": torch.zeros(0, dtype=torch.float64)}, "no samples"),
        ({"multiples": ()}, "positive multiples"),
        ({"multiples": (1.0, -1.0)}, "positive multiples"),
        ({"seeds": 0}, "seeds=0"),
        ({"y": torch.zeros(SAMPLES, 3, dtype=torch.float64)}, "same shape"),
        ({"make_model": lambda: zero(HomogeneousNet(INPUTS, 4))}, "tangent kernel is zero"),
        ({"make_model": lambda: zero(HomogeneousNet(INPUTS, 4), "outer"), "y": torch.zeros(SAMPLES)}, "exactly zero"),
    ],
)
def test_what_shows_nothing_is_refused(points, signs, changes, says):
    given = {"make_model": partial(HomogeneousNet, INPUTS, 4), "x": points, "y": signs, **changes}
    with pytest.raises(BadInput, match=says):
        catapult_sweep(**given)


def zero(net, *names):
    with torch.no_grad():
        for name, p in net.named_parameters():
            if not names or name in names:
                p.zero_()
    return net
