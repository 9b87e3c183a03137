import math

import pytest
import torch

from corollary.base.errors import BadInput
from corollary.dynamics.grokking import grokking_delay, odd_fraction
from corollary.dynamics.losses import half_square
from corollary.dynamics.xor_clusters import (
    TwoLayerReLU,
    descent,
    first_step,
    grok_xor,
    linear_surrogate,
    logistic,
    xor_clusters,
)

DOUBLE = {"dtype": torch.float64}


@pytest.fixture(scope="module")
def small():
    """The smallest case of the specification in which all is exact."""
    return xor_clusters(60, 500, seed=3, **DOUBLE), TwoLayerReLU(500, 20, seed=3, **DOUBLE)


def test_clusters_lie_where_they_are_said_to():
    data = xor_clusters(8000, 6, square_norm=50.0, noise=0.2, seed=1, **DOUBLE)
    assert data.means @ data.means.T == pytest.approx(50 * torch.eye(2).double())
    for cluster, centre in enumerate((data.means[0], -data.means[0], data.means[1], -data.means[1])):
        own = data.x[data.cluster == cluster]
        # About 2000 samples of unit variance: standard error 0.022, five of them.
        assert own.mean(0) == pytest.approx(centre, abs=0.12)
        assert own.var(0) == pytest.approx(torch.ones(6).double(), abs=0.16)
        assert data.clean[data.cluster == cluster].unique().tolist() == [1.0 if cluster < 2 else -1.0]
    assert float((data.y != data.clean).double().mean()) == pytest.approx(0.2, abs=0.025)


def test_balanced_clusters_differ_by_one_sample_at_most():
    counts = torch.bincount(xor_clusters(203, 4, balanced=True).cluster)
    assert int(counts.max() - counts.min()) == 1
    assert torch.bincount(xor_clusters(200, 4, balanced=True).cluster).tolist() == [50] * 4


