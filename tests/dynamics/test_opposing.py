import copy

import numpy as np
import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput, NotDeterministic
from corollary.dynamics.losses import half_square
from corollary.dynamics.opposing import OpposingSignals, opposing_report, replay
from corollary.dynamics.opposing_gradients import curvature_shares, opposition, per_sample_losses, sharpest
from corollary.dynamics.opposing_groups import OpposingGroups, find_opposing_groups, without_groups
from corollary.dynamics.opposing_linear import OpposingLinearModel, opposing_data
from corollary.engine import TrainingRecord
from corollary.linalg import hessian, sharpness

SHARE, ALPHA = 0.1, 100.0


def planted():
    """200 samples of the linear model of which 20 carry the opposing coordinate: who opposes whom is known."""
    generator = torch.Generator().manual_seed(0)
    x, y, carriers = opposing_data(200, [0.6, -0.8], ALPHA, fraction=SHARE, generator=generator)
    net = OpposingLinearModel(SHARE * ALPHA, [0.6, -0.8], 0.6, (0.1, 0.02)).network()
    return net, x, y, carriers


def trained(net, x, y, learning_rate, steps, watcher=None):
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate)
    for step in range(steps):
        if watcher is not None:
            watcher.observe(step)
        optimizer.zero_grad()
        half_square(net(x), y).backward()
        optimizer.step()
    return net


def test_single_losses_average_to_the_loss():
    net, x, y, _ = planted()
    losses = per_sample_losses(net, half_square, (x, y), chunk=7)
    with torch.no_grad():
        assert float(losses.mean()) == pytest.approx(float(half_square(net(x), y)), rel=1e-12)
        assert torch.allclose(losses, (net(x)[:, 0] - y).square() / 2)
    classes = torch.arange(200) % 3
    wide = nn.Linear(3, 3).double()
    with torch.no_grad():
        expected = nn.functional.cross_entropy(wide(x), classes, reduction="none")
    assert torch.allclose(per_sample_losses(wide, nn.functional.cross_entropy, (x, classes)), expected)


def test_cosine_of_the_two_signs_is_known():
    """At b = 0 the gradient by b_o is -c mean(x_o y), of size c alpha for carriers, opposite for the two signs."""
    _, x, y, _ = planted()
    net = OpposingLinearModel(1.0, [0.0, 0.0], 1.0, (0.0, 0.0)).network()
    positive, negative = (x[:, -1] > 0).nonzero().flatten(), (x[:, -1] < 0).nonzero().flatten()
    found = opposition(net, half_square, (x, y), positive, negative)
    gradients = [-(x[rows] * y[rows, None]).mean(0) for rows in (positive, negative)]  # by b; that by c is zero
    assert found == pytest.approx(float(nn.functional.cosine_similarity(*gradients, dim=0)), abs=1e-12)
    assert found < -0.9
    assert opposition(net, half_square, (x, y), positive, positive) == pytest.approx(1.0)


def test_curvature_shares_against_the_dense_hessian():
    net, x, y, carriers = planted()
    rows = carriers.nonzero().flatten()
    groups = OpposingGroups(rows[:10], rows[10:], 0)
    found = curvature_shares(net, half_square, (x, y), groups, generator=torch.Generator().manual_seed(0))
    dense = hessian(net, half_square, (x, y)).to_dense()
    values, vectors = torch.linalg.eigh(dense)
    q = vectors[:, -1]
    part = hessian(net, half_square, (x[groups.rising], y[groups.rising])).to_dense()
    assert found.all == pytest.approx(float(values[-1]), rel=1e-6)
    assert found.rising == pytest.approx(float(q @ part @ q), rel=1e-3)  # q itself is found to 1e-4
    assert min(found.rising, found.falling) > 5 * found.all
    assert min(found.rising, found.falling) > 3 * found.random > 0  # by chance that one holds carriers too


