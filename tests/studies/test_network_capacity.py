import numpy as np
import pytest

from corollary.evidence import Verdict
from corollary.evidence.study import in_memory
from corollary.studies.geometry.network_capacity import NetworkCapacity
from stored import changed


@pytest.fixture(scope="module")
def data():
    return NetworkCapacity(scale="smoke").run()


def test_smoke_measures_all_and_judges_nothing(data):
    claims = NetworkCapacity(scale="smoke").claims(data)
    assert [claim.id for claim in claims] == ["C1", "C2", "C3", "C4", "C5"]
    assert {claim.verdict for claim in claims} == {Verdict.NOT_JUDGED}


@pytest.mark.parametrize(
    ("id", "table", "column", "row", "value"),
    [
        ("C1", "functions", "functions", 4, 255),
        ("C1", "single_unit", "enumerated", 3, 1881),
        ("C2", "functions", "exact_bits", 1, 3.0),
        ("C2", "functions", "upper_bits", 7, 15.0),
        ("C2", "single_unit", "bits", 8, 50.0),
        ("C3", "bottlenecks", "violations", 0, 1),
        ("C3", "bottlenecks", "wrong_equalities", 1, 1),
        ("C4", "dichotomies", "counted", 0, 21),
        ("C4", "dichotomies", "counted", 4, 128),
        ("C5", "storage", "separable", 1, 0),
    ],
)
def test_each_claim_can_fail(data, id, table, column, row, value):
    study = NetworkCapacity(scale="desk")
    exact = {"C1", "C2", "C3", "C4"}  # settled by counting; the share of C5 is sampled, and few draws say little
    before = {claim.id: claim.verdict for claim in study.claims(data)}
    assert {before[name] for name in exact} == {Verdict.REPLICATED}
    after = {claim.id: claim.verdict for claim in study.claims(changed(data, table, column, row, value))}
    assert after[id] is Verdict.NOT_REPLICATED
    assert all(after[other] == before[other] for other in after if other != id)


def test_the_storage_draws_are_fair(data):
    table = data["storage"]
    share = np.asarray(table["separable"]) / np.asarray(table["draws"])
    # Four binomial standard deviations of 20 draws.
    expected = np.asarray(table["cover_share"])
    assert (np.abs(share - expected) <= 4 * np.sqrt(expected * (1 - expected) / 20)).all()


def test_an_interrupted_run_resumes():
    computed = []

    def counting(name, compute):
        computed.append(name)
        if len(computed) == 5:
            raise KeyboardInterrupt
        return in_memory(name, compute)

    with pytest.raises(KeyboardInterrupt):
        NetworkCapacity(scale="smoke").run(counting)
    assert len(set(computed)) == 5
