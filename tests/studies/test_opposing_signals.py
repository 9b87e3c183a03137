import numpy as np
import pytest

from corollary.evidence import Verdict
from corollary.evidence.study import in_memory
from corollary.studies.dynamics.opposing_signals import OpposingSignalsStudy, convolutional
from corollary.studies.dynamics.opposing_signals_model import Spike
from stored import changed


@pytest.fixture(scope="module")
def kept():
    """The parts of a run at the smallest scale."""
    found = {}
    OpposingSignalsStudy(scale="smoke").run(lambda name, compute: found.setdefault(name, in_memory(name, compute)))
    return found


@pytest.fixture(scope="module")
def data(kept):
    return OpposingSignalsStudy(scale="smoke").run(lambda name, _: kept[name])


@pytest.fixture
def passing(data):
    """Tables as the claims want them, beside what the smallest scale measured."""
    runs = {name: np.tile(np.asarray(column, dtype=float), 3) for name, column in data["runs"].items()}
    edge = runs["rate"] == 0.5
    runs["edge"], runs["alternation"] = np.where(edge, 1.0, 0.5), np.where(edge, 0.95, 0.0)
    runs["opposition"], runs["high_loss_opposition"] = np.where(edge, -0.3, 0.0), np.full(6, 0.1)
    limit = {name: np.array(column, copy=True) for name, column in data["limit"].items()}
    limit["end"], limit["drift"], limit["lowest"] = limit["limit"].copy(), 0 * limit["limit"], 0.9 * limit["start"]
    planted = {name: np.array(column, copy=True) for name, column in data["planted"].items()}
    planted["with"], planted["without"] = planted["predicted"].copy(), planted["predicted"] / 4
    step = np.arange(400)
    rows = []
    for rate in (0.05, 0.12, 0.15):
        over = rate > 0.1
        sharpness = np.where((step > 20) & (step < 80) & over, 2.5 / rate, 1.5 / rate)
        loss = np.where(step == 70, 1.0, np.where(step > 300, 1e-12, 1e-4))
        rows.append((np.full(400, rate), step, sharpness, loss, (-1.0) ** step if over else np.ones(400)))
    names = ("rate", "step", "sharpness", "loss", "difference")
    spikes = {name: np.concatenate(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    return {**data, "runs": runs, "limit": limit, "planted": planted, "spikes": spikes}


def test_smoke_measures_all_and_judges_nothing(data):
    claims = OpposingSignalsStudy(scale="smoke").claims(data)
    assert [claim.id for claim in claims] == ["C1", "C2", "C3", "C4", "C5"]
    assert {claim.verdict for claim in claims} == {Verdict.NOT_JUDGED}


@pytest.mark.parametrize(
    ("ids", "table", "column", "rows", "value"),
    [
        ("C1", "runs", "edge", 2, 0.89),
        ("C1", "runs", "edge", 0, 1.16),
        ("C1", "runs", "alternation", 4, 0.89),
        ("C1", "runs", "alternation", 1, 0.06),
        ("C1", "runs", "opposition", 0, -0.14),
        ("C1", "runs", "opposition", {"rate": 0.5}, -0.24),
        ("C2", "limit", "end", 3, 0.0),
        ("C2", "limit", "drift", 0, 0.002),
        ("C2", "limit", "lowest", -1, 4.4),
        ("C3", "spikes", "sharpness", 10, 41.0),
        ("C3", "spikes", "difference", np.arange(0, 100, 2), -1.0),
        ("C3", "spikes", "loss", 470, 1e-3),
        ("C3", "spikes", "sharpness", -1, 14.0),
        ("C3", "spikes", "loss", 799, 1e-7),
        ("C3", "spikes", "difference", {"rate": 0.12}, 1.0),
        ("C3", "spikes", "sharpness", {"rate": 0.15}, 10.0),
        ("C4", "planted", "without", -1, 3.0),
        ("C4", "planted", "predicted", -1, 8.0),
        ("C5", "runs", "high_loss_opposition", 2, -0.21),
    ],
)
def test_each_claim_can_fail(passing, ids, table, column, rows, value):
    study = OpposingSignalsStudy(scale="desk")
    before = {claim.id: claim.verdict for claim in study.claims(passing)}
    assert set(before.values()) == {Verdict.REPLICATED}
    after = {claim.id: claim.verdict for claim in study.claims(changed(passing, table, column, rows, value))}
    assert after[ids] is Verdict.NOT_REPLICATED
    assert all(after[other] == before[other] for other in after if other != ids)


def test_a_path_that_never_crosses_has_no_spike():
    path = {"sharpness": np.ones(5), "loss": np.geomspace(1, 1e-9, 5), "difference": np.ones(5)}
    spike = Spike.of(path, 0.1)
    assert spike.crossing is None
    assert not spike.recovers(0.1)
    assert spike.alternation == 0


def test_what_holds_at_every_scale(data):
    planted, limit = data["planted"], data["limit"]
    assert planted["with"][-1] > planted["without"][-1]
    assert planted["with"][-1] == pytest.approx(planted["predicted"][-1], rel=0.05)
    assert (np.asarray(limit["drift"]) < 1e-3).all()
    below = np.asarray(data["runs"]["rate"]) == 0.15
    assert (np.asarray(data["runs"]["alternation"])[below] < 0.05).all()


def test_the_network_of_the_paper_scale_takes_its_images():
    import torch

    net = convolutional(4)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_an_interrupted_run_resumes(kept, data):
    names = []

    def resumed(name, compute):
        names.append(name)
        return in_memory(name, compute) if name == "spikes" else kept[name]

    again = OpposingSignalsStudy(scale="smoke").run(resumed)
    assert names == list(kept)
    assert all(np.array_equal(again["spikes"][name], data["spikes"][name]) for name in data["spikes"])
