import math

import pytest

from corollary.evidence import Verdict
from corollary.evidence.battery import check_study
from corollary.evidence.study import in_memory
from corollary.studies.verify.lipsdp_groupsort import ALONE, METHODS, RANDOM, TRAINED, LipsdpGroupsort
from stored import changed

DESK = LipsdpGroupsort(scale="desk")


def names(sizes):
    return "-".join(map(str, sizes))


def replicated():
    """Tables as a run that replicates every claim would leave them."""
    trained = {
        "architecture": [names(s) for s in TRAINED],
        "hidden": [1, 2, 4],
        "seed": [0, 0, 0],
        "accuracy": [0.95] * 3,
        "sample": [1.0, 2.0, 4.0],
        "eliminate": [1.1, 2.1, 4.4],
        "chain": [1.2, 2.2, 5.0],
        "residual-relu": [1.3, 2.6, 7.0],
        "product": [1.2, 2.5, 6.0],
        "margin": [1e-10] * 3,
        "linf": [3.0, 6.0, 12.0],
        "linf_product": [6.0, 60.0, 600.0],
        "linf_pairs": [1.0, 2.0, 3.0],
        "linf_attacked": [2.0, 4.0, 6.0],
    }
    random = {
        "architecture": [names(s) for s in RANDOM],
        "seed": [0, 0, 0],
        "eliminate": [2.02, 3.0, 4.0],
        "group": [2.0201, 3.001, 4.001],
        "chain": [2.3, 3.6, 4.9],
        "residual-relu": [2.4, 4.0, 6.0],
        "product": [2.6, 5.0, 9.0],
        "enumerate": [2.0, math.nan, math.nan],
    }
    alone = {
        "layer": [layer for layer, _ in ALONE],
        "method": [method for _, method in ALONE],
        "bound": [1.0, math.sqrt(2), 1.0, 1.0],
    }
    return {"alone": alone, "trained": trained, "random": random}


def test_the_study_keeps_its_promises():
    pytest.importorskip("cvxpy")
    check_study(LipsdpGroupsort)


@pytest.mark.parametrize(
    ("id", "table", "column", "row", "value"),
    [
        ("L1", "alone", "bound", 0, 1.00001),
        ("L1", "alone", "bound", 1, 1.0),
        ("L1", "alone", "bound", 2, 1.1),
        ("L1", "alone", "bound", 3, 0.9),
        ("L2", "trained", "sample", 1, 2.2),
        ("L2", "trained", "residual-relu", 0, 1.05),
        ("L2", "trained", "product", 1, 2.15),
        ("L2", "trained", "product", 2, 4.8),
        ("L3", "random", "group", 1, 3.01),
        ("L3", "random", "chain", 2, 4.0),
        ("L4", "random", "enumerate", 0, 2.03),
        ("L4", "random", "enumerate", 0, 1.5),
        ("L5", "trained", "linf_attacked", 2, 12.1),
        ("L5", "trained", "linf_pairs", 0, 3.1),
        ("L5", "trained", "linf_product", 0, 2.9),
    ],
)
def test_each_claim_can_fail(id, table, column, row, value):
    data = replicated()
    assert {claim.verdict for claim in DESK.claims(data)} == {Verdict.REPLICATED}
    data = changed(data, table, column, row, value)
    if (table, column, row) == ("random", "chain", 2):  # the mean of chain / eliminate, 1.18, falls below 1.08
        data = changed(data, table, column, 1, 3.0)
    after = {claim.id: claim.verdict for claim in DESK.claims(data)}
    assert after[id] is Verdict.NOT_REPLICATED
    assert {name for name, verdict in after.items() if verdict is not Verdict.REPLICATED} == {id}


def test_figures_show_what_was_measured():
    for figure in DESK.figures(replicated()):
        assert figure.svg().startswith("<svg")
    assert set(METHODS) < set(DESK.figures(replicated())[0].data)


def test_an_interrupted_run_resumes():
    pytest.importorskip("cvxpy")
    computed = []

    def counting(name, compute):
        computed.append(name)
        if len(computed) == 3:
            raise KeyboardInterrupt
        return in_memory(name, compute)

    with pytest.raises(KeyboardInterrupt):
        LipsdpGroupsort(scale="smoke").run(counting)
    assert len(set(computed)) == 3
