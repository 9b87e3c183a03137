"""The study `train-longer`: its tables, and that each claim can fail."""

import numpy as np
import pytest

from corollary.dynamics.large_batch import SETTINGS
from corollary.evidence import Verdict
from corollary.studies.dynamics.train_longer import TrainLonger


@pytest.fixture(scope="module")
def data():
    return TrainLonger(scale="smoke").run()


def test_every_setting_and_batch_is_measured(data):
    assert sorted(set(data["gap"]["setting"])) == sorted(SETTINGS)
    assert set(data["distance"]["kind"]) == {"constant", "scaled", "fixed"}
    assert max(data["exactness"]["difference"]) <= 1e-12
    assert np.isfinite(data["distance"]["distance"]).all()


def passing() -> dict:
    accuracy = {"small": 0.974, "large": 0.962, "scaled rate": 0.968, "ghost batches": 0.975, "adapted regime": 0.985}
    updates = np.unique(np.geomspace(1, 1000, 60).round())
    updates = np.union1d(updates, [100])
    rows = [("constant", 16, 3 + np.log(updates))]
    rows += [("scaled", batch, 3 + np.log(updates)) for batch in (16, 64, 256)]
    rows += [("fixed", batch, (3 + np.log(updates)) / (1 + i)) for i, batch in enumerate((16, 64, 256))]
    return {
        "gap": {
            "setting": np.repeat(SETTINGS, 2),
            "seed": np.tile([0, 1], 5),
            "accuracy": np.repeat([accuracy[name] for name in SETTINGS], 2),
        },
        "further": {
            "setting": np.repeat(SETTINGS[1:4], 2),
            "seed": np.tile([8, 9], 3),
            "accuracy": np.array([0.96, 0.97, 0.97, 0.97, 0.98, 0.98]),
        },
        "distance": {
            "kind": np.repeat([row[0] for row in rows], len(updates)),
            "batch": np.repeat([row[1] for row in rows], len(updates)),
            "seed": np.zeros(len(rows) * len(updates), dtype=int),
            "updates": np.tile(updates, len(rows)),
            "distance": np.concatenate([row[2] for row in rows]),
        },
        "exactness": {"case": np.array(["1d"]), "difference": np.array([1e-15])},
    }


def verdicts(data: dict) -> dict[str, Verdict]:
    return {claim.id: claim.verdict for claim in TrainLonger().claims(data)}


def test_all_claims_hold_on_what_they_want():
    assert set(verdicts(passing()).values()) == {Verdict.REPLICATED}


def shrunk(data: dict, setting: str, by: float) -> None:
    data["gap"]["accuracy"][data["gap"]["setting"] == setting] -= by


def root(data: dict) -> None:
    rows = data["distance"]["kind"] == "constant"
    data["distance"]["distance"][rows] = np.sqrt(data["distance"]["updates"][rows])


def apart(data: dict) -> None:
    data["distance"]["distance"][(data["distance"]["kind"] == "scaled") & (data["distance"]["batch"] == 64)] *= 1.6


@pytest.mark.parametrize(
    ("claim", "change"),
    [
        ("C1", lambda data: shrunk(data, "small", 0.01)),
        ("C1", lambda data: shrunk(data, "scaled rate", 0.0055)),
        ("C1", lambda data: shrunk(data, "ghost batches", 0.0065)),
        ("C1", lambda data: shrunk(data, "adapted regime", 0.014)),
        ("C2", root),
        ("C3", apart),
        ("C4", lambda data: data["exactness"]["difference"].fill(1e-11)),
    ],
)
def test_each_claim_can_fail(claim, change):
    data = passing()
    change(data)
    found = verdicts(data)
    assert found.pop(claim) == Verdict.NOT_REPLICATED
    assert set(found.values()) == {Verdict.REPLICATED}


def test_figures_are_drawn(data):
    for figure in TrainLonger(scale="smoke").figures(data):
        assert figure.svg().lstrip().startswith("<")
