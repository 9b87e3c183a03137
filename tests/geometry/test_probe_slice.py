"""The slice map: what it reports of networks with and without linear regions, and that it keeps to its budget."""

import numpy as np
import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput, CannotCapture
from corollary.base.seeds import Seeds
from corollary.data import Dataset, Split, digits
from corollary.evidence import Budget, Finding, Subject
from corollary.evidence.battery import check_probe
from corollary.geometry import probe_slice
from corollary.geometry.probe_slice import slice_map
from corollary.geometry.slices import LONGEST_VECTOR_DRAWING, Plane
from corollary.graph import capture


def subject_of(module: nn.Module, data: Dataset, *, budget: float = 20.0, seed: int = 0) -> Subject:
    x = data.train.x[:4]
    return Subject(
        name="net",
        module=module.eval(),
        program=capture(module, x),
        data=data,
        loss=nn.functional.cross_entropy,
        seeds=Seeds(seed),
        budget=Budget(budget),
    )


def perceptron(activation: nn.Module, outputs: int = 10) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 24), activation, nn.Linear(24, outputs))


def values(finding: Finding) -> dict[str, float]:
    return {m.name: m.value for m in finding.measurements}  # type: ignore[misc]


def regression() -> Dataset:
    x = torch.rand(60, 3, generator=torch.Generator().manual_seed(0))
    return Dataset("three numbers", Split(x, x.sum(1)), None, "regression")


NETWORKS = {
    "relu": lambda: perceptron(nn.ReLU()),
    "softmax at the end": lambda: nn.Sequential(*perceptron(nn.ReLU()), nn.Softmax(dim=1)),
    "one output": lambda: perceptron(nn.ReLU(), 1),
    "smooth": lambda: perceptron(nn.Tanh()),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 10)
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_probe_keeps_its_promises(name):
    torch.manual_seed(1)
    check_probe(slice_map, subject_of(NETWORKS[name](), digits()))


def test_figure_shows_the_regions_that_are_counted_and_three_samples_of_three_classes():
    finding = slice_map.run(subject_of(perceptron(nn.ReLU()), digits()))
    figure, found = finding.figures[0], values(finding)
    assert len(np.unique(figure.data["region"])) == found["regions on the slice"] > 20
    assert len(set(figure.data["mark_label"])) == 3
    assert sum(value for name, value in found.items() if name.startswith("share of class")) <= 1 + 1e-12
    shares = [value for name, value in found.items() if name.startswith(("share of class", "share of other"))]
    assert sum(shares) == pytest.approx(1.0, abs=1e-9)
    assert found["share of the possible regions"] < 0
    assert 0 < found["relative region diameter"] < 1
    assert finding.notes == ()
    assert found["regions on the slice"] < LONGEST_VECTOR_DRAWING
    assert "<image" not in figure.svg()


def test_linear_network_is_one_region():
    found = values(slice_map.run(subject_of(nn.Linear(64, 10), digits())))
    assert found["regions on the slice"] == 1
    assert "share of the possible regions" not in found


def test_map_of_a_smooth_network_is_labelled_as_sampled():
    finding = slice_map.run(subject_of(perceptron(nn.Tanh()), digits()))
    assert "by evaluation" in finding.figures[0].title
    assert "Tanh() is smooth" in finding.notes[0]
    assert "regions on the slice" not in values(finding)
    assert sum(values(finding).values()) == pytest.approx(1.0)


def test_network_that_could_not_be_captured_is_mapped_by_evaluation():
    subject = subject_of(perceptron(nn.ReLU()), digits())
    subject.program = CannotCapture("it decides by the values of tensors")
    finding = slice_map.run(subject)
    assert "it decides by the values of tensors" in finding.notes[0]
    assert finding.figures[0].name == "slice-map-sampled"


def test_sampled_and_exact_class_shares_agree(monkeypatch):
    exact = values(slice_map.run(subject_of(perceptron(nn.ReLU()), digits())))
    subject = subject_of(perceptron(nn.ReLU()), digits())
    subject.program = CannotCapture("")
    sampled = values(slice_map.run(subject))
    for name, share in sampled.items():
        assert share == pytest.approx(exact[name], abs=0.02)  # a boundary of some ten box widths on a grid of 160


