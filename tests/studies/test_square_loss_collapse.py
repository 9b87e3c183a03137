"""The study `square-loss-collapse`: the battery, claims that can fail, and parts that are kept."""

import numpy as np
import pytest

from corollary.evidence import Verdict
from corollary.evidence.battery import check_study
from corollary.evidence.study import in_memory
from corollary.studies.dynamics.square_loss_collapse import RUNS, SquareLossCollapse


@pytest.fixture(scope="module")
def kept():
    found = {}
    SquareLossCollapse(scale="smoke").run(lambda name, compute: found.setdefault(name, in_memory(name, compute)))
    return found


@pytest.fixture(scope="module")
def data(kept):
    return SquareLossCollapse(scale="smoke").run(lambda name, _: kept[name])


@pytest.fixture
def passing(data):
    """Desk runs as the claims want them; the identities are those of the smallest scale."""
    rates, decays = (np.array(column) for column in zip(*RUNS, strict=True))
    middle = np.array([87.0, 56.0, 20.0, 12.0, 70.0])
    collapse = {"learning_rate": rates, "weight_decay": decays, "step": np.full(5, 6000), "accuracy": np.ones(5)}
    collapse |= {"participation": middle, "nc1": np.full(5, 0.02), "nc2_angle": np.full(5, 0.05)}
    collapse |= {"nc2_norm": np.full(5, 0.1), "nc3": np.array([0.5, 0.1, 0.07, 0.07, 0.1]), "nc4": np.zeros(5)}
    layers = {
        "learning_rate": np.repeat(rates, 4),
        "weight_decay": np.repeat(decays, 4),
        "middle": np.tile([False, True, True, False], 5),
        "participation": np.repeat(middle, 4),
    }
    scale = {
        "step": np.full(3, 6000),
        "penalty": np.array([1e-3, 1e-4, 1e-3]),
        "start": np.array(["as drawn", "as drawn", "shrunk"]),
        "rho": np.array([2.8, 4.7, 2.8]),
        "equilibrium": np.array([2.8, 4.7, 2.8]),
        "margin_mean": np.array([0.35, 0.21, 0.35]),
        "margin_std": np.array([0.01, 0.01, 0.01]),
        "margin_min": np.array([0.3, 0.19, 0.3]),
    }
    steps = {"learning_rate": rates, "weight_decay": decays, "relative_step": np.array([1.0, 3, 6, 8, 3]) * 1e-3}
    return {**data, "collapse": collapse, "layers": layers, "scale": scale, "steps": steps}


def changed(data, table, column, row, value):
    stored = {name: np.array(kept, copy=True) for name, kept in data[table].items()}
    stored[column].reshape(-1)[row] = value
    return {**data, table: stored}


def test_battery():
    check_study(SquareLossCollapse)


@pytest.mark.parametrize(
    ("claim", "table", "column", "row", "value"),
    [
        ("C1", "scale", "equilibrium", 0, 2.79),
        ("C1", "scale", "margin_std", 1, 0.02),
        ("C1", "scale", "margin_min", 0, 0.24),
        ("C1", "scale", "rho", 1, 2.7),
        ("C2", "layers", "participation", 1, 59.0),
        ("C2", "layers", "participation", 2, 59.0),
        ("C2", "layers", "participation", 13, 17.0),
        ("C2", "layers", "participation", 17, 19.0),
        ("C2", "collapse", "accuracy", 3, 0.98),
        ("C3", "collapse", "nc1", 2, 0.07),
        ("C3", "collapse", "nc2_angle", 2, 0.11),
        ("C3", "collapse", "nc3", 2, 0.16),
        ("C3", "collapse", "nc4", 2, 0.006),
        ("C3", "collapse", "nc3", 0, 0.29),
        ("C4", "identities", "decay unrolled", 0, 1e-9),
        ("C4", "identities", "singular value beyond the batch size", 0, 1e-9),
        ("C4", "identities", "derivative along a layer", 0, 1e-9),
        ("C4", "identities", "residual", 0, 1e-5),
        ("C4", "identities", "second_moment", 0, 0.0),
        ("C5", "steps", "relative_step", 3, 2.9e-3),
        ("C5", "steps", "relative_step", 1, 6.5e-3),
    ],
)
def test_each_claim_can_fail(passing, claim, table, column, row, value):
    study = SquareLossCollapse(scale="desk")
    before = {each.id: each.verdict for each in study.claims(passing)}
    assert set(before.values()) == {Verdict.REPLICATED}
    after = {each.id: each.verdict for each in study.claims(changed(passing, table, column, row, value))}
    assert after[claim] is Verdict.NOT_REPLICATED
    assert all(after[other] == before[other] for other in after if other != claim)


def test_the_last_step_is_the_one_that_is_judged(passing):
    """Rows of earlier steps must not be taken for the end."""
    earlier = {name: np.array(column, copy=True) for name, column in passing["collapse"].items()}
    earlier["step"], earlier["nc1"] = np.full(5, 60), np.full(5, 1.0)
    both = {name: np.concatenate([earlier[name], passing["collapse"][name]]) for name in earlier}
    claims = SquareLossCollapse(scale="desk").claims({**passing, "collapse": both})
    assert {claim.verdict for claim in claims} == {Verdict.REPLICATED}


def test_identities_hold_at_every_scale(data):
    claim = SquareLossCollapse(scale="smoke").claims(data)[3]
    assert claim.id == "C4"
    found = {name: float(np.asarray(value).item()) for name, value in data["identities"].items()}
    assert found["residual"] <= 1e-6
    assert found["second_moment"] >= found["floor"]


def test_an_interrupted_run_resumes(kept):
    names = []

    def resumed(name, compute):
        names.append(name)
        return in_memory(name, compute) if name == "scale" else kept[name]

    again = SquareLossCollapse(scale="smoke").run(resumed)
    assert sorted(names) == ["identities", "scale", "sgd"]
    assert np.array_equal(again["scale"]["rho"], kept["scale"]["rho"])
