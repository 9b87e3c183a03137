import numpy as np
import pytest

from corollary.evidence import Verdict
from corollary.evidence.study import in_memory
from corollary.studies.dynamics.benign_oscillation import LARGE, NEAR, SMALL, STRONG, BenignOscillation, _crossing
from stored import changed


@pytest.fixture(scope="module")
def kept():
    """The parts of a run at the smallest scale."""
    found = {}
    BenignOscillation(scale="smoke").run(lambda name, compute: found.setdefault(name, in_memory(name, compute)))
    return found


@pytest.fixture(scope="module")
def data(kept):
    return BenignOscillation(scale="smoke").run(lambda name, _: kept[name])


@pytest.fixture
def passing(data):
    """Desk tables as the claims want them."""
    rows = []
    for strong in STRONG:
        for level in sorted({*SMALL, *LARGE, *NEAR, 1.8}):
            accuracy, share = (0.6, 0.0) if level <= 1 else (0.8, 0.3) if level <= 1.05 else (1.0, 0.3)
            rows += [(strong, level, 1.0, accuracy, share, level == 1.8)] * 5
    names = ("strong", "multiple", "train_accuracy", "weak_accuracy", "oscillation", "diverged")
    runs = {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    return {
        **data,
        "runs": runs,
        "decayed": {"weak_accuracy": np.full(5, 0.7), "train_accuracy": np.ones(5)},
        "units": {"error": np.full(7, 1e-14), "growth": np.ones(7)},
        "single": {"sum": [80.0], "slope": [0.1], "oscillating": [900], "recursion_error": [1e-14]},
    }


def verdicts(data):
    return {claim.id: claim.verdict for claim in BenignOscillation().claims(data)}


def test_smoke_measures_all_and_judges_nothing(data):
    claims = BenignOscillation(scale="smoke").claims(data)
    assert [claim.id for claim in claims] == ["C1", "C2", "C3", "C4"]
    assert {claim.verdict for claim in claims} == {Verdict.NOT_JUDGED}


def test_what_passes_is_replicated(passing):
    assert set(verdicts(passing).values()) == {Verdict.REPLICATED}


@pytest.mark.parametrize(
    ("id", "table", "column", "rows", "value"),
    [
        ("C1", "runs", "weak_accuracy", {"strong": 1.0, "multiple": 0.3}, 0.73),
        ("C1", "runs", "weak_accuracy", {"strong": 1.0, "multiple": 1.6}, 0.96),
        ("C1", "runs", "train_accuracy", {"strong": 1.0, "multiple": 0.1}, 0.99),
        ("C1", "runs", "weak_accuracy", {"strong": 1.0, "multiple": 1.4}, np.nan),
        ("C2", "runs", "oscillation", {"strong": 1.4, "multiple": 0.9}, 0.03),
        ("C2", "runs", "oscillation", {"strong": 1.0, "multiple": 1.2}, 0.09),
        ("C2", "runs", "weak_accuracy", {"strong": 1.4, "multiple": 1.0}, 0.9),
        ("C3", "units", "error", 3, 2e-9),
        ("C3", "single", "sum", 0, -1.0),
        ("C3", "single", "slope", 0, -0.1),
        ("C4", "decayed", "weak_accuracy", slice(None), 0.86),
    ],
)
def test_each_part_of_a_criterion_can_fail(passing, id, table, column, rows, value):
    found = verdicts(changed(passing, table, column, rows, value))
    assert found.pop(id) is Verdict.NOT_REPLICATED
    assert set(found.values()) == {Verdict.REPLICATED}


def test_a_gap_that_is_too_small_fails_the_decay_claim(passing):
    low = changed(passing, "runs", "weak_accuracy", {"strong": 1.0, "multiple": 1.2}, 0.97)
    assert verdicts(low)["C4"] is Verdict.REPLICATED
    close = changed(low, "decayed", "weak_accuracy", slice(None), 0.85)
    assert verdicts(close)["C4"] is Verdict.REPLICATED
    assert verdicts(changed(low, "decayed", "weak_accuracy", slice(None), 0.851))["C4"] is Verdict.NOT_REPLICATED


def test_runs_that_diverge_are_no_part_of_the_training_accuracy(passing):
    found = changed(passing, "runs", "train_accuracy", {"multiple": 1.8}, np.nan)
    assert verdicts(found)["C1"] is Verdict.REPLICATED


def test_the_crossing_is_read_off_the_broken_line():
    assert _crossing((1.0, 1.1, 1.2), (0.5, 0.9, 1.0), 0.85) == pytest.approx(1.0875)
    assert np.isnan(_crossing((1.0, 1.1), (0.5, 0.6), 0.85))
    assert np.isnan(_crossing((1.0, 1.1), (0.9, 1.0), 0.85))


def test_the_smallest_run_holds_the_exact_part(data):
    assert np.max(data["units"]["error"]) < 1e-9
    assert data["single"]["recursion_error"][0] < 1e-9


def test_figures_draw_what_is_stored(data):
    for figure in BenignOscillation().figures(data):
        assert figure.svg().startswith("<svg")
