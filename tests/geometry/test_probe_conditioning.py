"""The probe "conditioning" on networks whose singular values are planted, and within its budget."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.base.errors import NothingMeasured
from corollary.base.seeds import Seeds
from corollary.data import digits
from corollary.evidence import Budget, Finding, Subject
from corollary.evidence.battery import check_probe
from corollary.geometry import probe_conditioning
from corollary.geometry.probe_conditioning import conditioning_probe
from corollary.graph import capture


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, z: Tensor) -> Tensor:
        return z + F.relu(self.linear(z))


def planted(singular_values: list[float]) -> nn.Module:
    """64 inputs, 3 linear units, and an output map with these singular values."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 3), nn.Linear(3, 3))
    q, _ = torch.linalg.qr(torch.randn(3, 3))
    with torch.no_grad():
        net[1].weight.copy_(q @ torch.diag(torch.tensor(singular_values)))
    return net


def subject(net: nn.Module, seconds: float = 20.0) -> Subject:
    data = digits()
    assert data.test is not None
    return Subject(
        "net", net.eval(), capture(net, data.test.x[:4]), data, nn.CrossEntropyLoss(), Seeds(0), Budget(seconds)
    )


def values(finding: Finding) -> dict[str, object]:
    return {measurement.name: measurement.value for measurement in finding.measurements}


def test_planted_singular_values_are_found():
    finding = conditioning_probe.run(subject(planted([100.0, 2.0, 1.0])))
    found = values(finding)
    assert found["condition number, worst layer"] == pytest.approx(2, abs=1e-5)  # float32 weights
    assert found["largest singular value"] == pytest.approx(100, rel=1e-5)
    assert found["layers that lose directions"] == 0
    assert found["lowest share of directions kept"] == 1
    assert "identity" in str(finding.measurements[0].coverage)


def test_lost_directions_are_counted_and_not_hidden():
    found = values(conditioning_probe.run(subject(planted([10.0, 1.0, 0.0]))))
    assert found["layers that lose directions"] == 1
    assert found["lowest share of directions kept"] == pytest.approx(2 / 3)
    assert found["condition number, worst layer"] == pytest.approx(1, abs=1e-5)


def test_residual_blocks_are_reported_with_their_bound():
    torch.manual_seed(0)
    net = nn.Sequential(Block(64), Block(64), nn.Linear(64, 10))
    with torch.no_grad():
        net[0].linear.weight.mul_(0.2)
        net[1].linear.weight.mul_(50)
    finding = conditioning_probe.run(subject(net))
    assert values(finding)["residual blocks with a small branch"] == 1
    data = finding.figures[1].data
    assert data["block_condition"][0] <= data["block_bound"][0] < 2
    assert math.isinf(data["block_bound"][1])


def test_skips_taken_out_are_shown_beside_the_network_as_it_is():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 16), *(Block(16) for _ in range(4)), nn.Linear(16, 10))
    finding = conditioning_probe.run(subject(net))
    found, (bands, skips) = values(finding), finding.figures
    assert found["directions through the blocks, with skips"] == 1
    assert found["directions through the blocks, skips removed"] < 0.6  # type: ignore[operator]
    kept = found["spread through the blocks, with skips"]
    assert kept < found["spread through the blocks, skips removed"]  # type: ignore[operator]
    assert len(skips.data["with_median"]) == len(skips.data["without_median"]) == 16
    assert len(bands.data["median_without_skips"]) == 5
    assert "zero in the place of the value that each of the 4 residual sums skips" in " ".join(finding.notes)


def test_without_skips_nothing_is_said_of_them():
    finding = conditioning_probe.run(subject(planted([3.0, 2.0, 1.0])))
    assert [figure.name for figure in finding.figures] == ["layer-conditioning"]
    assert "median_without_skips" not in finding.figures[0].data
    assert "skip" not in " ".join(finding.notes)


def test_layers_too_large_to_decompose_give_their_largest_values(monkeypatch):
    monkeypatch.setattr("corollary.geometry.singular_values.DENSE_SIDE", 2)
    finding = conditioning_probe.run(subject(planted([100.0, 2.0, 1.0])))
    found = values(finding)
    assert found["largest singular value"] == pytest.approx(100, rel=1e-5)
    assert "condition number, worst layer" not in found
    assert "the smallest cannot be had from products" in " ".join(finding.notes)


def test_a_spent_budget_is_said_and_not_overrun(monkeypatch):
    monkeypatch.setattr(probe_conditioning, "_row_seconds", lambda *arguments: 1e6)
    with pytest.raises(NothingMeasured, match="too slow for the time given"):
        conditioning_probe.run(subject(planted([100.0, 2.0, 1.0])))


def test_a_single_layer_has_nothing_after_it():
    with pytest.raises(NothingMeasured, match="the identity"):
        conditioning_probe.run(subject(nn.Linear(64, 10)))


def test_probe_keeps_its_promises():
    torch.manual_seed(0)
    check_probe(conditioning_probe, subject(nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))))
    check_probe(conditioning_probe, subject(nn.Sequential(nn.Linear(64, 16), nn.ReLU(), Block(16), nn.Linear(16, 10))))
