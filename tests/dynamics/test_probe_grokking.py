from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from corollary.base.errors import CannotCapture, NothingMeasured
from corollary.base.seeds import Seeds
from corollary.data import Dataset, Split, digits
from corollary.dynamics.probe_grokking import grokking
from corollary.engine import TrainingRecord, fit
from corollary.evidence import Budget, Subject
from corollary.evidence.battery import check_probe


@pytest.fixture(scope="module")
def trained():
    """The demo's network after a few epochs, with the record of its training."""
    data = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = nn.Sequential(
            *(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 10))
        )
    return fit(
        start,
        (data.train.x, data.train.y),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-3),
        epochs=6,
        batch_size=64,
        validation=(data.test.x, data.test.y),
        record_every=1,
    )


def subject(net, data, record=None):
    loss = nn.functional.cross_entropy
    return Subject("net", net, CannotCapture("not asked for"), data, loss, Seeds(0), Budget(10.0), record=record)


def values(finding):
    return {measurement.name: measurement.value for measurement in finding.measurements}


def record_of(train, test):
    record = TrainingRecord()
    for step, (fitted, tested) in enumerate(zip(train, test, strict=True)):
        record.log(step, train_accuracy=fitted, test_accuracy=tested)
    return record


def homogeneous(*widths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
        with torch.no_grad():
            layers[-2].weight.copy_(torch.randn(outputs, inputs, generator=generator) / inputs**0.5)
    return nn.Sequential(*layers[:-1]).eval()


def gaussian(n=300, d=8):
    x = torch.randn(2 * n, d, generator=torch.Generator().manual_seed(1))
    return Dataset("gaussian", Split(x[:n], torch.zeros(n, 3)), Split(x[n:], torch.zeros(n, 3)), "regression")


def test_keeps_the_promises_of_a_probe(trained):
    check_probe(grokking, subject(trained.module, digits(), trained.record))
    check_probe(grokking, subject(trained.module, digits()))


def test_what_it_says_of_a_record():
    record = record_of([0.4, 1.0, 1.0, 1.0], [0.3, 0.5, 0.9, 0.97])
    finding = grokking.run(subject(homogeneous(64, 16, 10), digits(), record))
    assert values(finding)["grokking delay"] == 2
    assert [m.name for m in finding.measurements if m.headline] == ["grokking delay"]
    curves = next(figure for figure in finding.figures if figure.name == "grokking-delay")
    assert curves.data["test"].tolist() == [0.3, 0.5, 0.9, 0.97]


def test_a_run_that_never_generalised_is_told_and_drawn():
    finding = grokking.run(subject(homogeneous(64, 16, 10), digits(), record_of([0.4, 1.0], [0.3, 0.5])))
    assert "grokking delay" not in values(finding)
    assert any("the test accuracy 0.500" in note for note in finding.notes)
    assert "grokking-delay" in [figure.name for figure in finding.figures]
    assert [m.name for m in finding.measurements if m.headline] == ["affine share of the function"]


def test_batch_accuracies_and_records_without_accuracies_are_noted(trained):
    finding = grokking.run(subject(trained.module, digits(), trained.record))
    assert any("single training batches" in note for note in finding.notes)
    losses = TrainingRecord()
    losses.log(0, loss=1.0)
    finding = grokking.run(subject(trained.module, digits(), losses))
    assert any("Not measured, grokking delay" in note for note in finding.notes)


def test_an_affine_network_is_all_affine():
    net = nn.Linear(8, 3).eval()
    found = values(grokking.run(subject(net, gaussian())))
    assert found["affine share of the function"] == pytest.approx(1, abs=1e-6)


def test_a_two_layer_network_without_biases_has_a_linear_odd_part():
    finding = grokking.run(subject(homogeneous(8, 32, 3), gaussian()))
    odd = next(m for m in finding.measurements if m.name == "odd fraction of the function")
    assert 0.2 < odd.value < 0.9
    assert "so it is linear" in odd.meaning
    deep = grokking.run(subject(homogeneous(8, 32, 32, 3), gaussian()))
    meaning = next(m.meaning for m in deep.measurements if m.name == "odd fraction of the function")
    assert "not linear alone" in meaning


def test_a_network_with_biases_has_no_odd_fraction(trained):
    finding = grokking.run(subject(trained.module, digits()))
    assert "odd fraction of the function" not in values(finding)
    assert any("without biases" in note for note in finding.notes)
    assert any("--record" in note for note in finding.notes)


def test_what_all_logits_share_is_not_counted():
    """A common term decides nothing, and would drown the affine part."""

    class Offset(nn.Module):
        def forward(self, x):
            return x[:, :10] + 100 * x.square().sum(1, keepdim=True)

    found = values(grokking.run(subject(Offset(), digits())))
    assert found["affine share of the function"] > 0.999


def test_without_a_test_part_two_halves_are_used():
    data = gaussian()
    alone = Dataset("gaussian", data.train, None, "regression")
    finding = grokking.run(subject(nn.Linear(8, 3).eval(), alone))
    share = next(m for m in finding.measurements if m.name == "affine share of the function")
    assert share.value == pytest.approx(1, abs=1e-6)
    assert share.coverage is not None
    assert (share.coverage.measured, share.coverage.of) == (300, 300)


def test_what_cannot_be_asked_is_declined():
    tokens = torch.arange(60).reshape(20, 3) % 5
    data = Dataset("tokens", Split(tokens), None, "unlabelled")
    net = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 2)).eval()
    with pytest.raises(NothingMeasured, match="not real numbers"):
        grokking.run(subject(net, data))
    finding = grokking.run(subject(net, data, record_of([1.0], [1.0])))  # the record speaks for itself
    assert values(finding) == {"grokking delay": 0.0}
    few = Dataset("few", Split(torch.randn(9, 8)), None, "unlabelled")
    finding = grokking.run(subject(homogeneous(8, 4, 3), few))
    assert any("twice as many samples" in note for note in finding.notes)
    assert np.isfinite(values(finding)["odd fraction of the function"])
