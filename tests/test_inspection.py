"""`inspect` on networks, data and losses of the user's own."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from corollary.base.errors import BadInput, CorollaryError
from corollary.base.registry import registry
from corollary.data import digits
from corollary.engine import TrainingRecord
from corollary.evidence import Finding, Measurement, Need, Training, probe
from corollary.inspection import as_dataset, inspect


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))


@pytest.fixture
def own_probe():
    """Registers probes for a test and forgets them after it."""
    before = dict(registry("probes")._objects)
    yield probe
    registry("probes")._objects.clear()
    registry("probes")._objects.update(before)


def test_module_and_tensors_of_ones_own_are_left_as_they_were():
    model = small().train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, y = torch.rand(80, 64), torch.randint(10, (80,))
    report = inspect(model, (x, y), budget=20)
    assert model.training
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert {section.probe.name for section in report.sections} >= {"at-a-glance"}
    assert report._repr_html_().startswith("<style>")


def test_every_probe_answers_on_the_digits():
    record = TrainingRecord()
    for step in range(0, 400, 10):
        accuracy = {"train_accuracy": min(1.0, step / 50), "test_accuracy": min(0.97, step / 90)}
        record.log(step, distance=1 + step**0.5, per_sample_loss=torch.rand(20) / (1 + step), loss=1.0, **accuracy)
    report = inspect(
        small(),
        digits(),
        budget=240,
        debug=True,
        training=Training("sgd", 0.1, 32, epochs=10),
        record=record,
        checkpoints=[small(), small()],
    )
    assert report.skipped == {}
    assert {section.probe.name for section in report.sections} == set(registry("probes").names())


def test_own_loss_is_used():
    report = inspect(
        small(), digits(), probes=["at-a-glance"], loss=lambda output, target: output.sum(1).mean() * 0 + 7
    )
    values = {m.name: m for section in report.sections for m in section.finding.measurements}
    assert values["loss"].value == pytest.approx(7)


def test_regression_and_unlabelled_data(own_probe):
    own_probe("t", room="mine", title="T", question="?", needs=Need.FORWARD, data="targets")(lambda _: Finding(()))
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    x = torch.rand(50, 3)
    report = inspect(model, (x, x.sum(1)), budget=20)
    names = {m.name for section in report.sections for m in section.finding.measurements}
    assert "loss" in names
    assert "accuracy" not in names
    assert inspect(model, x, probes=["t"]).skipped == {"T": "it needs targets: give the data set a y"}


def test_float64_and_numpy_data_follow_the_network():
    model = small().double()
    report = inspect(model, (torch.rand(30, 64).numpy(), torch.randint(10, (30,)).numpy()), probes=["at-a-glance"])
    assert "float64" in [m.value for section in report.sections for m in section.finding.measurements]


def test_flat_data_is_given_to_an_image_network_with_a_note():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 10))
    report = inspect(model, digits(), probes=["at-a-glance", "conditioning"], budget=20)
    assert report.notes == ("Samples of shape [64] were given to the network as [1, 8, 8].",)
    assert report.skipped == {}  # and it is captured with the shape it takes


def test_failing_probe_is_skipped_with_its_reason_and_debug_lets_it_through(own_probe):
    @own_probe("fails", room="mine", title="Fails", question="?", needs=Need.WEIGHTS)
    def fails(subject):
        raise KeyError("odd")

    assert inspect(small(), probes=["fails"]).skipped == {"Fails": "it failed with KeyError: 'odd'"}
    with pytest.raises(KeyError):
        inspect(small(), probes=["fails"], debug=True)


def test_registered_probe_runs_within_its_share_of_the_budget(own_probe):
    shares = []

    def spend(subject):
        shares.append(subject.budget.remaining())
        return Finding((Measurement("one", 1, "One."),))

    own_probe("a", room="mine", title="A", question="?", needs=Need.WEIGHTS)(spend)
    own_probe("b", room="mine", title="B", question="?", needs=Need.WEIGHTS)(spend)
    inspect(small(), probes=["a", "b"], budget=10)
    assert 4 < shares[0] <= 5
    assert shares[0] < shares[1] <= 10
    assert inspect(small(), probes=["a"], budget=0).skipped["A"].startswith("the budget of 0 s was spent")


def test_network_without_gradients_keeps_its_other_probes(own_probe):
    own_probe("g", room="mine", title="G", question="?", needs=Need.GRADIENTS)(lambda subject: Finding(()))
    frozen = small().requires_grad_(False)
    report = inspect(frozen, digits(), probes=["g", "at-a-glance"])
    assert "no trainable parameters" in report.skipped["G"]
    assert len(report.sections) == 1


def test_report_is_saved_with_its_figures(tmp_path):
    report = inspect(small(), digits(), probes=["at-a-glance"])
    report.save(tmp_path / "r.html")
    report.save(tmp_path / "r.json")
    assert {path.name for path in report.save_figures(tmp_path)} == {"reliability.svg", "reliability.csv"}
    with pytest.raises(BadInput, match=r"saved as .html or .json"):
        report.save(tmp_path / "r.pdf")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "data of type int was given"),
        ((torch.zeros(2, 3), "labels"), "data of type tuple was given"),
        (torch.full((2, 3), float("inf")), "infinite"),
    ],
)
def test_unusable_data_is_refused(data, message):
    with pytest.raises(BadInput, match=message):
        as_dataset(data)


def test_network_with_two_outputs_is_refused_with_advice():
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(CorollaryError, match="wrap it in a module that picks one"):
        inspect(Two(), (torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)), probes=["at-a-glance"])


def test_samples_take_the_shape_that_a_saved_program_states(tmp_path):
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU())
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(module, (torch.zeros(4, 1, 8, 8),), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, tmp_path / "net.pt2")
    report = inspect(tmp_path / "net.pt2", digits(), probes=["slice-map"], budget=20)
    assert report.notes == ("Samples of shape [64] were given to the network as [1, 8, 8].",)
    assert report.skipped == {}


def test_how_it_was_trained_reaches_the_probes(own_probe, tmp_path):
    def seen(subject):
        settings = f"{subject.training}; {len(subject.record)} steps; {len(subject.checkpoints)} others"
        return Finding((), notes=(settings,))

    own_probe("t", room="mine", title="T", question="?", needs=Need.WEIGHTS)(seen)
    other = small()
    record = TrainingRecord()
    record.log(0, loss=1.0)
    record.log(1, loss=0.5)
    record.save(tmp_path / "record.npz")
    save_file({name: t.contiguous() for name, t in other.state_dict().items()}, tmp_path / "other.safetensors")
    report = inspect(
        small(),
        probes=["t"],
        training=Training("sgd", 0.1, 32, momentum=0.9),
        record=tmp_path / "record.npz",
        checkpoints=[tmp_path / "other.safetensors", other],
    )
    assert report.sections[0].finding.notes == (
        "sgd, learning rate 0.1, batch size 32, momentum 0.9; 2 steps; 2 others",
    )
    assert report.facts["checkpoints"] == "2 of the same architecture"


def test_a_checkpoint_of_another_architecture_is_refused():
    with pytest.raises(BadInput, match=r"another architecture.*3\.weight"):
        inspect(small(), checkpoints=[nn.Sequential(*small(), nn.Linear(10, 10))], probes=[])


def test_checkpoints_of_a_network_with_batch_normalisation_may_come_from_a_program(tmp_path):
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    program = torch.export.export(net, (torch.rand(4, 4),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, tmp_path / "net.pt2")
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    for checkpoint in (tmp_path / "net.pt2", tmp_path / "net.safetensors", net):
        for given in (tmp_path / "net.pt2", net):
            report = inspect(given, checkpoints=[checkpoint], probes=[])
            assert report.facts["checkpoints"] == "1 of the same architecture"


def test_a_file_that_is_no_record_is_refused(tmp_path):
    (tmp_path / "r.npz").write_bytes(b"no archive")
    with pytest.raises(BadInput, match="training record"):
        inspect(small(), record=tmp_path / "r.npz", probes=[])


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"optimizer": "lion"}, "optimizer"),
        ({"learning_rate": 0.0}, "learning rate"),
        ({"batch_size": 0}, "batch"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -1.0}, "decay"),
        ({"epochs": 0}, "epoch"),
    ],
)
def test_settings_out_of_range_are_refused(settings, word):
    with pytest.raises(BadInput, match=word):
        Training(**settings)
