import dataclasses

import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput, CannotCapture, NothingMeasured
from corollary.base.seeds import Seeds
from corollary.data import Dataset, Split, digits
from corollary.dynamics.losses import half_square
from corollary.dynamics.probe_stability import stability
from corollary.dynamics.stability import stability_report
from corollary.engine import fit, seeded
from corollary.evidence import Budget, Subject, Training
from corollary.evidence.battery import check_probe

KNOWN = Training("sgd", learning_rate=0.05, batch_size=32, momentum=0.9)


def network():
    return nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))


@pytest.fixture(scope="module")
def net():
    data = digits()
    rule = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9)}
    return fit(seeded(network, 0), (data.train.x, data.train.y), epochs=4, batch_size=32, **rule).module.eval()


def few(n=100):
    data = digits()
    return Dataset("few digits", Split(data.train.x[:n], data.train.y[:n]), None, "classification", data.classes)


def subject(net, data, training=KNOWN, loss=nn.functional.cross_entropy, seconds=600.0):
    return Subject("net", net, CannotCapture("not needed"), data, loss, Seeds(0), Budget(seconds), training)


def values(finding):
    return {measurement.name: measurement.value for measurement in finding.measurements}


def test_keeps_the_promises_of_a_probe(net):
    check_probe(stability, subject(net, few()))


def test_what_it_says(net):
    data = few()
    found = values(stability.run(subject(net, data)))
    report = stability_report(
        net, nn.functional.cross_entropy, (data.train.x, data.train.y), 0.05, 32, momentum=0.9, replacement=False
    )
    assert found["learning rate over the mean-square threshold"] == pytest.approx(0.05 / report.mean_square_limit)
    assert found["trace over its limit"] == pytest.approx(0.05 / report.trace_limit)
    wanted = 0.05 * report.largest_eigenvalue / (2 * 1.9)
    assert found["largest eigenvalue over the edge of stability"] == pytest.approx(wanted)
    assert found["largest stable learning rate"] == pytest.approx(report.mean_square_limit)
    assert 1 / 100 < found["share of the sharpest sample"] < 1


def test_one_number_is_for_the_first_screen(net):
    for training in (KNOWN, Training()):
        finding = stability.run(subject(net, few(60), training))
        assert sum(measurement.headline for measurement in finding.measurements) == 1


@pytest.mark.parametrize(
    ("training", "note"),
    [
        (Training(batch_size=16), "learning rate is not known: give --learning-rate"),
        (Training("adam", learning_rate=0.01, batch_size=16), "Adam"),
        (Training(learning_rate=0.01), "batch size is not known"),
        (Training(learning_rate=0.01, batch_size=500), "500 is above the samples measured"),
    ],
)
def test_what_is_not_known_is_said_and_thresholds_are_shown_all_the_same(net, training, note):
    finding = stability.run(subject(net, few(60), training))
    found = values(finding)
    assert any(note in text for text in finding.notes)
    assert found["largest stable learning rate"] > 0
    compared = training.learning_rate is not None and training.optimizer == "sgd"
    assert ("learning rate over the mean-square threshold" in found) is compared


def test_a_short_budget_measures_less_and_says_so(net, monkeypatch):
    monkeypatch.setattr("corollary.dynamics.probe_stability._affordable", lambda subject, x, y: 40)
    finding = stability.run(subject(net, few()))
    coverage = finding.measurements[0].coverage
    assert coverage is not None
    assert (coverage.measured, coverage.of) == (40, 100)
    assert any("40 of 100" in note for note in finding.notes)
    assert any("Batch normalisation" in note for note in finding.notes)


def test_no_time_at_all_is_declined(net):
    with pytest.raises(NothingMeasured, match="--budget"):
        stability.run(subject(net, few(), seconds=1e-6))


def test_regression_with_half_squares_is_exact():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).eval()
    x = torch.randn(50, 3)
    data = Dataset("line", Split(x, plain(x).detach()), None, "regression")
    finding = stability.run(subject(plain, data, Training(learning_rate=0.1, batch_size=1), loss=half_square))
    report = stability_report(plain, half_square, (x, plain(x).detach()), 0.1, 1, replacement=False)
    assert report.interpolating
    assert report.exact
    assert values(finding)["learning rate over the mean-square threshold"] == pytest.approx(
        0.1 / report.mean_square_limit, rel=1e-5
    )
    assert finding.notes == ()


def test_what_cannot_be_asked_is_declined(net):
    wide = nn.Linear(64, 500).eval()
    with pytest.raises(NothingMeasured, match="500 outputs"):
        stability.run(subject(wide, few()))
    bent = dataclasses.replace(
        subject(net, few(60)), loss=lambda outputs, targets: -nn.functional.cross_entropy(outputs, targets)
    )
    with pytest.raises(BadInput, match="not convex"):
        stability.run(bent)
