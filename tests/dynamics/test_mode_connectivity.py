import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from corollary.base.errors import BadInput
from corollary.base.seeds import Seeds
from corollary.dynamics.mode_connectivity import (
    PathValues,
    _refuse_settings,
    bezier,
    mode_connectivities,
    mode_connectivity,
    with_batch_statistics,
)
from corollary.dynamics.states import stacked, state_of
from corollary.engine import batch_order


def perceptron(seed=0, width=6, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, classes)).double()


def normalised(seed=0):
    torch.manual_seed(seed)
    return (
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)).double().eval()
    )


@pytest.fixture
def data():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def values(*error):
    e = torch.tensor(error, dtype=torch.float64)
    return PathValues(torch.linspace(0, 1, len(error), dtype=torch.float64), 2 * e, e)


def test_a_barrier_is_negative_and_a_better_way_positive():
    assert values(0.1, 0.2, 0.5, 0.3, 0.2).connectivity() == (pytest.approx(0.15 - 0.5), 0.5)
    assert values(0.6, 0.1, 0.2, 0.3, 0.4).connectivity() == (pytest.approx(0.5 - 0.1), 0.25)
    assert values(0.1, 0.2, 0.5, 0.3, 0.2).connectivity("loss")[0] == pytest.approx(2 * (0.15 - 0.5))
    assert values(0.3, 0.3, 0.3).connectivity()[0] == 0


def test_the_curve_ends_at_its_ends_to_the_bit():
    a, b, m = (state_of(perceptron(seed)) for seed in range(3))
    assert all(torch.equal(bezier(a, m, b, 0.0)[name], a[name]) for name in a)
    assert all(torch.equal(bezier(a, m, b, 1.0)[name], b[name]) for name in a)
    half = bezier(a, m, b, 0.5)
    assert all(torch.allclose(half[name], a[name] / 4 + m[name] / 2 + b[name] / 4) for name in a)


def test_equal_ends_without_training_are_connected(data):
    net = perceptron()
    same = state_of(net)
    found = mode_connectivity(net, same, same, data, steps=0)
    assert found.mc == 0
    assert found.straight_mc == 0
    assert mode_connectivity(net, same, same, data, steps=0, metric="loss").mc == pytest.approx(0, abs=1e-14)


def test_values_along_the_straight_line_are_those_of_the_networks_on_it(data):
    a, b = perceptron(0), perceptron(1)
    found = mode_connectivity(a, state_of(a), state_of(b), data, steps=0, points=5)
    x, y = data
    for t, loss, error in zip(found.straight.t, found.straight.loss, found.straight.error, strict=True):
        between = {name: (1 - t) * p + t * state_of(b)[name] for name, p in state_of(a).items()}
        outputs = torch.func.functional_call(a, between, (x,)).detach()
        assert float(loss) == pytest.approx(float(nn.functional.cross_entropy(outputs, y)), abs=1e-12)
        assert float(error) == pytest.approx(float((outputs.argmax(1) != y).double().mean()), abs=1e-12)


def test_training_is_that_of_one_curve_written_out(data):
    """The batched program against autograd and `torch.optim.SGD` for one pair."""
    a, b = perceptron(0), perceptron(1)
    first, second = state_of(a), state_of(b)
    settings = {"steps": 7, "learning_rate": 0.1, "momentum": 0.9, "batch_size": 16, "seed": 3}
    found = mode_connectivity(a, first, second, data, **settings)
    seeds = Seeds(3)
    middle = {name: ((p + second[name]) / 2).requires_grad_() for name, p in first.items()}
    optimizer = torch.optim.SGD(middle.values(), lr=0.1, momentum=0.9)
    positions = torch.rand(7, generator=seeds("positions on the curve"), dtype=torch.float64).tolist()
    for step, t in enumerate(positions):
        epoch, place = divmod(step, 4)
        rows = batch_order(seeds.integer("batches of the curve"), epoch, 50)[16 * place : 16 * place + 16]
        here = {
            name: (1 - t) ** 2 * p + 2 * t * (1 - t) * middle[name] + t**2 * second[name] for name, p in first.items()
        }
        optimizer.zero_grad()
        outputs = torch.func.functional_call(a, here, (data[0][rows],))
        nn.functional.cross_entropy(outputs, data[1][rows]).backward()
        optimizer.step()
    for name, tensor in middle.items():
        assert torch.allclose(found.midpoint[name], tensor.detach(), atol=1e-12)


def test_a_pair_in_a_batch_gives_what_it_gives_alone(data):
    nets = [perceptron(seed) for seed in range(3)]
    states = [state_of(net) for net in nets]
    together = mode_connectivities(nets[0], [(states[0], states[1]), (states[2], states[1])], data, steps=10)
    alone = mode_connectivity(nets[0], states[2], states[1], data, steps=10)
    assert torch.allclose(together[1].curve.loss, alone.curve.loss, atol=1e-12)
    again = mode_connectivities(nets[0], [(states[0], states[1]), (states[2], states[1])], data, steps=10)
    assert all(torch.equal(p.curve.loss, q.curve.loss) for p, q in zip(together, again, strict=True))


