"""The probe "lipschitz" on networks whose constant is known or enclosed."""

import pytest
import torch
from torch import nn

from corollary.base.seeds import Seeds
from corollary.data import digits
from corollary.evidence import Budget, Finding, Subject
from corollary.evidence.battery import check_probe
from corollary.graph import capture
from corollary.verify import probe_lipschitz
from corollary.verify.lipschitz import UnsupportedLayer
from corollary.verify.probe_lipschitz import lipschitz
from corollary.verify.sorting import MaxMin


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch):
    monkeypatch.setattr(probe_lipschitz, "MOST_SAMPLES", 500)


def subject(net: nn.Module, *, labelled: bool = True) -> Subject:
    data = digits()
    program = capture(net.eval(), data.train.x[:4])
    return Subject("net", net, program, data if labelled else None, nn.CrossEntropyLoss(), Seeds(0), Budget(30.0))


def value(finding: Finding, name: str) -> float:
    (found,) = [m.value for m in finding.measurements if m.name == name]
    assert isinstance(found, (int, float))
    return float(found)


def maxmin() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), MaxMin(), nn.Linear(16, 10))


def test_it_keeps_the_promises_of_a_probe_and_encloses_the_constant():
    net = maxmin()
    check_probe(lipschitz, subject(net))
    finding = lipschitz.run(subject(net))
    found, bound, product = (value(finding, n) for n in ("largest slope found", "Lipschitz bound", "product of norms"))
    assert found <= bound * (1 + 1e-5)  # the slope is taken in float32
    assert bound < product
    assert bound < 1.1 * found
    assert value(finding, "certificate margin") > 0


def test_radii_are_margins_over_root_two_times_the_bound():
    net = maxmin()
    finding = lipschitz.run(subject(net))
    with torch.no_grad():
        best = net(digits().test.x).topk(2, dim=1).values
    expected = (best[:, 0] - best[:, 1]).median() / (2**0.5 * value(finding, "Lipschitz bound"))
    assert value(finding, "median certified radius") == pytest.approx(float(expected), rel=1e-5)
    assert [figure.name for figure in finding.figures] == ["margin-radii"]


def test_a_wide_network_gets_the_product_and_a_note(monkeypatch):
    monkeypatch.setattr(probe_lipschitz, "WIDEST", 8)
    finding = lipschitz.run(subject(maxmin()))
    assert value(finding, "Lipschitz bound") == value(finding, "product of norms")
    assert "16 entries" in finding.notes[0]


def test_without_data_there_are_no_radii():
    finding = lipschitz.run(subject(maxmin(), labelled=False))
    assert finding.figures == ()
    assert value(finding, "Lipschitz bound") > 0


def test_a_linear_network_has_its_norm_for_both():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 12), nn.Linear(12, 10))
    finding = lipschitz.run(subject(net))
    norm = float(torch.linalg.matrix_norm((net[1].weight @ net[0].weight).detach(), 2))
    assert value(finding, "Lipschitz bound") == pytest.approx(norm, rel=1e-5)
    assert value(finding, "largest slope found") == pytest.approx(norm, rel=1e-5)


def test_a_layer_without_a_bound_is_named():
    with pytest.raises(UnsupportedLayer, match="layer_norm"):
        lipschitz.run(subject(nn.Sequential(nn.Linear(64, 8), nn.LayerNorm(8))))
