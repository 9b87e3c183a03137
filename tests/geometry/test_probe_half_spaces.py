"""The probe "half-spaces" on a DLGN, a residual CNN and networks that have little or nothing to show."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.base.errors import CannotCapture, NothingMeasured
from corollary.base.seeds import Seeds
from corollary.data import Dataset, Split, digits
from corollary.evidence import Budget, Finding, Subject
from corollary.evidence.battery import check_probe
from corollary.geometry.dlgn import DLGN
from corollary.geometry.gated_tasks import sphere_tree
from corollary.geometry.probe_half_spaces import half_spaces
from corollary.graph import capture


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.branch = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.norm(self.stem(x.unflatten(1, (1, 8)).unflatten(2, (8, 8)) if x.ndim == 2 else x)))
        return self.head(F.relu(z + self.branch(z)).amax((2, 3)))


def images() -> Dataset:
    data = digits()
    assert data.test is not None
    return Dataset(
        "images", Split(data.test.x.reshape(-1, 1, 8, 8), data.test.y), None, "classification", data.classes
    )  # fmt: skip


def tree() -> Dataset:
    x, y = sphere_tree(300, 12, 3, 0)
    return Dataset("tree", Split(x.float(), y), None, "classification", ("0", "1"))


def numbers() -> Dataset:
    x = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    return Dataset("numbers", Split(x, x.sum(1)), None, "regression", feature_names=("length", "width", "height"))


def subject(net: nn.Module, data: Dataset, seconds: float = 10.0) -> Subject:
    net = net.eval()
    program = capture(net, data.train.x[:4])
    return Subject("net", net, program, data, nn.functional.cross_entropy, Seeds(0), Budget(seconds))


def values(finding: Finding) -> dict[str, object]:
    return {measurement.name: measurement.value for measurement in finding.measurements}


def gathered(d: int, *, d_out: int = 1) -> DLGN:
    """A DLGN whose gates of the last layer all cut along the first feature."""
    torch.manual_seed(0)
    net = DLGN(d, 6, 3, d_out)
    with torch.no_grad():
        net.gating[0].weight[0] = torch.eye(d)[0]  # type: ignore[union-attr]
        net.gating[1].weight.copy_(torch.eye(6))  # type: ignore[union-attr]
        net.gating[2].weight.copy_(torch.eye(6)[:1].repeat(6, 1) * torch.tensor([1, -1, 1, -1, 2, 3.0])[:, None])  # type: ignore[union-attr]
    return net


CASES = {
    "dlgn": lambda: (gathered(12), tree()),
    "dlgn in a network": lambda: (nn.Sequential(nn.Flatten(), DLGN(64, 5, 2, 10)), images()),
    "dlgn of numbers": lambda: (DLGN(3, 5, 2, 1, mode="pwl"), numbers()),
    "residual cnn": lambda: (Residual(), images()),
    "numbers": lambda: (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)), numbers()),
    "smooth in front": lambda: (
        nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)), numbers()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_probe_keeps_its_promises(name):
    torch.manual_seed(0)
    check_probe(half_spaces, subject(*CASES[name]()))


def test_gathered_half_spaces_are_seen_and_the_strongest_path_is_written():
    finding = half_spaces.run(subject(gathered(12), tree()))
    found = values(finding)
    assert found["alignment of the last layer's half-spaces"] == pytest.approx(1, abs=1e-5)
    assert found["half-spaces gathered in the last layer"] == 1
    assert 0 <= found["hard gates decide alike"] <= 1  # type: ignore[operator]
    words = " ".join(finding.notes)
    assert "strongest open path" in words
    assert "1.00 x0" in words
    assert "≥" in words
    data = finding.figures[0].data
    assert list(data["panel"]) == ["layer 1", "layer 2", "layer 3"]
    assert len(data["component_1"]) == 18


def test_feature_names_stand_in_the_inequalities_and_a_regression_has_no_classes():
    finding = half_spaces.run(subject(DLGN(3, 5, 2, 1, mode="pwl"), numbers()))
    assert "width" in " ".join(finding.notes)
    assert "change by hard gates" in values(finding)


def test_a_residual_cnn_shows_exact_and_local_normals_and_what_was_left_out():
    finding = half_spaces.run(subject(Residual(), images()))
    normals, alignment = finding.figures
    assert set(normals.data["at_sample"]) == {"everywhere", "class 0", "class 1", "class 2", "class 3"}
    first = normals.data["at_sample"] == "everywhere"
    assert set(normals.data["layer"][first]) == {normals.data["panel"][0]}
    assert "holds there only" in normals.caption
    assert len(alignment.data["alone"]) == 2
    coverage = finding.measurements[0].coverage
    assert coverage is not None
    assert (coverage.measured, coverage.of) == (2, 3)
    assert "Max" in str(coverage)


def test_without_a_program_gates_are_aligned_and_normals_not_shown():
    given = subject(Residual(), images())
    given.program = CannotCapture("it decides by the values of tensors")
    finding = half_spaces.run(given)
    assert [figure.name for figure in finding.figures] == ["overlap-alignment"]
    assert "normals are not known" in " ".join(finding.notes)


def test_without_targets_gates_are_counted():
    x = torch.rand(30, 3)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    finding = half_spaces.run(subject(net, Dataset("x", Split(x), None, "unlabelled")))
    assert values(finding) == {"gates": 8}
    assert [figure.name for figure in finding.figures] == ["half-space-normals"]


def test_constant_gates_are_not_counted_as_measured():
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        net[2].bias.fill_(-100.0)
    finding = half_spaces.run(subject(net, numbers()))
    assert "not defined" in str(values(finding)["alignment of the gates with the targets"])
    assert "all samples share its gates" in str(finding.measurements[0].coverage)


def test_a_spent_budget_costs_the_normals():
    finding = half_spaces.run(subject(Residual(), images(), 0.0))
    assert "the budget allows none" in " ".join(finding.notes)


def test_a_smooth_network_has_no_gates():
    with pytest.raises(NothingMeasured, match="no ReLU-like units and no DLGN"):
        half_spaces.run(subject(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), numbers()))
