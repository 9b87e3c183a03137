"""The probe "utility": demo-like networks; too few samples, no classes, no time, probabilities for logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from corollary.base.errors import CannotCapture, NothingMeasured
from corollary.base.seeds import Seeds
from corollary.data import Dataset, Split, digits
from corollary.demo import network
from corollary.dynamics.probe_utility import utility
from corollary.engine import fit, seeded
from corollary.evidence import Budget, Subject
from corollary.evidence.battery import check_probe


def subject(net: nn.Module, data: Dataset | None, *, seconds: float = 3.0) -> Subject:
    return Subject("net", net.eval(), CannotCapture("it branches"), data, F.cross_entropy, Seeds(0), Budget(seconds))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    data = digits()
    assert data.train.y is not None
    return fit(
        seeded(network, 0),
        (data.train.x, data.train.y),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
        epochs=4,
        batch_size=64,
    ).module


def by_name(finding) -> dict:
    return {measurement.name: measurement for measurement in finding.measurements}


def test_the_demo_network_passes_the_battery(trained):
    check_probe(utility, subject(trained, digits()))


def test_the_demo_network(trained):
    data = digits()
    finding = utility.run(subject(trained, data))
    found = by_name(finding)
    assert data.test is not None
    right = float((trained(data.test.x).argmax(1) == data.test.y).double().mean())
    assert found["order accuracy, top-1"].value == pytest.approx(right)
    assert right <= found["order accuracy, top-3"].value <= 1
    assert found["accuracy of a draw, softmax"].value <= found["accuracy of the best class"].value + 0.02
    assert found["calibration error, softmax"].headline
    assert sum(measurement.headline for measurement in finding.measurements) == 1
    assert "198 samples and judged, with the softmax, on 199 others, all from the test data" in finding.notes[0]


def test_an_overconfident_network_is_told_and_mended(trained):
    """Ten times the logits: the same order, far worse probabilities, all of it taken back by the fit."""

    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = trained

        def forward(self, x):
            return 10 * self.net(x)

    plain, loud = (by_name(utility.run(subject(net, digits()))) for net in (trained, Loud()))
    for name in ("order accuracy, top-1", "order accuracy, top-3", "accuracy of the best class"):
        assert loud[name].value == plain[name].value
    assert loud["fitted factor on the logits"].value * 10 == pytest.approx(
        plain["fitted factor on the logits"].value, rel=1e-3
    )
    softmax, temperature, isotonic = (
        f"negative log-likelihood, {name}" for name in ("softmax", "temperature", "isotonic")
    )
    assert loud[softmax].value > 2 * plain[softmax].value
    assert loud[temperature].value == pytest.approx(plain[temperature].value, rel=1e-3)
    assert loud[isotonic].value == pytest.approx(plain[isotonic].value, rel=1e-3)


def test_probabilities_instead_of_logits_are_noted(trained):
    finding = utility.run(subject(nn.Sequential(trained, nn.Softmax(1)), digits()))
    assert any("probabilities, it seems" in note for note in finding.notes)


def test_without_time_fewer_samples_are_taken(trained):
    finding = utility.run(subject(trained, digits(), seconds=1e-6))
    coverage = by_name(finding)["order accuracy, top-1"].coverage
    assert (coverage.measured, coverage.of) == (128, 397)


def test_nothing_to_measure(trained):
    x = torch.zeros(10, 64)
    few = Dataset("few", Split(x, torch.arange(10)), None, "classification", None, "drawn", "none")
    with pytest.raises(NothingMeasured, match="too few"):
        utility.run(subject(trained, few))
    unlabelled = Dataset("x", Split(x, None), None, "unlabelled", None, "drawn", "none")
    for data in (None, unlabelled):
        with pytest.raises(NothingMeasured, match="--data"):
            utility.run(subject(trained, data))
