import numpy as np
import pytest
import torch
from torch import nn

from corollary.base.errors import CannotCapture, NothingMeasured
from corollary.base.seeds import Seeds
from corollary.data import Dataset, Split, digits
from corollary.dynamics.oscillation import benign_oscillation_sweep
from corollary.dynamics.probe_oscillation import oscillation
from corollary.engine import TrainingRecord
from corollary.evidence import Budget, Subject
from corollary.evidence.battery import check_probe


def subject(record, data=None):
    net = nn.Linear(64, 10).eval()
    program = CannotCapture("not captured in this test")
    return Subject("net", net, program, data, nn.functional.cross_entropy, Seeds(0), Budget(5.0), record=record)


def record_of(**columns):
    record = TrainingRecord()
    for step, row in enumerate(zip(*columns.values(), strict=True)):
        record.log(step, **{name: np.asarray(value) for name, value in zip(columns, row, strict=True)})
    return record


def values(finding):
    return {measurement.name: measurement.value for measurement in finding.measurements}


def alternating(steps=40, samples=6):
    return 1 + 0.5 * (-1.0) ** np.arange(steps)[:, None] * np.ones(samples)


def two_samples():
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    return Dataset("two", Split(x, torch.tensor([0, 1, 0, 1, 0, 1])), None, "classification")


def test_keeps_the_promises_of_a_probe():
    check_probe(oscillation, subject(record_of(per_sample_loss=alternating())))
    check_probe(oscillation, subject(record_of(residual=alternating() - 1)))


def test_period_two_is_seen_in_losses():
    found = values(oscillation.run(subject(record_of(per_sample_loss=alternating()))))
    assert found == {"turns of a sample's loss": 1.0, "oscillating samples": 1.0}


def test_noise_and_descent_are_no_oscillation():
    losses = np.random.default_rng(0).random((300, 40)) + 1
    assert values(oscillation.run(subject(record_of(per_sample_loss=losses))))["oscillating samples"] == 0
    falling = np.exp(-np.arange(30.0))[:, None] * np.ones(4)
    assert values(oscillation.run(subject(record_of(per_sample_loss=falling))))["turns of a sample's loss"] == 0


def test_residuals_on_record_are_preferred_to_losses():
    found = oscillation.run(subject(record_of(per_sample_loss=alternating(), residual=alternating() - 1)))
    assert values(found)["sign changes"] == 1.0
    assert values(found)["oscillating share"] == 1.0
    assert values(found)["residuals summed up"] == pytest.approx(0)


def test_outputs_are_held_against_the_labels_of_the_training_set():
    outputs = alternating() * np.array([-1, 1, -1, 1, -1, 1])
    found = values(oscillation.run(subject(record_of(output=outputs), two_samples())))
    assert found["sign changes"] == 1.0
    with pytest.raises(NothingMeasured, match="cannot be compared"):
        oscillation.run(subject(record_of(output=outputs[:, :4]), two_samples()))
    with pytest.raises(NothingMeasured, match="pass targets"):
        oscillation.run(subject(record_of(output=outputs)))


def test_a_run_above_the_edge_oscillates_and_one_below_does_not():
    small = {"dimension": 100, "samples": 30, "test_samples": 20, "steps": 900, "seeds": 2}
    shares = [
        values(oscillation.run(subject(benign_oscillation_sweep((multiple,), **small).record)))["oscillating share"]
        for multiple in (0.5, 1.2)
    ]
    assert shares[0] < 0.05 < 0.3 < shares[1]


def test_without_a_record_it_says_what_to_give():
    with pytest.raises(NothingMeasured, match="--record FILE"):
        oscillation.run(subject(None, digits()))
    with pytest.raises(NothingMeasured, match="Log 'per_sample_loss'"):
        oscillation.run(subject(record_of(loss=[1.0, 2.0])))
    with pytest.raises(NothingMeasured, match="too little"):
        oscillation.run(subject(record_of(per_sample_loss=alternating(2))))


def test_samples_that_never_change_are_counted_out():
    losses = alternating()
    losses[:, 0] = 1.0
    coverage = oscillation.run(subject(record_of(per_sample_loss=losses))).measurements[0].coverage
    assert (coverage.measured, coverage.of) == (5, 6)
