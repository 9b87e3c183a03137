import dataclasses

import pytest
import torch
from torch import nn

from corollary.base.errors import NothingMeasured
from corollary.base.seeds import Seeds
from corollary.data import Dataset, Split, digits
from corollary.engine import fit
from corollary.evidence import Budget, Subject
from corollary.evidence.battery import check_probe
from corollary.graph import capture
from corollary.verify.probe_tightness import interval_tightness
from corollary.verify.tightness import propagation_tightness


@pytest.fixture(scope="module")
def net():
    data = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10))
    adam = {"optimizer": lambda parameters: torch.optim.Adam(parameters, lr=5e-3)}
    return fit(start, (data.train.x, data.train.y), epochs=8, batch_size=64, **adam).module


def subject(net, data, seconds=60.0):
    program = capture(net, data.train.x[:2])
    return Subject("net", net, program, data, nn.functional.cross_entropy, Seeds(0), Budget(seconds))


def values(finding):
    return {measurement.name: measurement.value for measurement in finding.measurements}


def test_keeps_the_promises_of_a_probe(net):
    check_probe(interval_tightness, subject(net, digits()))


def test_what_it_says(net):
    data = digits()
    finding = interval_tightness.run(subject(net, data))
    found = values(finding)
    wanted = propagation_tightness(net, data.test.x, 0.01, data.test.y, reduce="mean")
    assert found["tightness"] == pytest.approx(float(wanted), rel=1e-5)
    assert found["certified by intervals"] <= found["certified by linear bounds (CROWN)"] <= 1
    with torch.no_grad():
        accuracy = float((net(data.test.x).argmax(1) == data.test.y).double().mean())
    assert 0 < found["certified by linear bounds (CROWN)"] <= accuracy
    columns = finding.figures[0].data
    assert columns["layer"] == ["0", "2", "4"]
    assert columns["layer_tightness"][0] == pytest.approx(1.0)
    assert len(columns["sample_tightness"]) == len(data.test.x)


def test_without_labels_the_networks_own_answers_are_certified(net):
    data = digits()
    bare = Dataset("bare", Split(data.train.x), Split(data.test.x), "unlabelled")
    finding = interval_tightness.run(subject(net, bare))
    labelled = values(interval_tightness.run(subject(net, data)))
    assert values(finding)["certified by intervals"] >= labelled["certified by intervals"]
    assert any("own answers" in note for note in finding.notes)


def test_regression_has_tightness_and_no_certificates(net):
    data = digits()
    targets = torch.zeros(len(data.train.x), 10)
    task = Dataset("other", Split(data.train.x, targets), None, "regression")
    found = values(interval_tightness.run(subject(net, task)))
    assert "tightness" in found
    assert not any(name.startswith("certified") for name in found)


def test_smooth_networks_are_certified_all_the_same():
    torch.manual_seed(0)
    smooth = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).eval()
    finding = interval_tightness.run(subject(smooth, digits()))
    assert set(values(finding)) == {"certified by intervals", "certified by linear bounds (CROWN)"}
    assert any("Tanh" in note for note in finding.notes)


def test_a_short_budget_measures_less_and_says_so(net):
    finding = interval_tightness.run(subject(net, digits(), seconds=0.1))
    coverage = {m.name: m.coverage for m in finding.measurements if m.coverage is not None}
    assert coverage["certified by linear bounds (CROWN)"].measured < 397
    assert coverage["tightness"].of == 397


def test_what_has_no_boxes_is_declined(net):
    constant = Dataset("other", Split(torch.ones(30, 64)), None, "unlabelled")
    with pytest.raises(NothingMeasured, match="no range"):
        interval_tightness.run(subject(net, constant))
    tokens = Dataset("other", Split(torch.ones(30, 64).long()), None, "unlabelled")
    case = dataclasses.replace(subject(net, digits()), data=tokens)
    with pytest.raises(NothingMeasured, match="real inputs"):
        interval_tightness.run(case)
