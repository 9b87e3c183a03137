import dataclasses
import time

import pytest
import torch
from torch import nn

from corollary.base.errors import NothingMeasured
from corollary.base.seeds import Seeds
from corollary.data import Dataset, Split, digits
from corollary.demo import network
from corollary.dynamics import probe_phase
from corollary.dynamics.placement import retrained
from corollary.dynamics.probe_phase import phase
from corollary.dynamics.states import state_of
from corollary.evidence import Budget, Subject, Training
from corollary.evidence.battery import check_probe
from corollary.graph import capture


def some_digits():
    return digits().subset(400, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def runs():
    data = some_digits()
    recipe = Training("adam", learning_rate=1e-2, batch_size=64, epochs=6)
    return retrained(network(), (data.train.x, data.train.y), 3, recipe)


@pytest.fixture
def short_curves(monkeypatch):
    """Curves of 40 steps, which show all there is to see here, sooner."""
    monkeypatch.setattr(probe_phase, "STEPS", 40)


def subject(state, data, checkpoints=(), seconds=60.0):
    net = network()
    net.load_state_dict(state)
    net.eval()
    program = capture(net, data.train.x[:2])
    loss = nn.functional.cross_entropy if data.task == "classification" else nn.functional.mse_loss
    return Subject("net", net, program, data, loss, Seeds(0), Budget(seconds), checkpoints=tuple(checkpoints))


def values(finding):
    return {measurement.name: measurement.value for measurement in finding.measurements}


def test_keeps_the_promises_of_a_probe(runs):
    check_probe(phase, subject(runs[0], digits(), runs[1:]))


def test_with_other_runs_it_tells_the_phase(runs, short_curves):
    data = some_digits()
    case = subject(runs[0], data, runs[1:])
    finding = phase.run(case)
    found = values(finding)
    with torch.no_grad():
        error = float((case.module(data.train.x).argmax(1) != data.train.y).double().mean())
    assert found["training error"] == pytest.approx(error)
    assert found["phase"] in ("IV-A", "IV-B")
    assert found["mode connectivity"] > found["straight-line connectivity"]
    assert 0.5 < found["similarity of runs"] <= 1
    assert [m.name for m in finding.measurements if m.headline] == ["phase"]
    assert {"t", "curve 0", "straight 0", "curve 1", "straight 1"} < set(finding.figures[0].data)


def test_alone_it_says_what_to_give(runs):
    finding = phase.run(subject(runs[0], some_digits()))
    found = values(finding)
    assert found["phase"] == "III or IV"
    assert found["largest Hessian eigenvalue"] > 0
    assert "mode connectivity" not in found
    assert any("--checkpoints" in note for note in finding.notes)
    assert finding.figures == ()


def test_an_untrained_network_does_not_fit(short_curves):
    torch.manual_seed(0)
    assert values(phase.run(subject(state_of(network()), some_digits())))["phase"] == "I or II"
    finding = phase.run(subject(state_of(network()), some_digits(), [state_of(network())]))
    assert values(finding)["phase"] in ("I", "II")
    assert finding.figures[0].svg().startswith("<svg")  # the plane of the phases of high error


def test_a_short_budget_measures_less_and_says_so(runs, short_curves):
    start = time.perf_counter()
    finding = phase.run(subject(runs[0], some_digits(), runs[1:], seconds=0.05))
    assert time.perf_counter() - start < 20  # on a busy machine; unhurried it takes longer
    coverage = {m.name: m.coverage for m in finding.measurements if m.coverage is not None}
    assert coverage["mode connectivity"].measured == 1
    assert coverage["largest Hessian eigenvalue"].measured < 400
    assert any("barriers may be too high" in note for note in finding.notes)


def test_regression_has_paths_in_the_loss_and_no_phase(runs, short_curves):
    data = some_digits()
    targets = nn.functional.one_hot(data.train.y, 10).float() + 0.5
    task = Dataset("other", Split(data.train.x, targets), None, "regression")
    found = phase.run(subject(runs[0], task, runs[1:]))
    assert {"training loss", "mode connectivity", "similarity of runs"} < set(values(found))
    assert "phase" not in values(found)
    assert any("not classes" in note for note in found.notes)


def test_checkpoints_that_do_not_fit_cost_only_the_paths(runs):
    finding = phase.run(subject(runs[0], some_digits(), [state_of(nn.Linear(2, 2))]))
    assert "largest Hessian eigenvalue" in values(finding)
    assert any("Not measured, paths to other runs" in note for note in finding.notes)


def test_data_without_targets_is_declined(runs):
    case = subject(runs[0], some_digits())
    bare = Dataset("bare", Split(some_digits().train.x), None, "unlabelled")
    with pytest.raises(NothingMeasured, match="need targets"):
        phase.run(dataclasses.replace(case, data=bare))
