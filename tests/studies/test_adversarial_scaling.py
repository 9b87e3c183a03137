"""The study `adversarial-scaling` at smoke scale, and its claims on altered data."""

import numpy as np
import pytest
import torch

from corollary.evidence import Verdict
from corollary.evidence.study import in_memory
from corollary.studies.verify.adversarial_scaling import (
    POOLED,
    AdversarialScaling,
    _exact_response,
    _perceptron,
    _plain_fgsm,
)
from stored import changed


@pytest.fixture(scope="module")
def data():
    return AdversarialScaling(scale="smoke").run()


@pytest.fixture(scope="module")
def good(data):
    """The smoke run with every judged number where the criteria want it."""
    laws, gaps, models, entropy = (dict(data[name]) for name in ("laws", "gaps", "models", "entropy"))
    laws["exponent"], laws["r2"] = np.full(4, 1.1), np.full(4, 0.99)
    gaps["gap_exponent"] = np.asarray(gaps["j"]) - 1.0
    models["critical_exponent"] = np.ones(4)
    independent = {**data["independent"], "distance": np.full(4, 0.001), "mean": data["independent"]["exact_mean"]}
    low = np.asarray(entropy["regime"]) == "low entropy"
    entropy["data"] = np.repeat("MNIST", len(low))
    entropy["median_gap"] = np.where(low, 12.0, 6.0)
    entropy["fgsm"], entropy["margin_pgd"] = np.where(low, 0.5, 0.4), np.where(low, 0.5, 0.4)
    entropy["clean"] = np.where(low, 0.94, 0.95)
    return {**data, "laws": laws, "gaps": gaps, "models": models, "independent": independent, "entropy": entropy}


def test_smoke_measures_all_and_judges_nothing(data):
    claims = AdversarialScaling(scale="smoke").claims(data)
    assert [claim.id for claim in claims] == ["A1", "A2", "A3", "A4", "A5"]
    assert {claim.verdict for claim in claims} <= {Verdict.NOT_JUDGED, Verdict.NOT_RUN}


@pytest.mark.parametrize(
    ("id", "table", "column", "row", "value"),
    [
        ("A1", "laws", "exponent", 2, 1.41),
        ("A1", "laws", "exponent", 1, np.nan),
        ("A1", "laws", "r2", 0, 0.97),
        ("A1", "models", "critical_exponent", 3, 0.79),
        ("A2", "gaps", "gap_exponent", 0, 1.16),
        ("A2", "gaps", "gap_exponent", 4, 1.7),
        ("A2", "gaps", "gap_exponent", 11, 3.7),
        ("A3", "independent", "distance", 1, 0.0031),
        ("A3", "independent", "mean", 2, 3 / 11 + 0.0011),
        ("A3", "independent", "mean", 3, 1.006),
        ("A4", "linear", "disagreements", 7, 1),
        ("A4", "response", "measured", 1, 0.0),
        ("A4", "response", "measured", 0, 0.02),
        ("A5", "entropy", "median_gap", 4, 8.9),
        ("A5", "entropy", "fgsm", 3, 0.4),
        ("A5", "entropy", "margin_pgd", 3, 0.2),
        ("A5", "entropy", "clean", 5, 0.8),
    ],
)
def test_each_claim_can_fail(good, id, table, column, row, value):
    study = AdversarialScaling()
    before = {claim.id: claim.verdict for claim in study.claims(good)}
    assert set(before.values()) == {Verdict.REPLICATED}
    after = {claim.id: claim.verdict for claim in study.claims(changed(good, table, column, row, value))}
    assert after[id] is Verdict.NOT_REPLICATED
    assert all(after[other] == before[other] for other in after if other != id)


def test_low_entropy_is_judged_on_mnist_alone(data):
    claim = AdversarialScaling().claims(data)[4]
    assert claim.verdict is Verdict.NOT_RUN
    assert "COROLLARY_DATA" in claim.note
    assert claim.measured.startswith("on digits, not MNIST")


def test_linear_response_of_a_linear_model_is_exact():
    torch.manual_seed(0)
    net = _perceptron([20, 10])
    found = _exact_response(net, torch.rand(150, 20))
    assert found["exact_disagreements"].sum() == 0
    assert len(found["exact_eps"]) == 25
    assert found["exact_attacked"][-1] > 0
    assert np.array_equal(found["exact_attacked"], found["exact_predicted"])


def test_the_rounded_gradient_is_the_textbook_one():
    torch.manual_seed(0)
    net, x = _perceptron([5, 8, 3]), torch.rand(6, 5)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    point = x.clone().requires_grad_()
    loss = -net(point).log_softmax(1)[torch.arange(6), y].mean()
    (gradient,) = torch.autograd.grad(loss, point)
    assert torch.equal(_plain_fgsm(net, x, y), (x + 0.05 * gradient.sign()).clamp(0, 1))


def test_on_digits_networks_are_pooled_for_the_lowest_quantiles():
    assert POOLED * 1797 * 0.005 > 50


def test_an_interrupted_run_resumes():
    computed = []

    def counting(name, compute):
        computed.append(name)
        if len(computed) == 3:
            raise KeyboardInterrupt
        return in_memory(name, compute)

    with pytest.raises(KeyboardInterrupt):
        AdversarialScaling(scale="smoke").run(counting)
    assert computed == ["trained on digits", "linear on digits", "shuffled labels on digits"]
