"""The probes "batch" and "spectrum" on a network like the demo's, and on losses whose Hessian is known."""

import pytest
import torch
from torch import nn

from corollary.base.errors import NothingMeasured
from corollary.base.seeds import Seeds
from corollary.data import Dataset, Split, digits
from corollary.demo import network
from corollary.dynamics import probe_batch, probe_spectrum
from corollary.dynamics.losses import half_square
from corollary.dynamics.probe_batch import batch_probe
from corollary.dynamics.probe_spectrum import spectrum_probe
from corollary.engine import fit, seeded
from corollary.evidence import Budget, Finding, Subject, Training
from corollary.evidence.battery import check_probe
from corollary.graph import capture


def subject(net: nn.Module, data: Dataset, *, seconds: float = 4.0, loss=None, **more) -> Subject:
    program = capture(net.eval(), data.train.x[:4])
    loss = loss or nn.CrossEntropyLoss()
    return Subject("net", net, program, data, loss, Seeds(0), Budget(seconds), **more)


@pytest.fixture(scope="module")
def demo() -> tuple[nn.Module, Dataset]:
    data = digits()
    assert data.train.y is not None
    trained = fit(seeded(network, 0), (data.train.x, data.train.y), epochs=2, batch_size=64)
    return trained.module.eval(), data


def values(finding: Finding) -> dict[str, float]:
    return {m.name: float(m.value) for m in finding.measurements if isinstance(m.value, (int, float))}


def test_promises(demo, monkeypatch):
    monkeypatch.setattr(probe_batch, "SIZES", (8, 64))
    monkeypatch.setattr(probe_batch, "REPEATS", (4,))
    check_probe(spectrum_probe, subject(*demo, seconds=2, training=Training("sgd", 0.1, 32, 0.9)))
    for training in (Training("adam", 1e-3, 32), Training("sgd", 0.1, 32, 0.9)):
        check_probe(batch_probe, subject(*demo, seconds=2, training=training))


def test_recommended_rates_scale_from_yours(demo, monkeypatch):
    monkeypatch.setattr(probe_batch, "SIZES", (8, 64))
    monkeypatch.setattr(probe_batch, "REPEATS", (8,))
    sgd = values(batch_probe.run(subject(*demo, training=Training("sgd", 0.1, 16))))
    assert sgd["learning rate for a batch of 16"] == pytest.approx(0.1)
    grown = [sgd[f"learning rate for a batch of {size}"] for size in (16, 32, 64, 128)]
    assert grown == sorted(grown)
    limit = sgd["largest stable learning rate, batch 16"]
    assert sgd["learning rate over the largest stable one"] == pytest.approx(0.1 / limit)
    assert limit < 2 / sgd["largest eigenvalue, all data"]
    adam = values(batch_probe.run(subject(*demo, training=Training("adam", 1e-3, 2))))
    ratio = adam["learning rate for a batch of 4"] / 1e-3
    assert 1 <= ratio <= 2**0.5 + 0.01
    assert not any("stable" in name for name in adam)
    unknown = batch_probe.run(subject(*demo))
    assert any("not known (--batch-size)" in note for note in unknown.notes)
    assert "largest stable learning rate, for a batch of 128" in values(unknown)


def test_a_short_budget_measures_less_and_says_so(demo, monkeypatch):
    monkeypatch.setattr(probe_batch, "LANCZOS_SECONDS", 1.0)
    finding = batch_probe.run(subject(*demo))
    assert "6 batches each of 8 from 128 of 1400" in finding.notes[0]


def quadratic(samples: int = 600) -> tuple[nn.Module, Dataset, torch.Tensor]:
    """A linear model with half the mean square: its Hessian is the second moment of its inputs."""
    torch.manual_seed(0)
    x = torch.randn(samples, 12) * torch.tensor([3.0, 2.0, *[0.5] * 10])
    net = nn.Linear(12, 1, bias=False)
    y = net(x).detach() + 0.1 * torch.randn(samples, 1)
    return net, Dataset("line", Split(x, y), None, "regression"), torch.linalg.eigvalsh(x.T @ x / samples)


def test_the_spectrum_of_a_known_hessian(monkeypatch):
    net, data, exact = quadratic()
    monkeypatch.setattr(probe_spectrum, "OUTLIERS", 3)
    rate = 2 / 5.0  # one direction, of curvature near 9, lies beyond
    found = values(spectrum_probe.run(subject(net, data, loss=half_square, training=Training("sgd", rate))))
    assert found["largest eigenvalue"] == pytest.approx(float(exact[-1]), rel=1e-4)
    assert found["smallest eigenvalue"] == pytest.approx(float(exact[0]), rel=1e-3)
    assert found["trace"] == pytest.approx(float(exact.sum()), rel=0.02)
    assert found["negative share of the curvature"] == pytest.approx(0, abs=1e-5)
    assert found["flat directions"] == pytest.approx(0, abs=1e-6)
    assert found["directions beyond stability"] == 1
    damped = values(
        spectrum_probe.run(subject(net, data, loss=half_square, training=Training("sgd", rate, momentum=0.9)))
    )
    assert damped["directions beyond stability"] == 0


def test_a_loss_without_upward_curvature_and_too_few_samples():
    net, data, _ = quadratic(40)
    small = Dataset("few", Split(data.train.x[:10], data.train.y[:10]), None, "regression")  # type: ignore[index]
    with pytest.raises(NothingMeasured, match="too few"):
        batch_probe.run(subject(net, small, loss=half_square))
    with pytest.raises(NothingMeasured, match="every learning rate"):
        batch_probe.run(subject(net, data, loss=lambda out, target: -half_square(out, target)))
    unlabelled = Dataset("bare", Split(data.train.x), None, "unlabelled")
    for probe in (batch_probe, spectrum_probe):
        with pytest.raises(NothingMeasured, match="targets"):
            probe.run(subject(net, unlabelled, loss=half_square))
