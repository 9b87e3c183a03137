"""The probe "adversarial" on networks whose answer is known."""

import math
from functools import cache

import pytest
import torch
from torch import nn

from corollary.base.errors import CannotCapture, NothingMeasured
from corollary.base.seeds import Seeds
from corollary.data import Dataset, Split, digits
from corollary.engine import fit
from corollary.evidence import Budget, Coverage, Finding, Subject
from corollary.evidence.battery import check_probe
from corollary.verify.adversarial_curve import Curve, PowerLaw
from corollary.verify.probe_adversarial import _Found, _of_masking, adversarial


def subject(net: nn.Module, data: Dataset, seconds: float = 30.0) -> Subject:
    return Subject(
        "net", net.eval(), CannotCapture("not needed"), data, nn.CrossEntropyLoss(), Seeds(0), Budget(seconds)
    )


def value(finding: Finding, name: str) -> float:
    (found,) = [m.value for m in finding.measurements if m.name == name]
    assert isinstance(found, (int, float))
    return float(found)


@cache
def trained() -> nn.Module:
    data = digits()
    assert data.train.y is not None
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return fit(net, (data.train.x, data.train.y), epochs=8, batch_size=64).module


def unlabelled() -> Dataset:
    return Dataset("inputs", Split(digits().train.x), None, "unlabelled")


@pytest.mark.parametrize("labels", [True, False])
def test_digits_and_the_promises_of_a_probe(labels):
    data = digits() if labels else unlabelled()
    check_probe(adversarial, subject(trained(), data))
    finding = adversarial.run(subject(trained(), data))
    assert value(finding, "answers without a gradient") == 0
    assert 0.7 < value(finding, "fast attack against strong attack") <= 1.05
    assert 1e-4 < value(finding, "one percent of answers flip at") < 0.1
    assert any("no labels" in note for note in finding.notes) is not labels
    (masking,) = [m.value for m in finding.measurements if m.name == "gradient masking"]
    assert masking == "no sign"


def test_a_known_law_is_found():
    class Boundary(nn.Module):
        def forward(self, x):
            return torch.cat([x, -x], 1)

    # Distances from the boundary are uniform on [0, 2]: error(eps) = eps / 2, and gaps are twice the distance.
    x = torch.linspace(-2, 2, 4001, dtype=torch.float64)[:, None] + 1e-4
    finding = adversarial.run(subject(Boundary(), Dataset("line", Split(x), None, "unlabelled")))
    assert value(finding, "exponent of adversarial error") == pytest.approx(1, abs=0.05)
    assert value(finding, "amplitude of adversarial error") == pytest.approx(0.5, rel=0.1)
    assert value(finding, "one percent of answers flip at") == pytest.approx(0.02, rel=0.1)
    assert value(finding, "median critical perturbation") == pytest.approx(1, rel=0.01)
    assert value(finding, "exponent of gap 2") == pytest.approx(1, abs=0.02)


def test_a_network_without_gradient_is_flagged():
    class Rounding(nn.Module):
        def forward(self, x):
            return trained()((8 * x).round() / 8)

    finding = adversarial.run(subject(Rounding(), unlabelled()))
    assert value(finding, "answers without a gradient") == 1
    assert math.isinf(value(finding, "median critical perturbation"))
    (masking,) = [m.value for m in finding.measurements if m.name == "gradient masking"]
    assert "no gradient at 100%" in str(masking)
    assert [figure.name for figure in finding.figures] == ["logit-gaps"]


def curve(errors: list[float], attack: str) -> Curve:
    flipped = torch.arange(100)[None] < 100 * torch.tensor(errors)[:, None]
    return Curve(torch.tensor([0.1, 0.2, 0.3]), flipped, attack, 100)


@pytest.mark.parametrize(
    ("fast", "ci", "sign"),
    [
        ([0.02, 0.05, 0.1], (0.9, 1.1), "no sign"),
        ([0.0, 0.01, 0.02], (0.9, 1.1), "one gradient step changes less than half"),
        ([0.02, 0.05, 0.1], (1.9, 2.1), "far from 1"),
        ([0.02, 0.05, 0.1], (0.3, 0.5), "far from 1"),
        ([0.02, 0.05, 0.1], (1.3, 2.1), "no sign"),
    ],
)
def test_signs_of_masking(fast, ci, sign):
    law = PowerLaw(sum(ci) / 2, 1.0, 1.0, ci, 9)
    strong, weak = curve([0.02, 0.05, 0.1], "margin_pgd"), curve(fast, "fgsm")
    found = _Found(torch.ones(100), weak, law, weak, strong, weak, ())
    (masking,) = [m for m in _of_masking(found, Coverage(100, 100)) if m.name == "gradient masking"]
    assert sign in str(masking.value)


def test_ties_are_told():
    class Coarse(nn.Module):
        def forward(self, x):
            h = trained()(x)
            return h + (h.round() - h).detach()

    finding = adversarial.run(subject(Coarse(), unlabelled()))
    assert value(finding, "tied logits") > 0.02
    assert value(finding, "exponent of gap 2") == 0


def test_a_small_budget_attacks_fewer_inputs_and_says_so():
    finding = adversarial.run(subject(trained(), unlabelled(), seconds=1e-3))
    (coverage,) = [m.coverage for m in finding.measurements if m.name == "answers without a gradient"]
    assert coverage is not None
    assert (coverage.measured, coverage.of) == (20, 1400)


def test_what_is_no_classifier_is_refused():
    x = torch.rand(50, 3)
    regression = Dataset("r", Split(x, torch.rand(50, 1)), None, "regression")
    with pytest.raises(NothingMeasured, match="the task is regression"):
        adversarial.run(subject(nn.Linear(3, 2), regression))
    with pytest.raises(NothingMeasured, match="needs a classifier"):
        adversarial.run(subject(nn.Linear(3, 1), Dataset("u", Split(x), None, "unlabelled")))
    wrong = Dataset("w", Split(x, torch.ones(50, dtype=torch.long)), None, "classification", ("a", "b"))
    net = nn.Linear(3, 2)
    with torch.no_grad():
        net.bias.copy_(torch.tensor([100.0, 0.0]))
    with pytest.raises(NothingMeasured, match="0 of 50 inputs are classified right"):
        adversarial.run(subject(net, wrong))
