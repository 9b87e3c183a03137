"""The perceptron's steps are those of plain SGD, its data thins out as it says, and temperature only scales it."""

import math

import pytest
import torch
from scipy.special import gammainc

from corollary.base.errors import BadInput
from corollary.base.seeds import Seeds
from corollary.dynamics.noise_perceptron import BLOCK, depleted_sign_data, perceptron_noise
from corollary.engine.sampling import distinct_rows


@pytest.mark.parametrize("chi", [0.0, 1.0, 3.0])
def test_the_density_at_the_boundary_falls_as_the_power_chi(chi):
    n = 400_000
    x, y = depleted_sign_data(n, 2, chi, seed=1)
    assert torch.equal(y, torch.sign(x[:, 0]))
    assert float(y.mean().abs()) < 4 / math.sqrt(n)
    near = [float((x[:, 0].abs() < eps).double().mean()) for eps in (0.3, 0.6, 2.0)]
    for share, eps in zip(near, (0.3, 0.6, 2.0), strict=True):
        exact = float(gammainc((chi + 1) / 2, eps**2 / 2))
        assert abs(share - exact) < 4 * math.sqrt(exact * (1 - exact) / n)
    # 1 + chi up to the curvature of the exponential over (0.3, 0.6) and the counts of about 400 rare points
    assert math.log2(near[1] / near[0]) == pytest.approx(1 + chi, abs=0.25)


def test_without_depletion_all_coordinates_are_normal():
    x, _ = depleted_sign_data(200_000, 3, 0.0, seed=2)
    assert torch.allclose(x.mean(0), torch.zeros(3).double(), atol=0.01)
    assert torch.allclose(x.T.cov(), torch.eye(3).double(), atol=0.015)
    assert torch.allclose(x.pow(4).mean(0), torch.full((3,), 3.0).double(), atol=0.1)


def one_after_the_other(points, temperature, chi, dimension, batch_size, alpha, seed, max_steps):
    """Plain SGD with a look at all points after every step."""
    x, y = depleted_sign_data(points, dimension, chi, seed)
    generator = Seeds(seed)("perceptron batches")
    w = torch.zeros(dimension, dtype=torch.float64)
    margin = 1 / alpha
    for step in range(max_steps):
        if step % BLOCK == 0:
            drawn = distinct_rows(points, batch_size, min(BLOCK, max_steps - step), generator)
        f = x @ w / math.sqrt(dimension)
        open_points = (y * f < margin) | (f == 0)
        if not bool(open_points.any()):
            return w, step, True
        for i in drawn[step % BLOCK].tolist():
            if open_points[i]:
                w = w + temperature * y[i] * x[i] / math.sqrt(dimension)
    return w, max_steps, False


@pytest.mark.parametrize(
    ("chi", "alpha", "max_steps"),
    [(0.0, math.inf, 5000), (1.0, math.inf, 5000), (0.0, 0.7, 5000), (0.0, math.inf, 90)],
    ids=["zero margin", "depleted", "finite margin", "cut off in a block"],
)
def test_updates_passed_over_or_not_the_weights_are_those_of_plain_steps(chi, alpha, max_steps):
    seeds, temperature = [3, 4, 5], [0.5, 1.0, 2.0]
    run = perceptron_noise(
        40, temperature, chi=chi, dimension=6, batch_size=3, alpha=alpha, seeds=seeds, max_steps=max_steps
    )
    for i, (seed, t) in enumerate(zip(seeds, temperature, strict=True)):
        w, steps, finished = one_after_the_other(40, t, chi, 6, 3, alpha, seed, max_steps)
        assert bool(run.finished[i]) is finished
        assert int(run.steps[i]) == steps  # the first step at which all is fitted, not the next look at it
        assert float(run.time[i]) == steps * t * 3
        torch.testing.assert_close(run.weights[i], w, rtol=0, atol=1e-12)
    torch.testing.assert_close(run.w1, run.weights[:, 0])
    torch.testing.assert_close(run.signal_to_noise, run.w1 / run.weights[:, 1:].square().sum(1).sqrt())


def test_a_member_is_the_run_it_would_be_alone_and_equal_seeds_are_equal_to_the_bit():
    together = perceptron_noise(64, [1.0, 0.5, 2.0], seeds=[7, 8, 9], max_steps=2000)
    again = perceptron_noise(64, [1.0, 0.5, 2.0], seeds=[7, 8, 9], max_steps=2000)
    assert torch.equal(together.weights, again.weights)
    for i, (seed, t) in enumerate(((7, 1.0), (8, 0.5), (9, 2.0))):
        alone = perceptron_noise(64, t, seeds=seed, max_steps=2000)
        torch.testing.assert_close(alone.weights[0], together.weights[i], rtol=0, atol=1e-12)
        assert int(alone.steps[0]) == int(together.steps[i])


def test_at_zero_margin_temperature_only_scales_the_trajectory():
    temperature = torch.tensor([1.0, 0.25, 4.0, 3.0], dtype=torch.float64)
    run = perceptron_noise(256, temperature, seeds=[2] * 4, max_steps=200)
    gaps = (run.weights - temperature[:, None] * run.weights[0]).norm(dim=1) / run.weights[0].norm()
    assert float(gaps[:3].max()) == 0.0  # powers of two are exact
    assert float(gaps[3]) < 1e-12 * 3
    with_margin = perceptron_noise(256, [1.0, 4.0], alpha=1.0, seeds=[2] * 2, max_steps=200)
    assert (
        float((with_margin.weights[1] / 4 - with_margin.weights[0]).norm()) > 1e-3
    )  # the control: a margin is a scale


def test_finished_means_that_every_point_is_beyond_the_margin():
    run = perceptron_noise(50, 1.0, alpha=2.0, dimension=8, seeds=[1, 2], max_steps=100_000)
    assert bool(run.finished.all())
    for i, seed in enumerate((1, 2)):
        x, y = depleted_sign_data(50, 8, 0.0, seed)
        agreement = y * (x @ run.weights[i]) / math.sqrt(8)
        assert float(agreement.min()) >= 0.5


def test_a_batch_of_all_points_is_gradient_descent():
    run = perceptron_noise(5, 1.0, dimension=16, batch_size=5, seeds=[0], max_steps=500)
    w, steps, finished = one_after_the_other(5, 1.0, 0.0, 16, 5, math.inf, 0, 500)
    assert finished
    assert int(run.steps[0]) == steps
    torch.testing.assert_close(run.weights[0], w, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points": 3}, "a batch holds 1 to 3"),
        ({"points": 8, "batch_size": 0}, "a batch holds"),
        ({"points": 8, "temperature": 0.0}, "temperature and alpha are positive"),
        ({"points": 8, "alpha": -1.0}, "temperature and alpha are positive"),
        ({"points": 8, "max_steps": 0}, "max_steps at least 1"),
        ({"points": 8, "chi": -1.0}, "chi > -1"),
        ({"points": 8, "dimension": 1}, "2 dimensions or more"),
        ({"points": 8, "temperature": [1.0, 2.0], "seeds": [1, 2, 3]}, "one per member"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(BadInput, match=message):
        perceptron_noise(**arguments)
