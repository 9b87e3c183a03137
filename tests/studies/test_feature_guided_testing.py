import numpy as np
import pytest

from corollary.evidence import Verdict
from corollary.evidence.study import in_memory
from corollary.studies.verify.feature_guided_testing import FeatureGuidedTesting
from stored import changed


@pytest.fixture(scope="module")
def data():
    return FeatureGuidedTesting(scale="smoke").run()


@pytest.fixture
def passing(data):
    """The data with the few numbers that the smallest scale leaves to chance set to what passes."""
    searches = {name: np.array(column, copy=True) for name, column in data["searches"].items()}
    ours = searches["guidance"] == "features"
    searches["first_query"] = np.where(ours, 14.0, 20.0)
    searches["first_pixels"] = np.where(ours, 55.0, 75.0)
    searches["l0"], searches["found"] = np.full(len(ours), 15.0), np.ones(len(ours), dtype=int)
    exact = {**data["exact"], "search": np.asarray(data["exact"]["grid"])}
    guarantees = {name: np.array(column, copy=True) for name, column in data["guarantees"].items()}
    guarantees["verdict"] = guarantees["verdict"].astype("<U9")
    for tau, verdicts in ((0.2, ["undecided"] * 6), (0.1, ["unsafe"] * 2 + ["undecided"] * 4), (0.05, ["unsafe"] * 6)):
        rows = guarantees["tau"] == tau
        guarantees["verdict"][rows], guarantees["exact"][rows] = verdicts, 0.1
        guarantees["lower"][rows], guarantees["upper"][rows], guarantees["grid"][rows] = 0.0, 0.15, 0.12
    opponents = {name: np.array(column, copy=True) for name, column in data["opponents"].items()}
    for value, name in ((0.1, "adversarial"), (0.2, "nature"), (0.3, "cooperative")):
        opponents["mean_reward"][opponents["opponent"] == name] = value
    return {**data, "searches": searches, "exact": exact, "guarantees": guarantees, "opponents": opponents}


def test_smoke_measures_all_and_judges_nothing(data):
    claims = FeatureGuidedTesting(scale="smoke").claims(data)
    assert [claim.id for claim in claims] == ["F1", "F2", "F3", "F4"]
    assert {claim.verdict for claim in claims} == {Verdict.NOT_JUDGED}


@pytest.mark.parametrize(
    ("id", "table", "column", "row", "value"),
    [
        ("F1", "searches", "found", 0, 0),
        ("F1", "searches", "first_query", slice(None), 20.0),
        ("F1", "searches", "first_pixels", slice(None), 60.0),
        ("F1", "searches", "l0", slice(None), 21.0),
        ("F2", "exact", "search", slice(None), 3.0),
        ("F2", "exact", "search", 0, 1e-3),
        ("F3", "guarantees", "verdict", 0, "safe"),
        ("F3", "guarantees", "exact", -1, 0.25),
        ("F3", "guarantees", "grid", 0, 0.05),
        ("F3", "guarantees", "grid", 0, 3.0),
        ("F3", "guarantees", "lower", 0, 0.12),
        ("F3", "guarantees", "upper", 0, 0.05),
        ("F3", "guarantees", "verdict", slice(None), "unsafe"),
        ("F4", "opponents", "rises", 0, 1),
        ("F4", "opponents", "mean_reward", 0, 1.0),
    ],
)
def test_each_claim_can_fail(passing, id, table, column, row, value):
    study = FeatureGuidedTesting(scale="desk")
    before = {claim.id: claim.verdict for claim in study.claims(passing)}
    assert set(before.values()) == {Verdict.REPLICATED}
    after = {claim.id: claim.verdict for claim in study.claims(changed(passing, table, column, row, value))}
    assert after[id] is Verdict.NOT_REPLICATED
    assert all(after[other] == before[other] for other in after if other != id)


def test_what_holds_at_every_scale(data):
    exact, guarantees = data["exact"], data["guarantees"]
    assert (np.asarray(exact["search"]) >= np.asarray(exact["grid"]) - 1e-9).all()
    distance = np.asarray(guarantees["exact"])
    assert (np.asarray(guarantees["lower"]) <= distance + 1e-9).all()
    assert (np.asarray(guarantees["upper"]) >= distance - 1e-9).all()
    assert np.sum(data["opponents"]["rises"]) == 0
    assert np.sum(data["example"]["saliency"]) == pytest.approx(1.0, abs=1e-5)


def test_an_interrupted_run_resumes():
    kept = {}

    def interrupted(name, compute):
        if name == "guarantees":
            raise KeyboardInterrupt
        return kept.setdefault(name, in_memory(name, compute))

    study = FeatureGuidedTesting(scale="smoke")
    with pytest.raises(KeyboardInterrupt):
        study.run(interrupted)
    assert len(kept) == 2

    def resumed(name, compute):
        return kept[name] if name in kept else in_memory(name, compute)

    assert set(study.run(resumed)) == {"searches", "longer", "example", "exact", "guarantees", "opponents", "progress"}
