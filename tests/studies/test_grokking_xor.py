import numpy as np
import pytest

from corollary.evidence import Verdict
from corollary.evidence.study import in_memory
from corollary.studies.dynamics.grokking_xor import GrokkingXor


@pytest.fixture(scope="module")
def kept():
    """The parts of a run at the smallest scale."""
    found = {}
    GrokkingXor(scale="smoke").run(lambda name, compute: found.setdefault(name, in_memory(name, compute)))
    return found


@pytest.fixture(scope="module")
def data(kept):
    return GrokkingXor(scale="smoke").run(lambda name, _: kept[name])


@pytest.fixture
def passing():
    """Runs as the claims want them, seen at steps 0, 1 and 40."""
    rows = []
    for group, seeds in (("small", range(5)), ("large", range(3)), ("balanced", range(5)), ("further", range(5, 9))):
        for seed in seeds:
            grown = group != "large"
            for step in (0, 1, 40):
                late = step == 40
                rows.append(
                    {
                        "group": group,
                        "seed": seed,
                        "smallest_cluster": 40 + seed,
                        "step": step,
                        "train_accuracy": 1.0,
                        "clean_accuracy": 0.9,
                        "test_accuracy": 0.99 if late and grown else 0.5,
                        "odd_fraction": 0.1 + 0.01 * seed if late else 0.97,
                        "surrogate_agreement": 0.5 if late else 0.95,
                        "own_alignment": 0.3,
                        "other_alignment": 0.02,
                        "fit_step": 1.0,
                        "generalise_step": 40.0,
                    }
                )
    return {
        "runs": {name: np.array([row[name] for row in rows]) for name in rows[0]},
        "first_step": {"relative_error": np.array([1e-8]), "start_over_step": np.array([1e-5])},
        "gram": {name: np.array([1e-14]) for name in ("train_difference", "test_difference", "weight_difference")},
    }


def changed(data, table, column, value, **rows):
    """The data with a column of one table set, in the rows chosen."""
    chosen = np.ones(len(data[table][column]), dtype=bool)
    for name, wanted in rows.items():
        chosen &= np.isin(data[table][name], wanted)
    assert chosen.any()
    return {**data, table: {**data[table], column: np.where(chosen, value, data[table][column])}}


def test_smoke_measures_all_and_judges_nothing(data):
    claims = GrokkingXor(scale="smoke").claims(data)
    assert [claim.id for claim in claims] == ["C1", "C2", "C3", "C4", "C5"]
    assert {claim.verdict for claim in claims} == {Verdict.NOT_JUDGED}


FIRST, LAST = {"group": "small", "step": 1}, {"group": "small", "step": 40}


@pytest.mark.parametrize(
    ("claim", "table", "column", "value", "rows"),
    [
        ("C1", "runs", "train_accuracy", 0.985, {**FIRST, "seed": 4}),
        ("C1", "runs", "test_accuracy", 0.61, {**FIRST, "seed": 0}),
        ("C1", "runs", "test_accuracy", 0.39, {**FIRST, "seed": 2}),
        ("C1", "runs", "train_accuracy", 0.99, {**LAST, "seed": 1}),
        ("C1", "runs", "test_accuracy", 0.94, {**LAST, "seed": [0, 1, 2]}),
        ("C1", "runs", "test_accuracy", 0.96, LAST),
        ("C2", "first_step", "relative_error", 1.1e-6, {}),
        ("C3", "runs", "odd_fraction", 0.89, {**FIRST, "seed": 3}),
        ("C3", "runs", "surrogate_agreement", 0.79, {**FIRST, "seed": 3}),
        ("C3", "runs", "surrogate_agreement", 0.87, FIRST),
        ("C3", "runs", "odd_fraction", 0.21, LAST),
        ("C3", "runs", "odd_fraction", 0.9, {**LAST, "seed": [0, 1]}),
        ("C4", "runs", "test_accuracy", 0.61, {"group": "large", "step": 40, "seed": 1}),
        ("C4", "runs", "train_accuracy", 0.97, {"group": "large", "step": 40, "seed": 1}),
        ("C5", "gram", "test_difference", 1.1e-9, {}),
        ("C5", "gram", "train_difference", 1.1e-9, {}),
    ],
)
def test_each_claim_can_fail(passing, claim, table, column, value, rows):
    study = GrokkingXor(scale="desk")
    before = {found.id: found.verdict for found in study.claims(passing)}
    assert set(before.values()) == {Verdict.REPLICATED}
    after = {found.id: found.verdict for found in study.claims(changed(passing, table, column, value, **rows))}
    assert after[claim] is Verdict.NOT_REPLICATED
    assert all(after[other] == before[other] for other in after if other != claim)


def test_controls_have_no_say(passing):
    study = GrokkingXor(scale="desk")
    spoiled = changed(passing, "runs", "odd_fraction", 0.9, group=["balanced", "further"])
    assert {claim.verdict for claim in study.claims(spoiled)} == {Verdict.REPLICATED}


def test_what_holds_at_every_scale(data):
    runs = data["runs"]
    assert np.asarray(data["gram"]["test_difference"])[0] < 1e-9
    assert np.asarray(data["first_step"]["relative_error"])[0] < 1e-6
    start = (runs["group"] == "small") & (runs["step"] == 1)
    assert (runs["train_accuracy"][start] > 0.9).all()
    assert (runs["odd_fraction"][start] > 0.8).all()


def test_an_interrupted_run_resumes(kept, data):
    names = []

    def resumed(name, compute):
        names.append(name)
        return in_memory(name, compute) if name == "small 1" else kept[name]

    again = GrokkingXor(scale="smoke").run(resumed)
    assert names == list(kept)
    assert all(
        np.array_equal(again["runs"][name], column, equal_nan=column.dtype.kind == "f")
        for name, column in data["runs"].items()
    )


def test_figures_draw(data):
    figures = GrokkingXor(scale="smoke").figures(data)
    assert [figure.name for figure in figures] == ["grokking-accuracy", "grokking-mechanism"]
    assert all(figure.svg().startswith("<svg") for figure in figures)
