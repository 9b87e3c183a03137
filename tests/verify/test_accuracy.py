"""Certified accuracy against the exact distances of linear classifiers, and the order that its bounds must have."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.data import Dataset, Split
from corollary.graph import capture
from corollary.verify.accuracy import CertifiedAccuracy, certified_accuracy

METHODS = ["interval", "crown", "alpha-crown", "complete"]


def linear_case(classes: int = 2) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear classifier, samples with their labels; two of eight labels are wrong."""
    torch.manual_seed(0)
    net = nn.Linear(5, classes)
    x = torch.rand(8, 5) * 0.6 + 0.2
    y = net(x).argmax(1)
    y[:2] = (y[:2] + 1) % classes
    return net, x, y


def distances(net: nn.Linear, x: Tensor, y: Tensor, norm: float) -> Tensor:
    """To the nearest other class, in the norm; negative for samples that are wrong."""
    dual = 1.0 if math.isinf(norm) else math.inf if norm == 1 else norm / (norm - 1)
    with torch.no_grad():
        weight, logits = net.weight.double(), net(x).double()
    gaps = logits.gather(1, y[:, None]) - logits
    slopes = torch.linalg.vector_norm(weight[y][:, None] - weight[None], dual, dim=2)
    found = gaps / slopes
    return found.scatter(1, y[:, None], math.inf).amin(1)


def deep_case() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 3))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.7)  # so that the class depends on the input
    x = torch.rand(10, 1, 2, 3)
    return net, x, net(x).argmax(1)


@pytest.mark.parametrize("norm", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("method", ["crown", "complete"])
def test_linear_classifiers_are_certified_to_their_distances(method, norm):
    """Linear bounds of a linear network are exact: certified is all whose distance is larger, and nothing is open."""
    net, x, y = linear_case()
    exact = distances(net, x, y, norm)
    middles = exact[exact > 0].sort().values
    radii = [0.0, *((middles[1:] + middles[:-1]) / 2).tolist()[1::3], float(middles[-1]) * 1.1]
    found = certified_accuracy(net, (x, y), radii, norm=norm, clip=None, method=method, timeout_per_sample=5.0)
    for i, radius in enumerate(radii):
        assert torch.equal(found.certified[i], exact > radius), radius
    assert torch.equal(found.certified, found.withstood)
    assert found.clean == pytest.approx(6 / 8)


def test_intervals_of_margins_lose_what_the_rows_share():
    """One bound for each logit by itself: exact for weights of opposite signs, loose for equal ones."""
    net = nn.Linear(1, 2, bias=False)
    x, y = torch.tensor([[0.5]]), torch.tensor([0])
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[2.0], [1.0]]))
    found = certified_accuracy(net, (x, y), [0.1, 0.2, 0.4], method="interval")
    # margin x against |2| r + |1| r at x = 0.5: certified while 3 r < 0.5, where x > 0 alone is needed
    assert found.certified[:, 0].tolist() == [True, False, False]
    assert certified_accuracy(net, (x, y), [0.1, 0.2, 0.4]).certified[:, 0].tolist() == [True, True, True]


def test_stronger_methods_certify_more_and_none_more_than_withstands():
    net, x, y = deep_case()
    radii = [0.05, 0.16]
    found = {
        method: certified_accuracy(net, (x, y), radii, method=method, timeout_per_sample=5.0) for method in METHODS
    }
    for weaker, stronger in itertools.pairwise(METHODS):
        assert bool((found[weaker].certified <= found[stronger].certified).all()), (weaker, stronger)
    for result in found.values():
        assert bool((result.certified <= result.withstood).all())
        assert bool((result.withstood <= result.correct).all())
        assert bool((result.lower.diff() <= 0).all())
        assert bool((result.upper.diff() <= 0).all())
    complete = found["complete"]
    assert torch.equal(complete.certified, complete.withstood)  # every sample of so small a network is decided
    assert 0 < float(complete.lower[0]) < 1  # and the radii are such that there is something to decide


def test_what_is_certified_withstands_random_perturbations():
    net, x, y = deep_case()
    radii = [0.02, 0.05, 0.1]
    found = certified_accuracy(net, (x, y), radii, method="alpha-crown", attack=False)
    assert torch.equal(found.withstood, found.correct.expand(3, -1))
    generator = torch.Generator().manual_seed(0)
    for radius, certified in zip(radii, found.certified, strict=True):
        noise = (torch.rand(500, *x.shape, generator=generator) * 2 - 1) * radius
        moved = (x + noise).clamp(0, 1)
        with torch.no_grad():
            classes = net(moved.flatten(0, 1)).argmax(1).reshape(500, -1)
        assert bool((classes == y)[:, certified].all())


