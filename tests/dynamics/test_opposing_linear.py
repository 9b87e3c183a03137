import math

import pytest
import torch
from torch.func import grad, hessian

from corollary.base.errors import BadInput
from corollary.dynamics.losses import half_square
from corollary.dynamics.opposing_linear import OpposingLinearModel, opposing_data


def several():
    """Three members with two signal weights each."""
    beta = torch.tensor([[1.0, -0.5], [0.3, 2.0], [-1.0, 0.2]])
    first = torch.tensor([[0.1, 0.2], [0.0, 0.3], [0.2, 0.1]])
    return OpposingLinearModel([5.0, 20.0, 50.0], beta, [0.3, 0.5, -0.4], (first, 0.2))


def loss_of(model, member):
    beta, alpha = model.beta[member], model.alpha[member]

    def loss(weights):
        signal, opposing, c = weights[:-2], weights[-2], weights[-1]
        return ((c * signal - beta).square().sum() + alpha * (c * opposing).square()) / 2

    return loss


def test_one_step_is_the_gradient_of_the_loss():
    model = several()
    path = model.gradient_descent([0.01, 0.02, 0.03], 1)
    for member, rate in enumerate((0.01, 0.02, 0.03)):
        start = torch.cat([model.signal[member], model.opposing[member, None], model.c[member, None]])
        wanted = start - rate * grad(loss_of(model, member))(start)
        found = torch.cat([path.signal[1, member], path.opposing[1, member, None], path.c[1, member, None]])
        assert torch.allclose(found, wanted, atol=1e-15)
        assert float(path.loss[0, member]) == pytest.approx(float(loss_of(model, member)(start)), rel=1e-14)


def test_the_hessian_is_that_of_the_loss():
    model = several()
    path = model.gradient_descent(0.01, 5)
    for member in range(3):
        weights = torch.cat([path.signal[3, member], path.opposing[3, member, None], path.c[3, member, None]])
        assert torch.allclose(path.hessian[3, member], hessian(loss_of(model, member))(weights), atol=1e-12)


def test_flow_conserves_and_ends_at_the_closed_form():
    model = several()
    path = model.flow(torch.linspace(0, 60, 13))
    assert torch.allclose(path.conserved, path.conserved[0].expand_as(path.conserved), atol=1e-8)
    # The error decays like exp(-c^2 t) and is far below the integrator's tolerance at the end.
    assert torch.allclose(path.sharpness[-1], model.sharpness_limit(), rtol=1e-8)
    assert torch.allclose(model.sharpness(), path.sharpness[0])
    assert (path.loss.diff(dim=0) <= 1e-12).all()


def test_at_the_end_the_opposing_curvature_is_the_largest_eigenvalue_for_alpha_above_two():
    for alpha in (3.0, 30.0):
        model = OpposingLinearModel(alpha, [1.0, 2.0], 0.3, (0.05, 0.2))
        end = model.flow([80.0])
        top = torch.linalg.eigvalsh(end.hessian[-1, 0])[-1]
        assert float(top) == pytest.approx(float(model.sharpness_limit()), rel=1e-8)


def test_the_limit_is_linear_in_the_signal_for_small_balanced_weights():
    model = OpposingLinearModel(10.0, torch.tensor([[1.0], [2.0], [4.0]]), 1e-4, (0.0, 1e-4))
    assert torch.allclose(model.sharpness_limit(), 10.0 * model.beta[:, 0], rtol=1e-8)


def test_small_steps_of_descent_follow_the_flow():
    model = OpposingLinearModel(20.0, 1.0, 0.3, (0.05, 0.2))
    errors = []
    for rate, steps in ((1e-3, 1000), (5e-4, 2000)):
        path = model.gradient_descent(rate, steps, every=steps)
        errors.append(float((path.sharpness[-1] - model.flow([1.0]).sharpness[-1]).abs()))
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.05)  # Euler's method is of first order


def test_sharpness_falls_first_where_the_opposing_weight_is_large():
    model = OpposingLinearModel(50.0, 1.0, 0.3, (0.05, 0.2))
    path = model.flow(torch.linspace(0, 20, 400))
    assert path.sharpness.min() < 0.8 * path.sharpness[0] < path.sharpness[-1]