def test_watching_a_loop_finds_the_planted_groups_at_the_edge():
    net, x, y, carriers = planted()
    rate = 0.24  # beyond 2 / (share alpha c^2) = 2 / 10 once c reaches 1
    watcher = OpposingSignals(net, half_square, (x, y), fraction=0.05, learning_rate=rate)
    before = copy.deepcopy(net.state_dict())
    watcher.observe(0)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    watcher = OpposingSignals(net, half_square, (x, y), fraction=0.05, learning_rate=rate)
    trained(net, x, y, rate, 34, watcher)
    groups = watcher.groups()
    members = set(torch.cat([groups.rising, groups.falling]).tolist())
    assert members == set(carriers.nonzero().flatten().tolist())
    assert len(set(x[groups.rising, -1].sign().tolist())) == 1  # all of one sign
    report = watcher.report(window=10)  # within these the oscillation grows by a steady factor
    assert report.opposition < -0.5 < report.random_opposition
    assert report.reading.alternation > 0.9
    assert report.reading.concentration > 0.1
    assert report.edge == pytest.approx(rate * report.curvature.all / 2)
    assert report.figure().svg().startswith("<svg")
    table = report.table
    assert table["group"].count("rising") == table["group"].count("falling") == 10
    assert all(change > 0 for change, group in zip(table["change"], table["group"], strict=True) if group == "rising")
    assert table["input_mean"][0] == pytest.approx(float(x[table["sample"][0]].mean()))


def test_without_the_groups_the_sharpness_is_that_of_the_signal():
    net, x, y, carriers = planted()
    rows = carriers.nonzero().flatten()
    kept = without_groups((x, y), OpposingGroups(rows[:10], rows[10:], 0))
    assert torch.equal(kept[0], x[~carriers])
    assert torch.equal(kept[1], y[~carriers])
    tops = []
    for data in ((x, y), kept):
        fresh = trained(copy.deepcopy(net), *data, 0.05, 200)
        tops.append(sharpness(fresh, half_square, data).value)
    assert tops[0] > 3 * tops[1]


def test_below_the_edge_nothing_alternates():
    net, x, y, _ = planted()
    watcher = OpposingSignals(net, half_square, (x, y), fraction=0.05, learning_rate=0.02)
    trained(net, x, y, 0.02, 30, watcher)
    report = watcher.report()
    assert report.reading.alternation < 0.05
    assert report.edge is not None
    assert report.edge < 0.5


def test_a_saved_record_gives_the_same_groups_as_watching(tmp_path):
    net, x, y, _ = planted()
    watcher = OpposingSignals(net, half_square, (x, y), fraction=0.05)
    trained(net, x, y, 0.24, 40, watcher)
    record = TrainingRecord.load(watcher.record().save(tmp_path / "record.npz"))
    for step in (None, 17):
        found = find_opposing_groups(record, step, fraction=0.05)
        assert torch.equal(found.rising, watcher.groups(step).rising)
        assert torch.equal(found.falling, watcher.groups(step).falling)
    after = opposing_report(record, net, half_square, (x, y), fraction=0.05, window=20, learning_rate=0.24)
    assert after.reading.events == watcher.report(window=20).reading.events
    assert after.opposition < -0.5
    assert after.edge == pytest.approx(0.12 * after.curvature.all)
    with pytest.raises(BadInput, match="200 samples were recorded, but the data has 199"):
        opposing_report(record, net, half_square, (x[1:], y[1:]))


def test_given_weights_stand_in_for_the_networks_own():
    net, x, y, _ = planted()
    states = []
    reference = copy.deepcopy(net)
    watcher = OpposingSignals(net, half_square, (x, y))
    for step in range(4):
        states.append({name: p.detach().clone() for name, p in reference.named_parameters()})
        watcher.observe(step, states[-1])
        trained(reference, x, y, 0.1, 1)
    expected = [per_sample_losses(net, half_square, (x, y), params=state) for state in states]
    assert torch.allclose(watcher.history.losses, torch.stack(expected).float().double(), rtol=1e-6)


