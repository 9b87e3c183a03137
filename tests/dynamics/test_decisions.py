import math

import numpy as np
import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.dynamics.decisions import decision_report, ordinal_agreement, probability_scores, reliability
from corollary.dynamics.utility import UtilityModel
from corollary.dynamics.utility_probability import fit_utility_probability

LOGITS = UtilityModel(nn.Identity())


def test_calibration_error_by_hand():
    """Three bins of 15 are in use; the upper end belongs to its bin."""
    confidence = torch.tensor([0.5, 0.52, 0.9, 1.0, 1.0], dtype=torch.float64)
    correct = torch.tensor([True, False, True, True, False])
    found = reliability(confidence, correct)
    assert found.count.tolist() == [2, 1, 2]
    assert found.accuracy.tolist() == [0.5, 1, 0.5]
    assert found.error == pytest.approx((2 * 0.01 + 0.1 + 2 * 0.5) / 5)
    edge = torch.tensor([1 / 15, 1 / 15 + 1e-9], dtype=torch.float64)
    assert reliability(edge, torch.tensor([True, True])).count.tolist() == [1, 1]


def test_calibrated_draws_have_a_small_error():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(40_000, generator=generator, dtype=torch.float64)
    correct = torch.rand(40_000, generator=generator, dtype=torch.float64) < p
    assert reliability(p, correct).error < 0.02  # 15 bins of 2700: standard error 0.01 at most
    assert reliability(p, ~correct).error > 0.4


@pytest.mark.parametrize("confidence", [[], [1.1], [-0.1], [math.nan]])
def test_confidences_are_probabilities(confidence):
    with pytest.raises(BadInput, match="confidences"):
        reliability(torch.tensor(confidence), torch.ones(len(confidence), dtype=torch.bool))


def test_scores_of_probabilities_by_hand():
    p = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.5, 0.5]])
    found = probability_scores(p, torch.tensor([0, 1, -1]))
    assert found.nll == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2)
    assert found.covered == pytest.approx(2 / 3)


def report(**settings):
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(400, 4, generator=generator, dtype=torch.float64)
    y = torch.multinomial((3 * u).softmax(1), 1, generator=generator)[:, 0]
    names = ("softmax", "choice")
    fitted = {name: fit_utility_probability(LOGITS, (u[:200], y[:200]), name, k=4) for name in names}
    data = (u[200:], y[200:])
    return data, fitted, decision_report(fitted, data, **settings)


def test_a_draw_is_worth_its_probability_of_the_reference():
    """Exactly for the candidates; within the error of 200 x 50 draws for the softmax over all."""
    (u, y), fitted, table = report(draws=50)
    rows = {(t, r): i for i, (t, r) in enumerate(zip(table["transform"], table["rule"], strict=True))}
    beta = fitted["choice"].parameters["beta"]
    factors = {"softmax": 1.0, "choice": beta}
    exact = {name: float((b * u).softmax(1).gather(1, y[:, None]).mean()) for name, b in factors.items()}
    assert table["exact match"][rows["choice", "sample"]] == pytest.approx(exact["choice"], rel=1e-9)
    assert table["exact match"][rows["softmax", "sample"]] == pytest.approx(exact["softmax"], abs=4 * 0.5 / 100)
    assert exact["choice"] > exact["softmax"] + 0.1  # the softmax is too hot by a factor of 3
    best = float((u.argmax(1) == y).double().mean())
    for name in ("softmax", "choice"):
        assert table["exact match"][rows[name, "argmax"]] == best
        assert table["exact match"][rows[name, "mbr"]] == best  # for equality the least risk is the most probable
    assert table["nll"][rows["choice", "sample"]] < table["nll"][rows["softmax", "sample"]]
    assert set(table["covered"]) == {1.0}


def test_rules_and_qualities_are_chosen():
    _, _, table = report(rules=("mbr",), quality={"close": lambda a, b: ((a - b).abs() < 2).double()})
    assert table["rule"] == ["mbr", "mbr"]
    assert list(table) == ["transform", "rule", "nll", "ece", "covered", "close"]
    with pytest.raises(BadInput, match="no decision rule"):
        report(rules=("beam",))


def test_agreement_of_orders():
    u = np.array([1.0, 2.0, 3.0, 4.0])
    assert ordinal_agreement(u, u**3) == 1
    assert ordinal_agreement(u, -np.exp(u)) == -1
    assert ordinal_agreement(u, [1, 2, 4, 3]) == pytest.approx(2 / 3)  # 5 of 6 pairs agree
    assert ordinal_agreement([u, u], [u, -u]) == 0
    for other in ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, np.nan]):
        with pytest.raises(BadInput, match="order is"):
            ordinal_agreement(u, other)
