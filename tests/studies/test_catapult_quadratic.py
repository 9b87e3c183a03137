import numpy as np
import pytest

from corollary.evidence import Verdict
from corollary.evidence.study import in_memory
from corollary.studies.dynamics.catapult_quadratic import RELU, SPARSE, TAYLOR, UV, CatapultQuadratic


@pytest.fixture(scope="module")
def kept():
    """The parts of a run at the smallest scale."""
    found = {}
    CatapultQuadratic(scale="smoke").run(lambda name, compute: found.setdefault(name, in_memory(name, compute)))
    return found


@pytest.fixture(scope="module")
def data(kept):
    return CatapultQuadratic(scale="smoke").run(lambda name, _: kept[name])


def runs(multiples, seeds, **columns):
    """A table of runs: columns are functions of the multiple."""
    multiple = np.repeat(np.array(multiples), seeds)
    made = {name: np.array([f(m) for m in multiple]) for name, f in columns.items()}
    return {"multiple": multiple, "seed": np.tile(np.arange(seeds), len(multiples)), **made}


@pytest.fixture
def passing(data):
    """Desk tables as the claims want them."""
    outcome = {
        "phase": lambda m: "lazy" if m < 2 else "catapult" if m < 4 else "divergent",
        "peak": lambda m: 1.0 if m < 2 else 10.0,
        "final": lambda m: 1e-9,
        "edge": lambda m: min(m, 1.5),
        "kernel_ratio": lambda m: 1.0 if m < 2 else 0.5,
        "judged": lambda m: 100,
        "rises": lambda m: 0,
        "rises_above": lambda m: 1,
    }
    relu = runs(RELU * 2, 3, **outcome)
    relu["labels"] = np.repeat(["zero", "signs"], len(RELU) * 3)
    share = dict(zip(SPARSE, (0.5, 0.45, 0.3, 0.28), strict=True))
    sparse = runs(SPARSE, 3, **{**outcome, "phase": lambda m: "catapult"}, active=share.get, dead=lambda m: 0.0)
    return {
        **data,
        "uv": runs(UV, 3, output=lambda m: 1e-9, **outcome),
        "relu": relu,
        "recursion": {"target": [0.0, 1.0], "compared": [9, 9], "output_error": [1e-12] * 2, "kernel_error": [0.0] * 2},
        "identity": {
            "model": ["ReLU", "leaky ReLU", "linear", "pure quadratic"],
            "steps": [5] * 4,
            "error": [1e-15] * 4,
            "largest_change": [0.1] * 4,
            "peak": [9.0] * 4,
        },
        "sparsity": sparse,
        "taylor": runs(TAYLOR, 5, **outcome),
    }


def changed(data, table, column, rows, value):
    stored = {name: np.array(kept, copy=True) for name, kept in data[table].items()}
    if stored[column].dtype.kind == "U":
        stored[column] = stored[column].astype("U12")
    if isinstance(rows, dict):
        rows = np.logical_and.reduce([stored[name] == wanted for name, wanted in rows.items()])
    stored[column][rows] = value
    return {**data, table: stored}


def verdicts(data):
    return {claim.id: claim.verdict for claim in CatapultQuadratic().claims(data)}


def test_smoke_measures_all_and_judges_nothing(data):
    claims = CatapultQuadratic(scale="smoke").claims(data)
    assert [claim.id for claim in claims] == ["C1", "C2", "C3", "C4", "C5"]
    assert {claim.verdict for claim in claims} == {Verdict.NOT_JUDGED}


def test_what_passes_is_replicated(passing):
    assert set(verdicts(passing).values()) == {Verdict.REPLICATED}


@pytest.mark.parametrize(
    ("id", "table", "column", "rows", "value"),
    [
        ("C1", "uv", "peak", {"multiple": 1.9}, 1.01),
        ("C1", "uv", "kernel_ratio", {"multiple": 0.5}, 0.84),
        ("C1", "uv", "output", {"multiple": 2.1}, 2e-6),
        ("C1", "uv", "peak", {"multiple": 3.9, "seed": 1}, 2.9),
        ("C1", "uv", "edge", {"multiple": 3.5}, 2.01),
        ("C1", "uv", "phase", {"multiple": 4.1}, "unsettled"),
        ("C1", "relu", "final", {"multiple": 2.5, "labels": "signs"}, 2e-6),
        ("C1", "relu", "peak", {"multiple": 3.5, "seed": 2}, 2.9),
        ("C1", "relu", "edge", {"multiple": 2.5}, 2.1),
        ("C1", "relu", "peak", {"multiple": 1.8}, 1.06),
        ("C2", "recursion", "output_error", 0, 2e-10),
        ("C2", "recursion", "kernel_error", 1, 2e-10),
        ("C2", "identity", "error", 3, 2e-12),
        ("C3", "uv", "rises", {"multiple": 2.1}, 1),
        ("C3", "relu", "rises", {"labels": "zero", "multiple": 3.5}, 1),
        ("C4", "sparsity", "active", {"multiple": 1.0}, 0.47),
        ("C4", "sparsity", "active", {"multiple": 2.5}, 0.48),
        ("C4", "sparsity", "active", {"multiple": 3.5}, 0.36),
        ("C4", "sparsity", "active", {"multiple": 4.2}, 0.325),
        ("C4", "sparsity", "final", {"multiple": 4.2, "seed": 0}, 2e-4),
        ("C5", "taylor", "peak", {"multiple": 1.5}, 1.06),
        ("C5", "taylor", "peak", {"multiple": 2.5}, 1.4),
        ("C5", "taylor", "final", {"multiple": 3.0, "seed": 4}, 2e-4),
        ("C5", "taylor", "edge", {"multiple": 2.5, "seed": 0}, 2.1),
    ],
)
def test_each_part_of_a_criterion_can_fail(passing, id, table, column, rows, value):
    found = verdicts(changed(passing, table, column, rows, value))
    assert found.pop(id) is Verdict.NOT_REPLICATED
    assert set(found.values()) == {Verdict.REPLICATED}


def test_rises_with_other_labels_are_no_part_of_the_lemma(passing):
    found = verdicts(changed(passing, "relu", "rises", {"labels": "signs"}, 1))
    assert found["C3"] is Verdict.REPLICATED


def test_a_divergent_run_fails_the_sparsity_claim_and_stays_out_of_its_means(passing):
    rows = {"multiple": 4.2, "seed": 0}
    for column, value in (("phase", "divergent"), ("active", np.nan), ("final", 1e7)):
        passing = changed(passing, "sparsity", column, rows, value)
    claim = next(claim for claim in CatapultQuadratic().claims(passing) if claim.id == "C4")
    assert claim.verdict is Verdict.NOT_REPLICATED
    assert "0.280 at 4.2" in claim.measured
    assert "one at 4.2 (divergent)" in claim.measured


def test_the_smallest_run_holds_the_exact_parts(data):
    assert max(data["recursion"]["output_error"]) < 1e-10
    assert max(data["identity"]["error"]) < 1e-12
    assert int(np.sum(data["uv"]["rises"])) == 0


def test_figures_draw_what_the_desk_stores(passing):
    for figure in CatapultQuadratic().figures(passing):
        assert figure.svg().startswith("<svg")
