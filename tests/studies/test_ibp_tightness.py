import numpy as np
import pytest

from corollary.evidence import Verdict
from corollary.evidence.study import in_memory
from corollary.studies.verify.ibp_tightness import SETUPS, IbpTightness
from stored import changed


@pytest.fixture(scope="module")
def kept():
    """The parts of a run at the smallest scale."""
    found = {}
    IbpTightness(scale="smoke").run(lambda name, compute: found.setdefault(name, in_memory(name, compute)))
    return found


@pytest.fixture(scope="module")
def data(kept):
    return IbpTightness(scale="smoke").run(lambda name, _: kept[name])


@pytest.fixture
def passing(data):
    """Desk runs as the claims want them, beside what the smallest scale drew."""
    scanned = {0.01: 0.3, 0.03: 0.5, 0.1: 0.8, 0.2: 0.9}
    certified = {16: 0.4, 64: 0.6, 128: 0.65, 256: 0.7}
    trained = {"standard": (0.13, 0.0), "pgd": (0.09, 0.0), "sabr": (0.5, 0.4), "ibp": (0.8, 0.65)}
    rows = []
    for method, eps, width, seed in IbpTightness(scale="desk")._runs():
        tau, proved = trained[method]
        if method == "ibp":
            tau, proved = scanned[eps], certified[width]
        rows.append((method, eps, width, seed, tau, 0, proved, 0.8, 0.95))
    names = ("method", "eps", "width", "seed", "tightness", "undefined", "certified", "robust", "accuracy")
    runs = {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    table = data["initialisation"]
    predicted = np.asarray(table["predicted"])
    relu = {"mode": np.array(["local", "linear"]), "tightness": np.array([0.1414, 0.1])}
    hidden = np.asarray(data["widths"]["hidden"])
    widths = {"hidden": hidden, "ratio_of_means": hidden**-0.5, "predicted": hidden**-0.5}
    embedding = {name: np.array(column) for name, column in data["embedding"].items()}
    embedding["interval"], embedding["tightness"] = 0.637 * embedding["k"], embedding["predicted"].copy()
    embedding["tightness"][embedding["dimension"] == 100] = 0.2034
    return {
        **data,
        "runs": runs,
        "initialisation": {**table, "ratio_of_means": predicted},
        "relu": relu,
        "widths": widths,
        "embedding": embedding,
    }


def test_smoke_measures_all_and_judges_nothing(data):
    claims = IbpTightness(scale="smoke").claims(data)
    assert [claim.id for claim in claims] == ["I1", "I2", "I3", "I4", "I5"]
    assert {claim.verdict for claim in claims} == {Verdict.NOT_JUDGED}


COMMON = {"eps": 0.1, "width": 128}


@pytest.mark.parametrize(
    ("ids", "table", "column", "rows", "value"),
    [
        ("I1", "runs", "tightness", {"method": "sabr"}, 0.05),
        ("I1", "runs", "tightness", {"method": "sabr"}, 0.85),
        ("I1", "runs", "tightness", {"method": "standard"}, 0.26),
        ("I1", "runs", "tightness", {"method": "pgd"}, 0.21),
        ("I1", "runs", "tightness", {"method": "ibp", **COMMON}, 0.59),
        ("I1", "runs", "certified", {"method": "ibp", **COMMON}, 0.49),
        ("I1", "runs", "certified", {"method": "pgd"}, 0.021),
        ("I2", "initialisation", "ratio_of_means", 2, 0.02),
        ("I2", "widths", "ratio_of_means", -1, 0.07),
        ("I2", "relu", "tightness", 0, 0.147),
        ("I3", "embedding", "interval", 1, 6.54),
        ("I3", "embedding", "tightness", 0, 0.2065),
        ("I3", "embedding", "tightness", 2, 0.21),
        ("I4", "signs", "largest_gap", 0, 1e-11),
        ("I4", "signs", "largest_gap", 3, 1e-11),
        ("I4", "signs", "smallest_gap", 2, 0.0),
        ("I5", "runs", "tightness", {"method": "ibp", "eps": 0.01}, 0.5),
        ("I5", "runs", "certified", {"width": 64}, 0.47),
        ("I5", "runs", "certified", {"width": 256}, 0.64),
    ],
)
def test_each_claim_can_fail(passing, ids, table, column, rows, value):
    study = IbpTightness(scale="desk")
    before = {claim.id: claim.verdict for claim in study.claims(passing)}
    assert set(before.values()) == {Verdict.REPLICATED}
    after = {claim.id: claim.verdict for claim in study.claims(changed(passing, table, column, rows, value))}
    assert after[ids] is Verdict.NOT_REPLICATED
    assert all(after[other] == before[other] for other in after if other != ids)


def test_what_holds_at_every_scale(data):
    gaps = dict(zip(data["signs"]["group"], np.asarray(data["signs"]["largest_gap"]), strict=True))
    assert all(gap < 1e-12 for name, gap in gaps.items() if name != "negative minor")
    assert np.sum(data["signs"]["agree"]) == np.sum(data["signs"]["networks"])
    assert np.divide(data["initialisation"]["ratio_of_means"], data["initialisation"]["predicted"]) == pytest.approx(
        1, abs=0.05
    )
    runs = data["runs"]
    assert (np.asarray(runs["certified"]) <= np.asarray(runs["robust"])).all()  # what is proved cannot be attacked
    assert (np.asarray(runs["robust"]) <= np.asarray(runs["accuracy"])).all()


def test_networks_that_two_claims_share_are_trained_once():
    runs = IbpTightness(scale="desk")._runs()
    setup = SETUPS["desk"]
    assert len(set(runs)) == len(runs)
    assert sum(run[1:3] == (0.1, 128) for run in runs) == 4 * setup.seeds


def test_an_interrupted_run_resumes(kept, data):
    study = IbpTightness(scale="smoke")
    assert len(kept) == len(study._runs()) + 5  # each network is a part of its own
    names = []

    def resumed(name, compute):
        names.append(name)
        return in_memory(name, compute) if name in ("embedding", "signs") else kept[name]

    again = study.run(resumed)
    assert names == list(kept)
    assert all(
        np.array_equal(np.asarray(again[table][name]), np.asarray(column))
        for table in ("embedding", "signs")
        for name, column in data[table].items()
    )
