import numpy as np
import pytest

from corollary.evidence import Verdict
from corollary.evidence.study import in_memory
from corollary.studies.dynamics.dynamical_stability import RATES, DynamicalStability
from stored import changed


@pytest.fixture(scope="module")
def kept():
    """The parts of a run at the smallest scale."""
    found = {}
    DynamicalStability(scale="smoke").run(lambda name, compute: found.setdefault(name, in_memory(name, compute)))
    return found


@pytest.fixture(scope="module")
def data(kept):
    return DynamicalStability(scale="smoke").run(lambda name, _: kept[name])


@pytest.fixture
def passing(data):
    """Desk runs as the claims want them, beside what the smallest scale drew."""
    rows = []
    for method in ("SGD", "GD"):
        for seed in range(3):
            for rate in RATES:
                by_sgd = method == "SGD"
                trace = min(330.0, 1.6 / rate) if by_sgd else 340.0
                error = (80.0 if rate < 0.01 else 2.0) if by_sgd else 81.0
                rows.append((method, rate, seed, 1e-20, trace, 20.0, 0.5 / rate, error))
    names = ("method", "learning_rate", "seed", "train_loss", "trace", "largest_eigenvalue", "threshold", "test_error")
    runs = {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    ended = [(method, 0, step, r, 1e-15, 0.0) for method, r in (("SGD", 2.0), ("GD", 13.0)) for step in (0, 100)]
    names = ("method", "seed", "step", "balance", "error", "loss")
    balance = {name: np.array(column) for name, column in zip(names, zip(*ended, strict=True), strict=True)}
    return {**data, "runs": runs, "balance": balance}


def test_smoke_measures_all_and_judges_nothing(data):
    claims = DynamicalStability(scale="smoke").claims(data)
    assert [claim.id for claim in claims] == ["C1", "C2", "C3", "C4", "C5"]
    assert {claim.verdict for claim in claims} == {Verdict.NOT_JUDGED}


LAST = {"learning_rate": 0.032}


@pytest.mark.parametrize(
    ("ids", "table", "column", "rows", "value"),
    [
        ("C1", "runs", "trace", {"method": "SGD", "learning_rate": 0.008}, 2.03 / 0.008),
        ("C1", "runs", "trace", {"method": "GD", **LAST}, 5.9 / 0.032),
        ("C1", "runs", "largest_eigenvalue", {"method": "GD", **LAST, "seed": 1}, 2.03 / 0.032),
        ("C1", "runs", "train_loss", {"method": "SGD"}, 1e-7),
        ("C1", "runs", "train_loss", {"method": "GD"}, np.nan),
        ("C2", "runs", "test_error", {"method": "SGD", **LAST}, 8.2),
        ("C2", "runs", "test_error", {"method": "SGD", "learning_rate": 0.002}, 19.0),
        ("C3", "thresholds", "gap", 0, 1e-9),
        ("C3", "thresholds", "sides", 2, False),
        ("C3", "thresholds", "gap", 5, 1e-9),
        ("C3", "thresholds", "gap", 7, 1e-9),
        ("C3", "traces", "trace_share", 17, 1.001),
        ("C4", "balance", "balance", {"method": "SGD", "step": 100}, 4.1),
        ("C4", "balance", "balance", {"method": "GD", "step": 100}, 5.9),
        ("C4", "balance", "error", 0, 1e-8),
        ("C5", "relu", "trace", 1, 1.0),
    ],
)
def test_each_claim_can_fail(passing, ids, table, column, rows, value):
    study = DynamicalStability(scale="desk")
    before = {claim.id: claim.verdict for claim in study.claims(passing)}
    assert set(before.values()) == {Verdict.REPLICATED}
    after = {claim.id: claim.verdict for claim in study.claims(changed(passing, table, column, rows, value))}
    assert after[ids] is Verdict.NOT_REPLICATED
    assert all(after[other] == before[other] for other in after if other != ids)


def test_a_run_that_did_not_converge_is_not_asked(passing):
    """Its trace may be anything: the bound is on minima."""
    study = DynamicalStability(scale="desk")
    rows = {"method": "SGD", "learning_rate": 0.001}
    other = changed(changed(passing, "runs", "trace", rows, 1e6), "runs", "train_loss", rows, 1e-3)
    assert study.claims(other)[0].verdict is Verdict.REPLICATED


def test_what_holds_at_every_scale(data):
    thresholds, runs = data["thresholds"], data["runs"]
    assert np.max(thresholds["gap"]) < 1e-10
    converged = np.asarray(runs["train_loss"]) < 1e-8
    sgd = converged & (np.asarray(runs["method"]) == "SGD")
    assert sgd.any()
    share = np.asarray(runs["learning_rate"]) * np.asarray(runs["trace"]) / 2
    assert (share[sgd] <= 1.01).all()
    assert (np.asarray(data["traces"]["trace_share"]) <= 1 + 1e-10).all()


def test_an_interrupted_run_resumes(kept, data):
    study = DynamicalStability(scale="smoke")
    again = study.run(lambda name, compute: in_memory(name, compute) if name == "runs SGD" else kept[name])
    for name, column in data["runs"].items():
        np.testing.assert_array_equal(np.asarray(again["runs"][name]), np.asarray(column))