def test_the_seed_gives_data_and_test_set():
    first, again, other = (xor_clusters(20, 8, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.y, again.y)
    assert not torch.equal(first.x, other.x)
    test_x, test_y = first.test(30)
    assert torch.equal(test_x, again.test(30)[0])
    assert not torch.isin(test_x, first.x).any()
    assert test_y.abs().unique().tolist() == [1.0]
    quiet = xor_clusters(20, 8, seed=5, noise=0.0)  # the other streams stay as they are
    assert torch.equal(quiet.x, first.x)
    assert torch.equal(quiet.y, quiet.clean)


def test_signs_are_fixed_fair_coins_and_only_the_first_layer_is_trained():
    net = TwoLayerReLU(3, 10_000, initial_scale=0.5, seed=2)
    assert [name for name, _ in net.named_parameters()] == ["weight"]
    assert net.signs.abs().unique().tolist() == pytest.approx([0.01])
    assert abs(int((net.signs > 0).sum()) - 5000) < 250  # five standard errors
    assert float(net.weight.detach().std()) == pytest.approx(0.5, rel=0.02)


def test_no_unit_is_active_at_the_kink():
    net = TwoLayerReLU(2, 3, **DOUBLE)
    with torch.no_grad():
        net.weight.zero_()
    x, y = torch.ones(4, 2).double(), torch.ones(4).double()
    stepped = list(descent(net, x, y, x, learning_rate=1.0, steps=1))[-1]
    assert not stepped.dense().any()


@pytest.mark.parametrize("scale", [1e-9, 1e-3])
def test_first_step_is_the_closed_form_as_far_as_the_start_vanishes(scale):
    data = xor_clusters(50, 2000, seed=0, **DOUBLE)
    net = TwoLayerReLU(2000, 32, initial_scale=scale, seed=0, **DOUBLE)
    (gradient,) = torch.autograd.grad(logistic(net(data.x), data.y), net.weight)
    stepped = net.weight.detach() - 0.01 * gradient
    closed = first_step(net.weight.detach(), net.signs, data.x, data.y, 0.01)
    error = float((stepped - closed).norm() / (closed - net.weight.detach()).norm())
    largest = float(net(data.x).detach().abs().max())
    assert error <= largest  # the slope of the logistic loss is -1/2 + f/4 and less
    assert (error <= 1e-6) == (scale == 1e-9)


@pytest.mark.parametrize("gram", [True, False])
def test_descent_is_gradient_descent_by_automatic_differentiation(small, gram):
    data, start = small
    net = TwoLayerReLU(500, 20, seed=3, **DOUBLE)
    probes = data.test(5)[0]
    for weights in descent(start, data.x, data.y, probes, learning_rate=0.05, steps=6, gram=gram):
        assert weights.on_probes() == pytest.approx((probes @ net.weight.T).T.detach(), rel=1e-9)
        assert weights.square_norms() == pytest.approx(net.weight.detach().square().sum(1), rel=1e-9)
        assert weights.dense() == pytest.approx(net.weight.detach(), rel=1e-9, abs=1e-15)
        (gradient,) = torch.autograd.grad(logistic(net(data.x), data.y), net.weight)
        with torch.no_grad():
            net.weight -= 0.05 * gradient


def test_descent_takes_any_loss_and_leaves_the_network_alone(small):
    data, net = small
    before = net.weight.detach().clone()
    losses = [
        float(half_square(net.signs @ weights.on_samples().relu(), data.y))
        for weights in descent(net, data.x, data.y, data.x, learning_rate=0.01, steps=30, loss=half_square)
    ]
    assert losses[-1] < 0.1 * losses[0]
    assert torch.equal(net.weight, before)


def test_gram_space_gives_what_the_weights_give(small):
    data, net = small
    gram, direct = (grok_xor(data, net, steps=20, test_samples=100, gram=gram) for gram in (True, False))
    assert gram.record.columns == direct.record.columns
    for name in gram.record.columns:
        assert gram.record[name] == pytest.approx(direct.record[name], rel=1e-9)
    scale = float(direct.test_outputs.abs().max())
    assert float((gram.test_outputs - direct.test_outputs).abs().max()) <= 1e-9 * scale
    assert float((gram.train_outputs - direct.train_outputs).abs().max()) <= 1e-9 * scale


def test_what_is_recorded_is_what_the_trained_network_does(small):
    data, net = small
    found = grok_xor(data, net, steps=15, test_samples=80)
    test_x, test_y = data.test(80)
    outputs = found.network(test_x).detach()
    assert found.test_outputs[-1] == pytest.approx(outputs, rel=1e-9)
    last = {name: found.record[name][-1] for name in found.record.columns}
    assert last["test_accuracy"] == pytest.approx(float((outputs * test_y > 0).double().mean()))
    assert last["odd_fraction"] == pytest.approx(odd_fraction(found.network, test_x), rel=1e-9)
    assert last["train_accuracy"] == pytest.approx(float((found.network(data.x).detach() * data.y > 0).double().mean()))
    surrogate = linear_surrogate(data.x, data.y, test_x)
    assert last["surrogate_agreement"] == pytest.approx(float((outputs * surrogate > 0).double().mean()))
    weight = found.network.weight.detach()
    cosines = (weight @ data.means[1]).abs() / (weight.norm(dim=1) * data.means[1].norm())
    assert last["alignment"][1, 1] == pytest.approx(float(cosines[net.signs < 0].mean()), rel=1e-9)


def test_linear_surrogate_is_the_network_after_the_first_step_when_neurons_are_many():
    data = xor_clusters(20, 400, seed=0, **DOUBLE)
    net = TwoLayerReLU(400, 5000, initial_scale=1e-12, seed=0, **DOUBLE)
    weight = first_step(net.weight.detach(), net.signs, data.x, data.y, 1.0)
    # Averaged over neurons each sample counts half, and the signs cancel: f = (1/4) linear part + even part.
    odd = (weight @ data.x.T).T @ net.signs / 2
    surrogate = linear_surrogate(data.x, data.y, data.x) / 8
    assert odd == pytest.approx(surrogate, abs=0.1 * float(surrogate.abs().max()))


def test_it_groks():
    data = xor_clusters(120, 10_000, balanced=True, seed=2)
    found = grok_xor(data, TwoLayerReLU(10_000, 128, seed=2), steps=30, test_samples=400)
    record = found.record
    delay = grokking_delay(record, generalise=0.9)
    assert delay.fit == 1
    assert delay.generalise > 1
    assert abs(record["test_accuracy"][1] - 0.5) < 0.15
    assert record["odd_fraction"][1] > 0.9 > 0.5 > record["odd_fraction"][-1]
    assert found.figure().svg().startswith("<svg")


def test_large_initial_weights_fit_and_do_not_generalise():
    data = xor_clusters(60, 6000, square_norm=350.0, seed=0)
    record = grok_xor(data, TwoLayerReLU(6000, 64, initial_scale=0.03, seed=0), steps=40, test_samples=400).record
    assert record["train_accuracy"][-1] > 0.98
    assert record["test_accuracy"][-1] < 0.62


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: xor_clusters(10, 1), "dimension >= 2"),
        (lambda: xor_clusters(0, 4), "samples >= 1"),
        (lambda: xor_clusters(10, 4, noise=0.5), r"in \[0, 0.5\), got 0.5"),
        (lambda: xor_clusters(10, 4, noise=-0.1), "probability of a flipped label"),
        (lambda: xor_clusters(10, 4, square_norm=0), "must be above 0, got 0"),
        (lambda: xor_clusters(10, 4).test(0), "at least 1 test sample"),
        (lambda: TwoLayerReLU(4, 3, initial_scale=0.0), "at the kink of the ReLU"),
        (lambda: TwoLayerReLU(4, 0), "width >= 1"),
        (lambda: grok_xor(xor_clusters(10, 4), TwoLayerReLU(5, 3)), "takes 5 inputs"),
        (lambda: grok_xor(xor_clusters(10, 4), TwoLayerReLU(4, 3, **DOUBLE)), "float32"),
        (lambda: grok_xor(xor_clusters(10, 4), TwoLayerReLU(4, 3), learning_rate=0), "learning_rate must be above 0"),
        (lambda: grok_xor(xor_clusters(10, 4), TwoLayerReLU(4, 3), steps=-1), "steps at least 0"),
    ],
)
def test_what_has_no_meaning_is_refused(build, words):
    with pytest.raises(BadInput, match=words):
        build()


def test_samples_that_are_not_finite_are_refused(small):
    data, net = small
    broken = data.x.clone()
    broken[2, 3] = math.inf
    with pytest.raises(BadInput, match="NaN or infinite"):
        descent(net, broken, data.y, data.x, learning_rate=0.1, steps=1)