def test_replay_moves_copies_and_equals_plain_descent():
    net, x, y, _ = planted()
    before = copy.deepcopy(net.state_dict())
    watched = replay(net, half_square, (x, y), learning_rate=0.1, steps=6, momentum=0.5, weight_decay=0.01)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5, weight_decay=0.01)
    for row in watched.history.losses:
        assert torch.allclose(row, per_sample_losses(net, half_square, (x, y)).float().double(), rtol=1e-5)
        optimizer.zero_grad()
        half_square(net(x), y).backward()
        optimizer.step()


def test_replay_ends_where_it_diverges():
    net, x, y, _ = planted()
    watched = replay(net, half_square, (x, y), learning_rate=3.0, steps=60)
    assert 3 <= len(watched.history.steps) < 61
    bad = {name: torch.full_like(p, torch.nan) for name, p in net.named_parameters()}
    with pytest.raises(BadInput, match="diverged"):
        watched.observe(1000, bad)


def test_batch_norm_and_dropout_are_seen_in_evaluation_mode():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    x, y = torch.randn(40, 3).double(), torch.randn(40, 1).double()
    net(x)
    state = copy.deepcopy(net.state_dict())
    watcher = OpposingSignals(net, half_square, (x, y))
    for step in range(3):
        watcher.observe(step)
    assert net.training
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    losses = watcher.history.losses
    assert torch.equal(losses[0], losses[2])
    coupled = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 1)).double()
    with pytest.raises(BadInput, match="BatchNorm1d"):
        OpposingSignals(coupled, half_square, (x, y))


def test_wrong_second_derivatives_are_refused_and_few_digits_are_not():
    torch.manual_seed(0)
    x, y = torch.randn(60, 8), torch.arange(60) % 3
    wrong = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.utils.parametrizations.weight_norm(nn.Linear(16, 3)))
    with pytest.raises(BadInput, match="second derivative"):  # PyTorch's on the processor
        sharpest(wrong, nn.functional.cross_entropy, (x, y))
    saturated = nn.Linear(8, 3)
    with torch.no_grad():
        saturated.weight *= 40
        labels = saturated(x).argmax(1)
    top = sharpest(saturated, nn.functional.cross_entropy, (x, labels))
    exact = sharpest(copy.deepcopy(saturated).double(), nn.functional.cross_entropy, (x.double(), labels))
    assert float(top.values) == pytest.approx(float(exact.values), rel=1e-3)


class Noisy(nn.Linear):
    def forward(self, input):
        return super().forward(input + torch.rand_like(input))


def test_what_cannot_be_watched_is_refused():
    net, x, y, _ = planted()
    with pytest.raises(BadInput, match="mean over samples"):
        OpposingSignals(net, lambda outputs, targets: (outputs[:, 0] - targets).square().sum(), (x, y))
    with pytest.raises(BadInput, match="need 10 samples"):
        OpposingSignals(net, half_square, (x[:9], y[:9]))
    with pytest.raises(NotDeterministic):
        OpposingSignals(Noisy(3, 1).double(), half_square, (x, y))
    watcher = OpposingSignals(net, half_square, (x, y))
    watcher.observe(3)
    with pytest.raises(BadInput, match="in order"):
        watcher.observe(3)
    watcher.observe(4)
    with pytest.raises(BadInput, match="3 or more recorded steps, got 2"):
        watcher.report()


def test_the_same_seed_gives_the_same_report():
    reports = []
    for _ in range(2):
        net, x, y, _ = planted()
        reports.append(replay(net, half_square, (x, y), learning_rate=0.3, steps=12, seed=4).report())
    assert reports[0].opposition == reports[1].opposition
    assert reports[0].random_opposition == reports[1].random_opposition
    assert reports[0].curvature == reports[1].curvature
    assert np.array_equal(reports[0].traces["all"], reports[1].traces["all"])
