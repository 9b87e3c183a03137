import numpy as np
import pytest

from corollary.evidence import Verdict
from corollary.evidence.study import in_memory
from corollary.studies.dynamics.sgd_noise_regimes import CHIS, SETUPS, SgdNoiseRegimes, parity_digits


@pytest.fixture(scope="module")
def kept():
    """The parts of a run at the smallest scale."""
    found = {}
    SgdNoiseRegimes(scale="smoke").run(lambda name, compute: found.setdefault(name, in_memory(name, compute)))
    return found


@pytest.fixture(scope="module")
def data(kept):
    return SgdNoiseRegimes(scale="smoke").run(lambda name, _: kept[name])


def stacked(names, rows):
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


@pytest.fixture
def passing(data):
    """Desk tables that follow the paper's laws exactly."""
    setup = SETUPS["desk"]
    perceptron = [
        (chi, size, seed, size ** (1 / (1 + chi)), 1.0, size ** (1 + 2 / (1 + chi)), True)
        for chi in CHIS
        for size in setup.perceptron_points[chi]
        for seed in range(2)
    ]
    networks = [
        (size, 2.0**15, t, r, 100, 50 * t * size**1.2, 0.1, 0.2 * t**0.9 * size**0.3, 0.3, True, False)
        for size in setup.points
        for t in setup.temperatures
        for r in range(2)
    ]
    return {
        **data,
        "perceptron": stacked(("chi", "points", "seed", "w1", "w_perp", "time", "finished"), perceptron),
        "networks": stacked(tuple(data["networks"]), networks),
    }


def changed(data, table, column, function):
    stored = {name: np.array(values, copy=True) for name, values in data[table].items()}
    stored[column] = function(stored)
    return {**data, table: stored}


def test_smoke_measures_all_and_judges_nothing(data):
    claims = SgdNoiseRegimes(scale="smoke").claims(data)
    assert [claim.id for claim in claims] == ["C1", "C2", "C3", "C4"]
    assert {claim.verdict for claim in claims} == {Verdict.NOT_JUDGED}


@pytest.mark.parametrize(
    ("ids", "table", "column", "function"),
    [
        ("C1", "perceptron", "w_perp", lambda t: t["points"] ** np.where(t["chi"] == 3, 0.13, 0.0)),
        ("C1", "perceptron", "time", lambda t: t["time"] * t["points"] ** np.where(t["chi"] == 0, 0.5, 0.0)),
        ("C2", "scaling", "gap", lambda t: np.asarray(t["temperature"]) * 2e-12),
        ("C3", "networks", "time", lambda t: t["time"] * t["points"] ** 0.9),
        ("C3", "networks", "time", lambda t: t["time"] * t["temperature"] ** 0.5),
        ("C3", "networks", "time", lambda t: t["time"] * np.where(t["repeat"] == 1, 30.0, 1.0)),
        ("C4", "networks", "weight_change", lambda t: t["weight_change"] * np.where(t["points"] == 1024, 1e3, 1.0)),
    ],
    ids=["ratio", "perceptron time", "scaling", "time in P", "time in T", "fit", "out of reach"],
)
def test_each_claim_can_fail(passing, ids, table, column, function):
    study = SgdNoiseRegimes(scale="desk")
    before = {claim.id: claim.verdict for claim in study.claims(passing)}
    assert set(before.values()) == {Verdict.REPLICATED}
    after = {claim.id: claim.verdict for claim in study.claims(changed(passing, table, column, function))}
    assert after[ids] is Verdict.NOT_REPLICATED
    allowed = {ids, "C3"} if ids == "C4" else {ids}
    assert all(after[other] == before[other] for other in after if other not in allowed)


@pytest.mark.parametrize(
    ("exponents", "failing"),
    [((1.3, 0.3), {"C3"}), ((0.9, 0.05), {"C3", "C4"}), ((0.75, 0.59), {"C4"})],
    ids=["delta", "gamma", "slope"],
)
def test_the_exponents_decide(passing, exponents, failing):
    delta, gamma = exponents

    def law(table):  # about the middle of the temperatures, so that all sizes pass through the threshold
        return 0.1 * (table["temperature"] / 0.1) ** delta * (table["points"] / 350) ** gamma

    claims = SgdNoiseRegimes(scale="desk").claims(changed(passing, "networks", "weight_change", law))
    assert {claim.id for claim in claims if claim.verdict is Verdict.NOT_REPLICATED} == failing


def test_unfinished_networks_do_not_enter_and_are_counted(passing):
    stored = {name: np.array(values, copy=True) for name, values in passing["networks"].items()}
    spoilt = (stored["repeat"] == 1) & (stored["points"] == 512)
    stored["finished"][spoilt] = False
    stored["weight_change"][spoilt] = 1e30
    claims = SgdNoiseRegimes(scale="desk").claims({**passing, "networks": stored})
    assert {claim.verdict for claim in claims} == {Verdict.REPLICATED}
    assert f"{int(spoilt.sum())} of {len(spoilt)} networks unfinished" in claims[3].controls[1]


def test_what_holds_at_every_scale(data):
    assert float(np.max(data["scaling"]["gap"])) == 0.0  # the temperatures are powers of two
    assert all(np.asarray(data["perceptron"]["finished"], dtype=bool))
    networks = data["networks"]
    hot = np.asarray(networks["temperature"]) == max(networks["temperature"])
    cold = np.asarray(networks["temperature"]) == min(networks["temperature"])
    change = np.asarray(networks["weight_change"])
    assert float(change[hot].min()) > float(change[cold].max())


def test_the_digits_are_standardised_by_one_mean_and_labelled_by_parity():
    x, y = parity_digits()
    assert float(x.mean()) == pytest.approx(0, abs=1e-12)
    assert float(x.std()) == pytest.approx(1, abs=1e-12)
    assert x.shape == (1797, 64)
    assert float((y == 1).double().mean()) == pytest.approx(0.496, abs=0.005)  # 891 of them are even


def test_an_interrupted_run_resumes(kept, data):
    study = SgdNoiseRegimes(scale="smoke")
    names = []

    def resumed(name, compute):
        names.append(name)
        return in_memory(name, compute) if name in ("perceptron chi 1", "scaling") else kept[name]

    again = study.run(resumed)
    assert names == list(kept)
    assert all(np.array_equal(again["perceptron"][name], column) for name, column in data["perceptron"].items())


def test_the_figures_draw(data):
    figures = SgdNoiseRegimes(scale="smoke").figures(data)
    assert [figure.name for figure in figures] == ["noise-perceptron", "noise-networks", "noise-phase-diagram"]
    assert all(figure.svg().startswith("<svg") for figure in figures)