def test_training_lowers_the_barrier_between_permuted_copies(data):
    net = perceptron(width=12)
    for _ in range(200):
        loss = nn.functional.cross_entropy(net(data[0]), data[1])
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                parameter -= 0.5 * gradient
    state = state_of(net)
    order = torch.arange(12).flip(0)
    other = {**state, "0.weight": state["0.weight"][order], "0.bias": state["0.bias"][order]}
    other["2.weight"] = state["2.weight"][:, order]
    found = mode_connectivity(net, state, other, data, steps=100)
    assert found.straight_mc < -0.1  # both ends compute the same, their middle does not
    assert found.mc > found.straight_mc / 2


def test_batch_statistics_are_estimated_anew_without_dropout(data):
    net = normalised()
    members = with_batch_statistics(stacked(net, [state_of(net)]), data)
    reference = normalised()
    reference[3].p = 0.0
    update_bn([data[0]], reference)
    assert torch.allclose(members.buffers["1.running_mean"][0], reference[1].running_mean, atol=1e-12)
    assert torch.allclose(members.buffers["1.running_var"][0], reference[1].running_var, atol=1e-12)
    assert torch.equal(net[1].running_mean, torch.zeros(6, dtype=torch.float64))


def test_along_a_path_normalisation_and_dropout_are_handled(data):
    a, b = normalised(0), normalised(1)
    before = {name: tensor.clone() for name, tensor in state_of(a).items()}
    found = mode_connectivity(a, state_of(a), state_of(b), data, steps=5)
    fresh = normalised(0)
    fresh[3].p = 0.0
    update_bn([data[0]], fresh)
    fresh.eval()
    expected = nn.functional.cross_entropy(fresh(data[0]), data[1]).detach()
    assert float(found.curve.loss[0]) == pytest.approx(float(expected), abs=1e-12)
    again = mode_connectivity(a, state_of(a), state_of(b), data, steps=5)
    assert torch.equal(found.curve.loss, again.curve.loss)
    assert all(torch.equal(before[name], tensor) for name, tensor in state_of(a).items())
    assert not a.training


def test_frozen_statistics_lie_between_those_of_the_ends(data):
    """A program exported in evaluation mode has its normalisation as plain buffers: both ends keep their own."""

    class Frozen(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.inner = perceptron(seed)
            self.register_buffer("mean", torch.full((3,), float(seed), dtype=torch.float64))
            self.register_buffer("calls", torch.tensor(seed))

        def forward(self, x):
            return (self.inner(x) - self.mean) * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    a, b = Frozen(0), Frozen(1)
    found = mode_connectivity(a, state_of(a), state_of(b), data, steps=2, points=3)
    for values in (found.curve, found.straight):
        for end, net in ((0, a), (-1, b)):
            expected = nn.functional.cross_entropy(net(data[0]), data[1]).detach()
            assert float(values.loss[end]) == pytest.approx(float(expected), abs=1e-12)


def test_paths_can_be_evaluated_on_a_part(data):
    a, b = perceptron(0), perceptron(1)
    part = (data[0][:20], data[1][:20])
    found = mode_connectivity(a, state_of(a), state_of(b), data, steps=3, sample=part)
    whole = mode_connectivity(a, state_of(a), state_of(b), data, steps=3)
    assert all(torch.equal(found.midpoint[name], whole.midpoint[name]) for name in found.midpoint)
    expected = nn.functional.cross_entropy(a(part[0]), part[1]).detach()
    assert float(found.curve.loss[0]) == pytest.approx(float(expected), abs=1e-12)


def test_a_gradient_that_is_not_finite_leaves_the_curve_where_it_is(data):
    a, b = perceptron(0), perceptron(1)
    found = mode_connectivity(
        a, state_of(a), state_of(b), data, steps=5, loss=lambda outputs, y: (outputs.sum() - outputs.sum()).sqrt()
    )
    assert all(torch.equal(m, (state_of(a)[n] + state_of(b)[n]) / 2) for n, m in found.midpoint.items())


def test_quantities_have_a_loss_and_no_error(data):
    a, b = perceptron(0), perceptron(1)
    quantities = (data[0], torch.randn(50, 3, dtype=torch.float64))
    found = mode_connectivity(
        a, state_of(a), state_of(b), quantities, steps=3, loss=nn.functional.mse_loss, metric="loss"
    )
    assert found.curve.error.isnan().all()
    assert found.mc == found.curve.connectivity("loss")[0]
    with pytest.raises(BadInput, match="metric='loss'"):
        mode_connectivity(a, state_of(a), state_of(b), quantities, steps=0, loss=nn.functional.mse_loss)


def test_the_figure_draws_both_paths(data):
    a, b = perceptron(0), perceptron(1)
    figure = mode_connectivity(a, state_of(a), state_of(b), data, steps=1).figure()
    assert figure.svg().startswith("<svg")
    assert set(figure.data) == {"t", "curve 0", "straight 0"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points": 2}, "3 or more points"),
        ({"steps": -1}, "steps >= 0"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"learning_rate": 0.0}, "learning_rate > 0"),
    ],
)
def test_bad_settings_are_refused(data, settings, message):
    net = perceptron()
    with pytest.raises(BadInput, match=message):
        mode_connectivity(net, state_of(net), state_of(net), data, **settings)


def test_another_metric_is_refused():
    with pytest.raises(BadInput, match="'error' or 'loss'"):
        _refuse_settings(steps=1, learning_rate=0.1, batch_size=8, points=3, metric="accuracy")


def test_runs_of_another_width_are_refused(data):
    net = perceptron()
    with pytest.raises(BadInput, match="one architecture and width"):
        mode_connectivity(net, state_of(net), state_of(perceptron(width=5)), data)
