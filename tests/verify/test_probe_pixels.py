import dataclasses

import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.base.seeds import Seeds
from corollary.data import Dataset, Split, digits
from corollary.engine import fit
from corollary.evidence import Budget, Subject
from corollary.evidence.battery import check_probe
from corollary.graph import capture
from corollary.verify.probe_pixels import pixels


@pytest.fixture(scope="module")
def net():
    data = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return fit(start, (data.train.x, data.train.y), epochs=10, batch_size=64).module


def subject(net, data, seconds=60.0):
    return Subject(
        name="net",
        module=net,
        program=capture(net, data.train.x[:2]),
        data=data,
        loss=nn.functional.cross_entropy,
        seeds=Seeds(0),
        budget=Budget(seconds),
    )


def values(finding):
    return {measurement.name: measurement.value for measurement in finding.measurements}


def test_keeps_the_promises_of_a_probe(net):
    check_probe(pixels, subject(net, digits(image=True)))


def test_what_it_says(net):
    finding = pixels.run(subject(net, digits(image=True)))
    found = values(finding)
    assert 1 <= found["fewest pixels"] <= found["pixels to change the answer"] <= 64
    assert found["queries used"] > 20 * found["queries to change the answer"]
    columns = finding.figures[0].data
    assert int(columns["is_changed"].sum()) == found["fewest pixels"]
    assert columns["saliency"].sum() == pytest.approx(1.0, abs=1e-5)


def test_flat_pictures_are_known_by_their_names(net):
    flat, shaped = (values(pixels.run(subject(net, digits(image=image)))) for image in (False, True))
    assert flat == shaped


def test_black_and_white_are_those_of_the_data(net):
    data = digits(image=True)

    def shifted(part):
        return Split(4 * part.x - 2, part.y)  # exact in floating point, and so is the way back

    scaled = dataclasses.replace(data, train=shifted(data.train), test=shifted(data.test))
    undo = nn.Sequential(Undo(), net)
    assert values(pixels.run(subject(undo, scaled))) == values(pixels.run(subject(net, data)))


class Undo(nn.Module):
    def forward(self, x):
        return (x + 2) / 4


def test_a_short_budget_is_said(net):
    finding = pixels.run(subject(net, digits(image=True), seconds=0.15))
    assert "budget" in " ".join(finding.notes)


@pytest.mark.parametrize(
    ("x", "words"),
    [(torch.rand(30, 64), "asked of images"), (torch.rand(30, 1, 400, 400), "a budget of their own")],
)
def test_what_is_no_small_picture_is_declined(net, x, words):
    data = Dataset("other", Split(x), None, "unlabelled")
    case = dataclasses.replace(subject(net, digits(image=True)), data=data)
    with pytest.raises(BadInput, match=words):
        pixels.run(case)


def test_regression_is_declined(net):
    data = Dataset("other", Split(torch.rand(30, 1, 8, 8), torch.rand(30, 10)), None, "regression")
    with pytest.raises(BadInput, match="asked of classifiers"):
        pixels.run(subject(net, data))