def test_boxes_are_cut_to_the_range_of_the_data():
    """The class changes below 0, where no input is."""
    net = nn.Linear(1, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        net.bias.copy_(torch.tensor([0.05, -0.05]))
    data = (torch.tensor([[0.1]]), torch.tensor([0]))
    assert certified_accuracy(net, data, [0.5]).certified.item() is True
    free = certified_accuracy(net, data, [0.5], clip=None)
    assert (free.certified.item(), free.withstood.item()) == (False, False)


def test_violations_outside_the_range_do_not_count_in_balls_either():
    """A ball is certified whole; what breaks it outside the range leaves the sample undecided, not violated."""
    net = nn.Linear(1, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        net.bias.copy_(torch.tensor([0.05, -0.05]))
    data = (torch.tensor([[0.1]]), torch.tensor([0]))
    for method in ("crown", "complete"):
        found = certified_accuracy(net, data, [0.5], norm=2, method=method, timeout_per_sample=2.0)
        assert (found.certified.item(), found.withstood.item()) == (False, True)


def test_equal_logits_are_not_correct():
    net = nn.Linear(2, 3)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    found = certified_accuracy(net, (torch.rand(4, 2), torch.zeros(4, dtype=torch.long)), [0.0])
    assert (found.clean, float(found.lower)) == (0.0, 0.0)


def test_data_sets_batches_and_graphs_are_taken_alike():
    net, x, y = linear_case(classes=3)
    radii = [0.01, 0.1]
    plain = certified_accuracy(net, (x, y), radii)
    part = Split(x, y)
    named = tuple(str(k) for k in range(3))
    dataset = Dataset("mine", train=Split(x[:1], y[:1]), test=part, task="classification", classes=named)
    graph = capture(net, x[:2])
    others = [
        certified_accuracy(net, dataset, radii),
        certified_accuracy(net, [(x[:5], y[:5]), (x[5:], y[5:])], radii),
        certified_accuracy(graph, (x, y), radii),
    ]
    assert all(torch.equal(plain.certified, other.certified) for other in others)


def test_the_module_is_left_as_it_was():
    net, x, y = deep_case()
    net.train()
    before = [p.clone() for p in net.parameters()]
    certified_accuracy(net, (x, y), [0.05])
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_table_figure_and_page():
    found = CertifiedAccuracy(
        radii=(0.1, 0.2),
        correct=torch.tensor([True, True, True, False]),
        certified=torch.tensor([[True, True, False, False], [True, False, False, False]]),
        withstood=torch.tensor([[True, True, True, False], [True, True, False, False]]),
        norm=math.inf,
        clip=(0.0, 1.0),
        method="crown",
        seconds=1.0,
    )
    assert found.table() == {
        "radius": [0.1, 0.2],
        "clean": [0.75, 0.75],
        "attacked": [0.75, 0.5],
        "certified": [0.5, 0.25],
        "undecided": [0.25, 0.25],
    }
    figure = found.figure()
    assert "4 samples" in figure.caption
    assert "infinity norm" in figure.caption
    assert figure.csv().splitlines()[1] == "0.1,0.75,0.75,0.5,0.25"
    page = found._repr_html_()
    assert "<svg" in page
    assert "<td>75.0%</td>" in page


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"radii": []}, "one or more radii"),
        ({"radii": [-0.1]}, "at least 0"),
        ({"radii": [math.inf]}, "one or more radii"),
        ({"norm": 0.5}, "norm of a perturbation is at least 1"),
        ({"clip": (0.4, 0.5)}, "outside of clip"),
        ({"data": (torch.rand(3, 5), torch.zeros(3))}, "integer labels"),
        ({"data": (torch.rand(3, 5), torch.zeros(2, dtype=torch.long))}, "integer labels|samples"),
        ({"data": (torch.rand(0, 5), torch.zeros(0, dtype=torch.long))}, "empty"),
        ({"data": (torch.rand(1, 5), torch.tensor([7]))}, "labels go up to 7, and the network has 2 classes"),
        ({"data": (torch.full((1, 5), math.nan), torch.tensor([0]))}, "NaN|finite"),
    ],
)
def test_misuse_is_refused(change, said):
    net, x, y = linear_case()
    options = {"data": (x, y), "radii": [0.1], **change}
    with pytest.raises(BadInput, match=said):
        certified_accuracy(net, options.pop("data"), options.pop("radii"), **options)
