"""The probe "collapse": demo-like and homogeneous networks; without labels, without a program, without time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from corollary.base.errors import CannotCapture, NothingMeasured
from corollary.base.seeds import Seeds
from corollary.data import Dataset, Split, digits
from corollary.demo import network
from corollary.dynamics.probe_collapse import collapse
from corollary.engine import fit, seeded
from corollary.evidence import Budget, Subject
from corollary.evidence.battery import check_probe
from corollary.graph import capture


def subject(net: nn.Module, data: Dataset | None, *, seconds: float = 3.0, program: bool = True) -> Subject:
    net = net.eval()
    x = torch.zeros(2, 64) if data is None else data.train.x[:4]
    graph = capture(net, x) if program else CannotCapture("it branches")
    return Subject("net", net, graph, data, F.cross_entropy, Seeds(0), Budget(seconds))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    data = digits()
    assert data.train.y is not None
    return fit(
        seeded(network, 0),
        (data.train.x, data.train.y),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
        epochs=10,
        batch_size=64,
    ).module


def by_name(finding) -> dict:
    return {measurement.name: measurement for measurement in finding.measurements}


def test_the_demo_network_passes_the_battery(trained):
    check_probe(collapse, subject(trained, digits()))


def test_the_demo_network_has_collapse_and_rank_but_no_scale(trained):
    finding = collapse.run(subject(trained, digits()))
    found = by_name(finding)
    assert found["within-class variability (NC1)"].headline
    assert found["within-class variability (NC1)"].coverage.measured == 1400
    assert found["disagreement with the nearest class mean (NC4)"].value < 0.05
    assert found["layers without full rank"].unit == "of 3"
    assert "product of norms" not in found
    assert any("BatchNorm1d" in note for note in finding.notes)
    assert {figure.name for figure in finding.figures} == {"singular-spectra", "class-mean-cosines"}


def test_training_lowers_the_variability_within_classes(trained):
    before = by_name(collapse.run(subject(seeded(network, 0), digits())))
    after = by_name(collapse.run(subject(trained, digits())))
    name = "within-class variability (NC1)"
    assert after[name].value < 0.5 * before[name].value


def test_a_homogeneous_network_has_a_scale_and_margins():
    data = digits(image=True)
    net = seeded(
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10, bias=False)),
        0,
    )
    finding = collapse.run(subject(net, data))
    found = by_name(finding)
    norms = [p.norm().item() for p in net.parameters()]
    assert found["product of norms"].value == pytest.approx(norms[0] * norms[1], rel=1e-5)
    assert "normalised-margins" in {figure.name for figure in finding.figures}
    spectra = next(figure for figure in finding.figures if figure.name == "singular-spectra")
    assert {"0 (kernel)", "0 (operator)", "3 (dense)"} == set(spectra.data["layer"])
    check_probe(collapse, subject(net, data))


def test_one_output_for_two_classes():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator)
    data = Dataset("two", Split(x, (x[:, 0] > 0).long()), None, "classification", None, "drawn", "none")
    net = seeded(lambda: nn.Sequential(nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 1, bias=False)), 0)
    found = by_name(collapse.run(subject(net, data)))
    assert {"last layer against class means (NC3)", "median normalised margin"} <= set(found)


def test_without_data_there_are_ranks(trained):
    finding = collapse.run(subject(trained, None))
    assert "lowest stable rank of a layer" in by_name(finding)
    assert "within-class variability (NC1)" not in by_name(finding)


def test_without_a_program_there_are_ranks_and_a_reason(trained):
    finding = collapse.run(subject(trained, digits(), program=False))
    assert "lowest stable rank of a layer" in by_name(finding)
    assert any("it branches" in note for note in finding.notes)


def test_without_time_the_largest_layers_are_left_out(trained):
    finding = collapse.run(subject(trained, digits(), seconds=3e-4))
    assert any("weights were decomposed" in note or "No rank" in note for note in finding.notes)


def test_nothing_at_all_is_an_error():
    with pytest.raises(NothingMeasured):
        collapse.run(subject(nn.ReLU(), None))
