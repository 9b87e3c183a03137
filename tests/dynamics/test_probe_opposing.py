import dataclasses

import pytest
import torch
from torch import nn

from corollary.base.errors import CannotCapture, NothingMeasured
from corollary.base.seeds import Seeds
from corollary.data import Dataset, Split, digits, load
from corollary.demo import network
from corollary.dynamics.opposing import replay
from corollary.dynamics.probe_opposing import opposing
from corollary.engine import TrainingRecord, fit, seeded
from corollary.evidence import Budget, Subject, Training
from corollary.evidence.battery import check_probe


@pytest.fixture(scope="module")
def net():
    data = digits()
    adam = {"optimizer": lambda parameters: torch.optim.Adam(parameters, lr=3e-3)}
    return fit(seeded(network, 0), (data.train.x, data.train.y), epochs=10, batch_size=64, **adam).module


def subject(net, data=None, seconds=4.0, **more):
    data = digits() if data is None else data
    loss = nn.functional.mse_loss if data.task == "regression" else nn.functional.cross_entropy
    program = CannotCapture("not needed")
    return Subject("net", net, program, data, loss, Seeds(0), Budget(seconds), **more)


def values(finding):
    return {measurement.name: measurement.value for measurement in finding.measurements}


def test_keeps_the_promises_of_a_probe(net):
    check_probe(opposing, subject(net))


def test_without_a_rate_it_replays_at_the_edge(net):
    finding = opposing.run(subject(net))
    found = values(finding)
    assert found["opposition"] < found["opposition of random groups"]
    assert "edge of stability" not in found  # that would be of a rate nobody trained with
    assert found["concentration of changes"] > 0.1
    assert any("beyond the edge" in note for note in finding.notes)
    picture = finding.figures[1].data
    assert picture["image"].shape == (16, 8, 8)
    assert list(picture["group"]).count("rising") == 8
    data = digits()
    for place in (0, 9):  # labels belong to the pictures
        sample = picture["image"][place].reshape(-1)
        row = int((data.train.x - torch.from_numpy(sample)).abs().sum(1).argmin())
        assert picture["target"][place] == str(int(data.train.y[row]))


def test_with_a_rate_it_says_how_far_the_edge_is(net):
    training = Training(learning_rate=0.05, momentum=0.5)
    found = values(opposing.run(subject(net, training=training)))
    assert found["edge of stability"] == pytest.approx(0.05 / found["largest stable learning rate"], rel=1e-6)
    adam = Training("adam", learning_rate=0.003)
    finding = opposing.run(subject(net, training=adam))
    assert "edge of stability" not in values(finding)
    assert any("Adam" in note for note in finding.notes)


def test_a_record_of_single_losses_is_read(net):
    data = digits()
    watched = replay(net, nn.functional.cross_entropy, (data.train.x, data.train.y), learning_rate=0.5, steps=8)
    finding = opposing.run(subject(net, record=watched.record(), training=Training(learning_rate=0.5)))
    assert finding.notes[0].startswith("Read from the record")
    assert len(finding.figures[0].data["step"]) == 9
    other = TrainingRecord()
    for step in range(4):
        other.log(step, per_sample_loss=torch.rand(50))
    finding = opposing.run(subject(net, record=other))
    assert any("50 samples" in note for note in finding.notes)


def test_rows_of_features_and_regression():
    torch.manual_seed(0)
    x = torch.randn(60, 5)
    data = Dataset("table", Split(x, x[:, :1] ** 2), None, "regression")
    finding = opposing.run(subject(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).eval(), data))
    picture = finding.figures[1]
    assert picture.data["features"].shape == (10, 5)
    assert picture.svg().startswith("<svg")


def test_images_with_channels():
    torch.manual_seed(0)
    x, y = torch.rand(30, 3, 6, 6), torch.arange(30) % 3
    data = Dataset("images", Split(x, y), None, "classification", ("a", "b", "c"))
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    picture = opposing.run(subject(module, data)).figures[1]
    assert picture.data["image"].shape == (10, 6, 6, 3)
    assert picture.svg().startswith("<svg")


def test_a_short_budget_measures_less_and_says_so(net):
    finding = opposing.run(subject(net, seconds=0.1))
    coverage = next(m.coverage for m in finding.measurements if m.name == "opposition")
    assert 10 <= coverage.measured < 1400 == coverage.of
    with pytest.raises(NothingMeasured, match="--budget"):
        opposing.run(subject(net, seconds=0.0))


def test_a_network_that_fits_its_data_all_but_perfectly():
    """In float32 the second derivatives of a saturated softmax have few digits left; the probe says what it can."""
    data = load("wine").standardised()
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(13, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(data.train.x), data.train.y).backward()
        optimizer.step()
    found = values(opposing.run(subject(module.eval(), data)))
    assert -1 <= found["opposition"] <= 1
    assert 0 < found["largest stable learning rate"] < 1e3


def test_what_has_no_groups_is_declined(net):
    data = digits()
    few = Dataset("few", Split(data.train.x[:9], data.train.y[:9]), None, "classification", data.classes)
    with pytest.raises(NothingMeasured, match="10 training samples"):
        opposing.run(subject(net, few))
    unlabelled = Dataset("bare", Split(data.train.x), None, "unlabelled")
    with pytest.raises(NothingMeasured, match="targets"):
        opposing.run(subject(net, unlabelled))
    flat = dataclasses.replace(subject(net), loss=lambda outputs, targets: 0 * outputs.mean())
    with pytest.raises(NothingMeasured, match="no positive curvature"):
        opposing.run(flat)
