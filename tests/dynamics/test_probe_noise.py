"""What the probe says of a small trained network is what its settings, its record and its start say."""

import pytest
import torch
from torch import nn

from corollary.base.errors import CannotCapture, NothingMeasured
from corollary.base.seeds import Seeds
from corollary.data import digits
from corollary.dynamics.probe_noise import noise
from corollary.engine import TrainingRecord, fit, population, seeded
from corollary.evidence import Budget, Subject, Training
from corollary.evidence.battery import check_probe
from corollary.linalg import ntk_matrix

SGD = Training("sgd", learning_rate=0.1, batch_size=32, momentum=0.9)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10))


def values_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@pytest.fixture(scope="module")
def trained():
    start = seeded(network, 0)
    train = digits().train

    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    done = fit(start, (train.x, train.y), optimizer=optimizer, steps=120, batch_size=32, record_every=10)
    return start.eval(), done.module, done.record


def subject(module, **known) -> Subject:
    given = {"data": digits(), "training": SGD, "record": None, "checkpoints": ()} | known
    return Subject(
        name="a network",
        module=module,
        program=CannotCapture("not needed"),
        loss=nn.functional.cross_entropy,
        seeds=Seeds(0),
        budget=Budget(20.0),
        **given,
    )


def by_name(finding) -> dict[str, object]:
    return {m.name: m.value for m in finding.measurements}


def test_everything_it_can_be_told(trained):
    start, module, record = trained
    other = values_of(seeded(network, 7))
    asked = subject(module, record=record, checkpoints=(other, values_of(start)))
    check_probe(noise, asked)
    finding = noise.run(asked)
    found = by_name(finding)
    assert found["temperature of SGD"] == pytest.approx(0.1 / 32 / 0.1)  # momentum 0.9 is ten times the rate
    moved, norm = (
        torch.cat([p.detach().double().flatten() for p in parts])
        for parts in (
            [a - b for a, b in zip(module.parameters(), start.parameters(), strict=True)],
            list(start.parameters()),
        )
    )
    change = float(moved.norm() / norm.norm())
    assert found["relative weight change"] == pytest.approx(change, rel=1e-4)
    assert found["regime"] == ("lazy" if change < 0.1 else "feature learning" if change >= 0.4 else "between the two")
    assert found["weight change at twice the temperature"] == f"{change:.3g} to {2 * change:.3g}"
    assert found["weight change at half the temperature"] == f"{change / 2:.3g} to {change:.3g}"
    x, _ = asked.sample(24, "train")
    kernels = [ntk_matrix(net, x, outputs="trace") for net in (start, module)]
    assert found["relative kernel change"] == pytest.approx(
        float((kernels[1] - kernels[0]).norm() / kernels[0].norm()), rel=1e-3
    )
    train = digits().train
    with torch.no_grad():
        wrong = (module(train.x).argmax(1) != train.y).double().mean()
    assert found["training points left to fit"] == pytest.approx(float(wrong))
    assert sum(m.headline for m in finding.measurements) == 1


def test_settings_alone_give_the_temperature_and_say_what_else_to_give(trained):
    _, module, _ = trained
    finding = noise.run(subject(module))
    assert set(by_name(finding)) == {"temperature of SGD", "training points left to fit"}
    assert any("--record" in note for note in finding.notes)
    assert not finding.figures


def test_another_runs_start_is_no_start(trained):
    _, module, record = trained
    finding = noise.run(subject(module, record=record, checkpoints=(values_of(seeded(network, 3)),)))
    assert "relative kernel change" not in by_name(finding)
    assert any("initial weights are not known" in note for note in finding.notes)


def test_the_record_of_another_network_is_noticed(trained):
    _, _, record = trained
    finding = noise.run(subject(seeded(network, 3).eval(), record=record))
    assert any("the record of another run" in note for note in finding.notes)


def test_without_settings_or_record_nothing_is_known(trained):
    _, module, _ = trained
    with pytest.raises(NothingMeasured, match="--learning-rate, --batch-size") as told:
        noise.run(subject(module, training=Training()))
    assert "--record FILE" in str(told.value)
    with pytest.raises(NothingMeasured, match="trained with adam"):
        noise.run(subject(module, training=Training("adam", learning_rate=1e-3, batch_size=32)))


def test_it_needs_neither_data_nor_labels(trained):
    start, module, record = trained
    finding = noise.run(subject(module, data=None, record=record, checkpoints=(values_of(start),)))
    assert "relative weight change" in by_name(finding)
    assert sum("--data" in note for note in finding.notes) == 2


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"loss": 1.0}, "no distance and no weight_norm"),
        ({"distance": torch.zeros(2), "weight_norm": torch.ones(2)}, "of several networks"),
    ],
)
def test_a_record_that_cannot_serve_is_told(trained, columns, message):
    _, module, _ = trained
    record = TrainingRecord()
    record.log(0, **columns)
    assert any(message in note for note in noise.run(subject(module, record=record)).notes)
    late = TrainingRecord()
    late.log(5, distance=1.0, weight_norm=2.0)
    assert any("at step 0" in note for note in noise.run(subject(module, record=late)).notes)


def test_the_record_of_a_member_of_a_population_serves():
    train = digits().train
    found = population(lambda: nn.Linear(64, 10), (train.x, train.y), size=2, steps=20, batch_size=32)
    finding = noise.run(subject(found.member(1), record=found.record.member(1)))
    assert not any("another run" in note for note in finding.notes)
    assert 0 < by_name(finding)["relative weight change"] < 10
