import dataclasses

import pytest
import torch
from torch import nn

from corollary.base.errors import CannotCapture, NothingMeasured
from corollary.base.seeds import Seeds
from corollary.data import Dataset, Split, digits
from corollary.dynamics.learning_rate_window import ntk_lambda
from corollary.dynamics.losses import half_square
from corollary.dynamics.probe_learning_rate_window import learning_rate_window
from corollary.engine import TrainingRecord, fit
from corollary.evidence import Budget, Subject, Training
from corollary.evidence.battery import check_probe
from corollary.linalg import ggn

RATE = 0.05


@pytest.fixture(scope="module")
def net():
    data = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    sgd = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=RATE)}
    return fit(start, (data.train.x, data.train.y), epochs=2, batch_size=64, **sgd).module.eval()


def subject(net, data=None, seconds=20.0, loss=nn.functional.cross_entropy, **known):
    program = CannotCapture("not captured in this test")
    return Subject("net", net, program, data or digits(), loss, Seeds(0), Budget(seconds), **known)


def values(finding):
    return {measurement.name: measurement.value for measurement in finding.measurements}


def record_of(losses, name="train_loss"):
    record = TrainingRecord()
    for step, loss in enumerate(losses):
        record.log(step, **{name: loss})
    return record


def test_keeps_the_promises_of_a_probe(net):
    training = Training("sgd", learning_rate=RATE, batch_size=32, momentum=0.9)
    check_probe(learning_rate_window, subject(net, training=training, record=record_of([2, 5, 1])))


def test_the_eigenvalue_is_that_of_the_gauss_newton_matrix(net):
    data = digits()
    few = dataclasses.replace(data, train=Split(data.train.x[:40], data.train.y[:40]))
    found = values(learning_rate_window.run(subject(net, few)))
    dense = ggn(net, nn.functional.cross_entropy, (few.train.x, few.train.y)).to_dense()
    top = float(torch.linalg.eigvalsh(dense)[-1])
    assert found["top eigenvalue"] == pytest.approx(top, rel=1e-3)
    assert found["catapult window, lower end"] == pytest.approx(2 / top, rel=1e-3)
    assert found["catapult window, upper end"] == 2 * found["catapult window, lower end"]


def test_a_square_loss_gives_the_tangent_kernel():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=generator), torch.randn(30, 1, generator=generator)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).eval()
    finding = learning_rate_window.run(
        subject(net, Dataset("drawn", Split(x, y), None, "regression"), loss=half_square)
    )
    assert values(finding)["top eigenvalue"] == pytest.approx(ntk_lambda(net, x), rel=1e-3)
    assert any("tangent kernel" in note for note in finding.notes)


def test_the_rate_stands_beside_the_limit_of_its_momentum(net):
    plain = learning_rate_window.run(subject(net, training=Training("sgd", learning_rate=RATE)))
    heavy = learning_rate_window.run(subject(net, training=Training("sgd", learning_rate=RATE, momentum=0.9)))
    assert values(plain)["learning rate times top eigenvalue"] == pytest.approx(RATE * values(plain)["top eigenvalue"])
    limits = [
        next(m.reference.high for m in finding.measurements if m.name == "learning rate times top eigenvalue")
        for finding in (plain, heavy)
    ]
    assert limits == [2, 3.8]
    assert any("momentum 0.9" in note for note in heavy.notes)


def test_small_batches_have_their_own_number(net):
    training = Training("sgd", learning_rate=RATE, batch_size=16)
    found = values(learning_rate_window.run(subject(net, training=training)))
    assert found["the same, batches of 16"] > found["learning rate times top eigenvalue"]


def test_the_rate_of_adam_is_not_compared(net):
    finding = learning_rate_window.run(subject(net, training=Training("adam", learning_rate=1e-3)))
    assert "learning rate times top eigenvalue" not in values(finding)
    assert any("adam rescales" in note for note in finding.notes)


def test_a_record_is_searched_for_catapults(net):
    found = learning_rate_window.run(subject(net, record=record_of([2, 9, 1, 0.5])))
    assert values(found)["catapults on record"] == 1
    assert [figure.name for figure in found.figures] == ["learning-rate-window", "catapults"]
    noisy = learning_rate_window.run(subject(net, record=record_of([2, 9, 1], name="loss")))
    assert any("losses of batches only" in note for note in noisy.notes)
    other = learning_rate_window.run(subject(net, record=record_of([0.5, 0.6], name="accuracy")))
    assert any("Not searched" in note for note in other.notes)
    assert any("--record" in note for note in learning_rate_window.run(subject(net)).notes)


def test_little_time_means_fewer_samples_and_says_so(net):
    finding = learning_rate_window.run(subject(net, seconds=1e-3))
    coverage = finding.measurements[0].coverage
    assert coverage.measured == 64
    assert coverage.of == len(digits().train.x)


def test_a_network_that_does_not_react_is_refused():
    net = nn.Sequential(nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(-1.0)
        net[2].bias.requires_grad_(False)
    with pytest.raises(NothingMeasured, match="does not react"):
        learning_rate_window.run(subject(net.eval()))
