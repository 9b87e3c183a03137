import numpy as np
import pytest
import torch

from corollary.evidence import Verdict
from corollary.evidence.battery import check_study
from corollary.studies.verify.genbab import INSTANCES, WANTED, GenBaB
from corollary.studies.verify.genbab_measures import EVERY, cut_areas, random_graph
from stored import changed


@pytest.fixture(scope="module")
def data():
    return GenBaB(scale="smoke").run()


@pytest.fixture
def passing(data):
    """Data in the form of the smallest scale's, with numbers that pass."""
    nets = np.repeat(["sin", "sigmoid", "tanh"], 8)
    searches = {"net": nets, "bound": np.full(24, -0.1), "broken": np.zeros(24, dtype=bool)}
    for rule, proved, domains in (
        ("bbps", 20, 5), ("babsr", 13, 9), ("random", 3, 100), ("optimised", 5, 0), ("engine", 24, 3)
    ):  # fmt: skip
        searches[f"{rule}_proved"] = np.arange(24) < proved
        searches[f"{rule}_domains"] = np.full(24, domains)
    cuts = {
        "name": np.array(list(WANTED)), "ratio": np.array(list(WANTED.values())),
        "off_middle": np.full(7, 0.5), "square": np.full(7, 1e-13),
    }  # fmt: skip
    graphs = {name: np.zeros(3) for name in ("outside", "child", "point", "optimised")} | {"ops": data["graphs"]["ops"]}
    instances = {
        "suite": [i[0] for i in INSTANCES], "instance": [" ".join(i[1:3]) for i in INSTANCES],
        "published": [i[3] for i in INSTANCES], "verdict": [i[3] for i in INSTANCES], "seconds": np.ones(24),
    }  # fmt: skip
    return {"searches": searches, "cuts": cuts, "graphs": graphs, "affine": {"error": [0.0]}, "instances": instances}


@pytest.mark.parametrize(
    ("id", "table", "column", "row", "value"),
    [
        ("G1", "searches", "broken", 0, True),
        ("G1", "searches", "bound", 0, 0.1),
        ("G2", "searches", "babsr_proved", slice(0, 18), True),
        ("G2", "searches", "random_proved", slice(0, 11), True),
        ("G2", "searches", "babsr_domains", slice(None), 6),
        ("G3", "cuts", "ratio", 0, 0.95),
        ("G3", "cuts", "off_middle", 0, 1.5),
        ("G3", "cuts", "square", 0, 1e-11),
        ("G4", "graphs", "outside", 0, 1e-8),
        ("G4", "graphs", "child", 0, 1e-8),
        ("G4", "graphs", "point", 0, 1e-8),
        ("G4", "graphs", "optimised", 0, 1e-8),
        ("G4", "affine", "error", 0, 1e-9),
        ("G5", "instances", "verdict", slice(0, 5), "timeout"),
        ("G5", "instances", "seconds", slice(None), 10.0),
    ],
)
def test_each_claim_can_fail(passing, id, table, column, row, value):
    study = GenBaB(scale="desk")
    before = {claim.id: claim.verdict for claim in study.claims(passing)}
    assert set(before.values()) == {Verdict.REPLICATED}
    after = {claim.id: claim.verdict for claim in study.claims(changed(passing, table, column, row, value))}
    assert after[id] is Verdict.NOT_REPLICATED
    assert all(after[other] == before[other] for other in after if other != id)


def test_a_contradiction_is_not_forgiven(passing):
    wrong = changed(passing, "instances", "verdict", 0, "sat")
    assert {c.id: c.verdict for c in GenBaB(scale="desk").claims(wrong)}["G5"] is Verdict.NOT_REPLICATED


def test_the_promises_of_a_study():
    check_study(GenBaB)


def test_the_random_graphs_use_every_op():
    generator = torch.Generator().manual_seed(0)
    used = set().union(*(random_graph(number, generator)[1] for number in range(len(EVERY) // 6 + 1)))
    assert used == {type(op).__name__ for op in EVERY}


def test_cuts_of_the_square_belong_in_the_middle():
    table = cut_areas(2.5, 9)
    square = table["name"].index("x^2")
    assert table["off_middle"][square] == 0
    assert table["ratio"][square] == pytest.approx(1, abs=1e-12)
