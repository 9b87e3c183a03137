"""The probe "certified" on networks whose answers are known."""

from functools import cache

import pytest
import torch
from torch import nn

from corollary.base.errors import NothingMeasured
from corollary.base.seeds import Seeds
from corollary.data import Dataset, Split, digits
from corollary.engine import fit
from corollary.evidence import Budget, Finding, Subject
from corollary.evidence.battery import check_probe
from corollary.graph import capture
from corollary.verify.probe_certified import certified, gaps_by_layer


def subject(net: nn.Module, data: Dataset, seconds: float = 6.0) -> Subject:
    graph = capture(net.eval(), data.train.x[:2])
    return Subject("net", net.eval(), graph, data, nn.CrossEntropyLoss(), Seeds(0), Budget(seconds))


def value(finding: Finding, name: str) -> float:
    (found,) = [m.value for m in finding.measurements if m.name == name]
    assert isinstance(found, (int, float))
    return float(found)


@cache
def trained() -> nn.Module:
    data = digits()
    assert data.train.y is not None
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    return fit(net, (data.train.x, data.train.y), epochs=8, batch_size=64).module


def test_digits_and_the_promises_of_a_probe():
    check_probe(certified, subject(trained(), digits()))
    finding = certified.run(subject(trained(), digits()))
    lower, upper = value(finding, "certified accuracy"), value(finding, "accuracy under attack")
    assert 0.4 < lower <= upper <= 1  # of few samples, where the machine is slow
    assert value(finding, "undecided") == pytest.approx(upper - lower)
    assert 0 < value(finding, "unstable neurons") < 0.5
    curve = finding.figures[0].data
    assert list(curve["certified"]) == sorted(curve["certified"], reverse=True)


def test_an_affine_classifier_is_decided_at_every_radius():
    data = digits()
    torch.manual_seed(1)
    net = nn.Linear(64, 10)
    finding = certified.run(subject(net, data, 3.0))
    assert value(finding, "undecided") == 0
    assert all("unstable" not in m.name for m in finding.measurements)


def test_gaps_of_a_known_layer():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
        net[0].bias.copy_(torch.tensor([0.0, 5.0]))
    x = torch.zeros(3, 2, dtype=torch.float64)
    table = gaps_by_layer(capture(net, x), x, 0.5)
    assert table["gap"] == [pytest.approx(2.0)]
    assert table["unstable"] == [0.5]


def test_inputs_without_a_class_or_a_scale_are_refused():
    data = digits()
    with pytest.raises(NothingMeasured, match="regression"):
        certified.run(subject(trained(), Dataset("r", Split(data.train.x, data.train.x[:, :1]), None, "regression")))
    same = torch.ones(40, 64)
    with pytest.raises(NothingMeasured, match="equal"):
        certified.run(subject(trained(), Dataset("s", Split(same, torch.zeros(40).long()), None, "classification")))
