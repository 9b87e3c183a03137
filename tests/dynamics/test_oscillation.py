import numpy as np
import pytest
import torch

from corollary.base.errors import BadInput
from corollary.base.seeds import Seeds
from corollary.dynamics.feature_noise import FeatureNoiseData, PatchSquaredReLU
from corollary.dynamics.losses import half_square
from corollary.dynamics.oscillation import benign_oscillation_sweep, patch_outputs
from corollary.dynamics.residuals import residual_drift
from corollary.engine import batch_order, population

SMALL = {"dimension": 30, "samples": 12, "width": 3, "test_samples": 40}


def test_outputs_and_their_gradients_are_those_of_the_network():
    nets = [PatchSquaredReLU(6, 3, seed) for seed in range(2)]
    x = torch.randn(2, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs, pull = patch_outputs(torch.stack([net.weight.detach().flatten(0, 1) for net in nets]), x)
    for index, net in enumerate(nets):
        value = net(x[[index]])
        (gradient,) = torch.autograd.grad(value.sum(), [net.weight])
        assert float(value.detach()) == pytest.approx(float(outputs[index]))
        assert torch.allclose((pull[index] @ x[index]).unflatten(0, (2, 3)), gradient)


def test_a_run_is_plain_sgd_of_the_network():
    found = benign_oscillation_sweep((0.5, 1.2), seeds=2, steps=60, seed=5, **SMALL)
    stream = Seeds(5).child("run 1")
    data = FeatureNoiseData(30, 12, seed=stream.integer("data"))
    net = PatchSquaredReLU(30, 3, stream.integer("weights"))
    order = torch.cat([batch_order(stream.integer("order"), epoch, 12) for epoch in range(5)])
    residuals = []
    for index in order.tolist():
        x, y = data.train.x[[index]], data.train.y[[index]]
        value = net(x)
        residuals.append(float((1 - y * value).detach()))
        (gradient,) = torch.autograd.grad(half_square(value, y), [net.weight])
        with torch.no_grad():
            net.weight.sub_(1.2 * net.edge(1.0) * gradient)
    assert np.allclose(found.record["residual"][:60, 3], residuals, atol=1e-12)
    assert found.learning_rate[3] == pytest.approx(1.2 * net.edge(1.0))
    with torch.no_grad():
        test = data.weak_test(40)
        right = float((net(test.x) * test.y > 0).double().mean())
        fitted = float((net(data.train.x) * data.train.y > 0).double().mean())
        weak, strong = (float((net(f[None, None]) - net(-f[None, None]))[0]) / 2 for f in (data.weak, data.strong))
    assert (found.weak_accuracy[3], found.train_accuracy[3]) == pytest.approx((right, fitted))
    assert (found.weak_margin[3], found.strong_margin[3]) == pytest.approx((weak, strong))


def test_the_population_engine_gives_the_same_run():
    """The written-out update against `engine.population`: batches of one, its own order, one member."""
    stream = Seeds(0).child("run 0")
    found = benign_oscillation_sweep((1.1,), seeds=1, steps=24, **SMALL)
    data = FeatureNoiseData(30, 12, seed=stream.integer("data"))
    net = PatchSquaredReLU(30, 3, stream.integer("weights"))
    other = population(
        [net],
        (data.train.x, data.train.y),
        seeds=[stream.integer("order")],
        loss=half_square,
        learning_rate=1.1 * net.edge(1.0),
        batch_size=1,
        steps=24,
        record_every=1,
    )
    assert np.allclose(np.sqrt(2 * other.record["loss"][:24, 0]), np.abs(found.record["residual"][:24, 0]), atol=1e-12)


def test_the_edge_separates_calm_from_oscillation():
    found = benign_oscillation_sweep((0.8, 1.2, 3.0), seeds=2, steps=1500, dimension=100, samples=30, test_samples=100)
    calm, wild, gone = (found.multiple == level for level in (0.8, 1.2, 3.0))
    assert (found.oscillation[calm] <= 0.02).all()
    assert (found.oscillation[wild] > 0.1).all()
    assert (found.drift[wild] > 5 * np.abs(found.drift[calm]).max()).all()
    assert (found.weak_margin[wild] > 3 * found.weak_margin[calm]).all()
    assert found.diverged[gone].all()
    assert not found.diverged[~gone].any()
    assert (found.train_accuracy[~gone] == 1).all()


def test_a_diverged_run_is_not_called_oscillating():
    found = benign_oscillation_sweep((0.5, 50.0), seeds=1, steps=60, **SMALL)
    assert found.diverged.tolist() == [False, True]
    for column in (found.oscillation, found.train_accuracy, found.weak_accuracy, found.drift, found.weak_margin):
        assert np.isnan(column[1])
        assert np.isfinite(column[0])


def test_rates_share_data_weights_and_order():
    found = benign_oscillation_sweep((0.5, 1.2), seeds=2, steps=3, **SMALL)
    first = found.record["residual"][0]
    assert first[0] == first[2]
    assert first[0] != first[1]
    alone = benign_oscillation_sweep((1.2,), seeds=2, steps=3, **SMALL)
    assert np.array_equal(alone.record["residual"][:3], found.record["residual"][:3, 2:])


def test_a_decay_changes_the_rate_from_its_step_on():
    constant = benign_oscillation_sweep((1.2,), seeds=1, steps=40, **SMALL).record["residual"][:40, 0]
    decayed = benign_oscillation_sweep((1.2,), seeds=1, steps=40, decay=(20, 0.2), **SMALL).record["residual"][:40, 0]
    low = benign_oscillation_sweep((0.2,), seeds=1, steps=40, **SMALL).record["residual"][:40, 0]
    all_low = benign_oscillation_sweep((1.2,), seeds=1, steps=40, decay=(0, 0.2), **SMALL).record["residual"][:40, 0]
    assert np.array_equal(constant[:21], decayed[:21])  # the update of step 20 shows at step 21
    assert not np.array_equal(constant[21:], decayed[21:])
    assert np.array_equal(low, all_low)


def test_a_killed_sweep_resumes_to_the_bit(tmp_path):
    whole = benign_oscillation_sweep((0.5, 1.2), seeds=2, steps=50, **SMALL)
    file = tmp_path / "sweep"
    benign_oscillation_sweep((0.5, 1.2), seeds=2, steps=21, checkpoint=file, **SMALL)
    resumed = benign_oscillation_sweep((0.5, 1.2), seeds=2, steps=50, checkpoint=file, **SMALL)
    for name in ("weak_accuracy", "oscillation", "drift", "weak_margin"):
        assert np.array_equal(getattr(whole, name), getattr(resumed, name))
    with pytest.raises(BadInput, match="another run"):
        benign_oscillation_sweep((0.5, 1.3), seeds=2, steps=50, checkpoint=file, **SMALL)


def test_with_replacement_is_another_order():
    shuffled = benign_oscillation_sweep((0.5,), seeds=1, steps=12, **SMALL)
    drawn = benign_oscillation_sweep((0.5,), seeds=1, steps=12, order="replacement", **SMALL)
    assert not np.array_equal(shuffled.record["residual"], drawn.record["residual"])


def test_its_record_has_residuals_to_sum():
    found = benign_oscillation_sweep((1.2,), seeds=2, steps=40, **SMALL)
    assert residual_drift(found.record).cumulative.shape == (40, 2)


def test_figure_and_table():
    found = benign_oscillation_sweep((0.5, 1.2, 50.0), seeds=2, steps=60, **SMALL)
    assert found.figure().svg().startswith("<svg")
    assert len(found) == 6 == len(found.table()["weak_accuracy"])
    assert "record" not in found.table()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"multiples": ()}, "positive multiples"),
        ({"multiples": (0.0,)}, "positive multiples"),
        ({"seeds": 0}, "seeds=0"),
        ({"decay": (10, 0.0)}, "decay"),
        ({"decay": (-1, 0.5)}, "decay"),
        ({"rho": 1.0}, "rho"),
    ],
)
def test_what_is_no_sweep_is_refused(options, says):
    with pytest.raises(BadInput, match=says):
        benign_oscillation_sweep(**{"multiples": (1.0,), "seeds": 1, "steps": 2, **SMALL, **options})