def test_group_losses_differ_by_twice_the_pull():
    path = several().gradient_descent(0.02, 50)
    plus, minus = path.group_losses
    assert torch.allclose(plus - minus, -2 * path.model.alpha * path.c * path.opposing, atol=1e-10)
    assert torch.allclose((plus + minus) / 2, path.loss + path.model.alpha / 2, atol=1e-10)


def test_beyond_the_edge_the_groups_take_turns_and_the_sharpness_recovers():
    model = OpposingLinearModel([20.0, 20.0], 1.0, 0.3, (0.05, 0.2))
    rates = torch.tensor([0.05, 0.12], dtype=torch.float64)
    path = model.gradient_descent(rates, 400)
    assert path.alternation()[0] == 0  # signs that rounding swallows do not count
    assert path.alternation()[1] > 0.8
    assert path.sharpness[:, 1].max() > 2 / rates[1] > path.sharpness[-1, 1]
    assert path.loss[-1, 1] < 1e-8 < 1e-2 < path.loss[40:, 1].max()


def test_at_the_edge_the_opposing_weight_only_changes_its_sign():
    # One step multiplies b_o by 1 - rate * S: exactly -1 where the rate is 2 / S.
    model = OpposingLinearModel(8.0, 1.0, 1.0, (1.0, 1e-9))
    path = model.gradient_descent(2 / 8.0, 1)
    assert float(path.opposing[1]) == pytest.approx(-1e-9, rel=1e-12)


def test_the_sampled_model_has_the_population_loss_in_the_mean():
    generator = torch.Generator().manual_seed(0)
    beta = [0.6, -0.8]
    x, y, carriers = opposing_data(40_000, beta, 9.0, generator=generator)
    assert bool(carriers.all())
    assert float(x[:, -1].sum()) == 0.0
    model = OpposingLinearModel(9.0, beta, 0.4, ([0.2, 0.1], 0.3))
    with torch.no_grad():
        sampled = half_square(model.network()(x), y)
    expected = float(model.gradient_descent(0.1, 1).loss[0, 0]) + 4.5  # the constant alpha / 2
    assert float(sampled) == pytest.approx(expected, rel=0.03)  # about 1 / sqrt(n) of each squared term


def test_a_share_of_the_samples_carries_the_feature_half_with_each_sign():
    generator = torch.Generator().manual_seed(0)
    x, y, carriers = opposing_data(500, 1.0, 400.0, fraction=0.02, generator=generator)
    assert int(carriers.sum()) == 10
    assert sorted(x[carriers, -1].tolist()) == [-20.0] * 5 + [20.0] * 5
    assert not bool(x[~carriers, -1].any())
    assert torch.allclose(y - x[:, 0], x[:, -1].abs())
    for fraction in (0.0, 1.5):
        with pytest.raises(BadInput, match="fraction"):
            opposing_data(500, 1.0, 400.0, fraction=fraction, generator=generator)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0.0, 1.0, 0.3, (0.1, 0.1)), "positive alpha"),
        ((1.0, math.nan, 0.3, (0.1, 0.1)), "finite"),
        (([1.0, 2.0], 1.0, [0.3, 0.3, 0.3], (0.1, 0.1)), "do not agree"),
        ((torch.ones(2, 2), 1.0, 0.3, (0.1, 0.1)), r"\[member\]"),
    ],
)
def test_members_that_do_not_fit_are_refused(arguments, words):
    with pytest.raises(BadInput, match=words):
        OpposingLinearModel(*arguments)


def test_paths_that_make_no_sense_are_refused():
    model = OpposingLinearModel(2.0, 1.0, 0.3, (0.1, 0.1))
    for times in ([-1.0], [2.0, 1.0], []):
        with pytest.raises(BadInput, match="ascending"):
            model.flow(times)
    with pytest.raises(BadInput, match="1 or more steps"):
        model.gradient_descent(0.1, 0)
    assert len(model.gradient_descent(0.1, 10, every=3).times) == 4