def test_regression_shows_regions_without_classes_and_smooth_regression_its_output():
    data = regression()
    torch.manual_seed(0)
    exact = slice_map.run(subject_of(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)), data))
    assert not any("class" in name for name in values(exact))
    assert "boundary_u0" not in exact.figures[0].data
    smooth = slice_map.run(subject_of(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), data))
    assert values(smooth)["range of the output on the slice"] > 0


def test_spent_budget_gives_a_smaller_box_and_says_so():
    finding = slice_map.run(subject_of(perceptron(nn.ReLU()), digits(), budget=0.0))
    assert "the budget allows no more" in finding.notes[0]
    whole = slice_map.run(subject_of(perceptron(nn.ReLU()), digits()))
    assert np.ptp(finding.figures[0].data["u"]) < np.ptp(whole.figures[0].data["u"])


def test_a_part_is_shown_beside_the_whole_plane_by_evaluation(monkeypatch):
    monkeypatch.setattr(probe_slice, "MOST_REGIONS", 8)  # stops the search at the second region
    net = perceptron(nn.ReLU())
    with torch.no_grad():
        net[2].bias -= net(digits().train.x).mean(0)  # several classes then win somewhere
    subject = subject_of(net, digits())
    finding = slice_map.run(subject)
    figure, found = finding.figures[0], values(finding)
    data = figure.data
    assert len(np.unique(data["region"])) == found["regions on the slice"]
    assert np.ptp(data["u"]) < np.ptp(data["grid_u"]) / 2
    assert np.ptp(data["exact_u"]) == pytest.approx(np.ptp(data["u"]))
    assert len(data["grid_class"]) == len(data["grid_u"]) * len(data["grid_v"])
    plane = Plane.through(*probe_slice._three_samples(subject)[0])
    ends = torch.from_numpy(np.stack([data["grid_boundary_u0"], data["grid_boundary_v0"]], axis=1))
    with torch.no_grad():
        top = subject.module(plane.points(ends).float()).topk(2, dim=1).values
    assert float((top[:, 0] - top[:, 1]).mean()) < 0.02  # two classes tie on the boundary, up to the grid
    assert "sampled" in figure.caption
    assert "exact" in figure.caption
    shares = [value for name, value in found.items() if name.startswith("share of class")]
    assert shares == [float(np.mean(data["grid_class"] == int(label))) for label in sorted(set(data["mark_label"]))]
    assert "<image" in figure.svg()


def test_the_search_starts_where_few_units_switch():
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(64, 4000), nn.ReLU(), nn.Linear(4000, 3))
    graph = capture(wide, digits().train.x[:4])
    plane = Plane.through(*digits().train.x[:3])
    shares = [probe_slice._first_share(graph, plane, seconds) for seconds in (0.0, 1e6)]
    assert shares[0] < shares[1] == probe_slice.FIRST


def test_a_sigmoid_at_the_end_divides_at_one_half():
    torch.manual_seed(0)
    data = regression()
    data = Dataset("two classes", Split(data.train.x, (data.train.y > 1.5).long()), None, "classification", ("a", "b"))  # type: ignore[operator]
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1), nn.Sigmoid())
    with torch.no_grad():
        net[2].bias.copy_(-net[:3](data.train.x).median())
    found = values(slice_map.run(subject_of(net, data)))
    assert 0 < found["share of class a"] < 1


def test_the_same_seed_gives_the_same_plane():
    first, second, other = (
        slice_map.run(subject_of(perceptron(nn.ReLU()), digits(), seed=seed)).figures[0].data for seed in (3, 3, 4)
    )
    assert np.array_equal(first["u"], second["u"])
    assert not np.array_equal(first["mark_v"], other["mark_v"])


def test_data_without_three_real_vectors_is_refused():
    net = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    x = torch.rand(10, 1)
    with pytest.raises(BadInput, match="three samples of at least two real numbers"):
        slice_map.run(subject_of(net, Dataset("one number", Split(x, x[:, 0]), None, "regression")))


def test_plane_of_the_probe_goes_through_its_samples():
    subject = subject_of(perceptron(nn.ReLU()), digits())
    x, labels = probe_slice._three_samples(subject)
    plane = Plane.through(*x)
    torch.testing.assert_close(plane.points(plane.marks).float(), x)
    rows = [(digits().test or digits().train).x.eq(sample).all(1).nonzero()[0, 0] for sample in x]
    assert [str(int((digits().test or digits().train).y[row])) for row in rows] == list(labels)
