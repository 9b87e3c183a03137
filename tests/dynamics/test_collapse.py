"""Neural collapse: exact at a simplex, equal to the definitions, blind to the order of labels, clear in errors."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput, CannotCapture
from corollary.dynamics.collapse import collapse_of, neural_collapse
from corollary.dynamics.last_layer import last_affine
from corollary.engine import seeded
from corollary.graph import GraphModule, capture


def drawn(classes: int = 4, features: int = 6, each: int = 5, spread: float = 0.7):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(classes).repeat(each)
    means = torch.randn(classes, features, generator=generator, dtype=torch.float64)
    h = means[labels] + spread * torch.randn(len(labels), features, generator=generator, dtype=torch.float64)
    return h, labels


def simplex(classes: int, features: int) -> torch.Tensor:
    """Class means at full collapse, turned and moved."""
    generator = torch.Generator().manual_seed(2)
    turn = torch.linalg.qr(torch.randn(features, features, generator=generator, dtype=torch.float64))[0]
    corners = torch.eye(classes, features, dtype=torch.float64)
    corners -= corners.mean(0)
    return 3 * corners @ turn + torch.randn(features, generator=generator, dtype=torch.float64)


def plain(h: np.ndarray, y: np.ndarray, w: np.ndarray) -> dict[str, float]:
    """The definitions, with matrices in full."""
    classes = np.unique(y)
    mu = np.stack([h[y == c].mean(0) for c in classes])
    m = mu - mu.mean(0)
    within = sum(np.outer(a, a) for a in (h[i] - mu[list(classes).index(y[i])] for i in range(len(h)))) / len(h)
    between = m.T @ m / len(classes)
    norms = np.linalg.norm(m, axis=1)
    cosines = [
        abs(m[a] @ m[b] / norms[a] / norms[b] + 1 / (len(classes) - 1))
        for a in range(len(classes))
        for b in range(len(classes))
        if a != b
    ]
    return {
        "nc1": np.trace(within @ np.linalg.pinv(between, rcond=1e-6)) / len(classes),
        "nc2_angle": np.mean(cosines),
        "nc2_norm": norms.std(ddof=1) / norms.mean(),
        "nc3": np.linalg.norm(w / np.linalg.norm(w) - m / np.linalg.norm(m)) ** 2,
    }


def test_full_collapse_is_zero_in_all_signs():
    labels = torch.arange(4).repeat(3)
    means = simplex(4, 7)
    weight = 5 * (means - means.mean(0))
    found = collapse_of(means[labels], labels, weight=weight, predictions=labels)
    assert found.nc1 == pytest.approx(0, abs=1e-25)
    assert found.nc2_angle == pytest.approx(0, abs=1e-12)
    assert found.nc2_norm == pytest.approx(0, abs=1e-12)
    assert found.nc3 == pytest.approx(0, abs=1e-24)
    assert found.nc4 == 0
    assert found.rank == 3
    off = found.cosines[~torch.eye(4, dtype=torch.bool)]
    torch.testing.assert_close(off, torch.full_like(off, -1 / 3))


def test_values_are_those_of_the_definitions():
    h, labels = drawn()
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = collapse_of(h, labels, weight=weight)
    for name, value in plain(h.numpy(), labels.numpy(), weight.numpy()).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9), name


def test_unbalanced_classes_count_the_same():
    h, labels = drawn()
    kept = torch.ones(len(h), dtype=torch.bool)
    kept[torch.where(labels == 0)[0][2:]] = False
    weight = torch.randn(4, 6, dtype=torch.float64)
    found = collapse_of(h[kept], labels[kept], weight=weight)
    for name, value in plain(h[kept].numpy(), labels[kept].numpy(), weight.numpy()).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9), name


def test_isotropic_noise_has_a_closed_form():
    """Means on a simplex with spread s^2 / (C - 1) of noise a direction: NC1 = (C - 1) * noise / (squared radius)."""
    classes, each, noise = 4, 60_000, 0.3
    means = simplex(classes, 5)
    labels = torch.arange(classes).repeat(each)
    generator = torch.Generator().manual_seed(0)
    h = means[labels] + noise * torch.randn(len(labels), 5, generator=generator, dtype=torch.float64)
    # singular values of the centred means 3 (I - 1/C): 3 in each of the C - 1 directions
    expected = (classes - 1) * noise**2 / 9
    assert collapse_of(h, labels).nc1 == pytest.approx(expected, rel=5 / math.sqrt(2 * len(h)))


def test_permuting_classes_changes_nothing():
    h, labels = drawn()
    weight = torch.randn(4, 6, dtype=torch.float64)
    predictions = labels.roll(1)
    order = torch.tensor([2, 0, 3, 1])  # the new label of each class
    inverse = order.argsort()
    a = collapse_of(h, labels, weight=weight, predictions=predictions)
    b = collapse_of(h, order[labels], weight=weight[inverse], predictions=order[predictions])
    for name in ("nc1", "nc2_angle", "nc2_norm", "nc3", "nc4"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-12), name


def test_scale_and_rotation_of_features_change_nothing_but_the_alignment():
    h, labels = drawn()
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    a, b = collapse_of(h, labels), collapse_of(7 * h @ turn + 1, labels)
    for name in ("nc1", "nc2_angle", "nc2_norm"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-9), name


def test_a_direction_of_tiny_variance_between_classes_is_left_out():
    """The trap of the pseudo-inverse: the between-class covariance has rank C - 1 at most."""
    labels = torch.arange(3).repeat(4)
    means = torch.tensor([[1.0, 0, 0], [0, 1, 0], [-1, -1, 1e-9]], dtype=torch.float64)
    h = means[labels] + 0.1 * torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h -= torch.stack([h[labels == c].mean(0) for c in range(3)])[labels] - means[labels]
    found = collapse_of(h, labels)
    assert found.rank == 2
    assert found.nc1 < 1


def test_disagreement_counts_samples():
    h, labels = drawn(spread=0.0)
    predictions = labels.clone()
    predictions[:3] = (labels[:3] + 1) % 4
    assert collapse_of(h, labels, predictions=predictions).nc4 == pytest.approx(3 / len(labels))


def test_single_precision_features_are_measured_in_double():
    h, labels = drawn()
    assert collapse_of(h.float(), labels).nc1 == pytest.approx(collapse_of(h, labels).nc1, rel=1e-5)


# --------------------------------------------------------------------------------------------------------- networks


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).double()


@pytest.fixture
def data():
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return x, torch.arange(4).repeat(10)


def same(a, b) -> None:
    for name in ("nc1", "nc2_angle", "nc2_norm", "nc3", "nc4"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-12), name


def test_the_last_layer_is_found_and_its_input_taken(data):
    net = seeded(perceptron, 0)
    x, y = data
    h = net[:-1](x).detach()
    expected = collapse_of(h, y, weight=net[-1].weight.detach(), predictions=net(x).argmax(1))
    found = neural_collapse(net, data)
    assert found.layer == "4"
    same(found, expected)
    same(neural_collapse(net, data, layer="4"), expected)
    same(neural_collapse(capture(net, x[:2]), data), expected)
    same(neural_collapse(GraphModule(capture(net, x[:2])), data), expected)
    same(neural_collapse(net, [(x[:25], y[:25]), (x[25:], y[25:])], batch_size=7), expected)


def test_what_keeps_the_order_may_follow_the_last_layer(data):
    net = nn.Sequential(seeded(perceptron, 0), nn.LogSoftmax(dim=1))
    assert neural_collapse(net, data).nc3 == pytest.approx(neural_collapse(net[0], data).nc3, rel=1e-12)


def test_matrix_products_count_as_layers(data):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = seeded(perceptron, 0)[:-1]
            self.head = nn.Parameter(seeded(perceptron, 0)[-1].weight.detach().T.clone())

        def forward(self, x):
            return self.body(x) @ self.head + 0.1

    linear = seeded(perceptron, 0)
    nn.init.zeros_(linear[-1].bias)
    same(neural_collapse(Product(), data), neural_collapse(linear, data))


def test_another_module_may_be_named(data):
    net = seeded(perceptron, 0)
    found = neural_collapse(net, data, layer="2")
    x, y = data
    expected = collapse_of(net[:2](x).detach(), y, predictions=net(x).argmax(1))
    assert found.nc1 == pytest.approx(expected.nc1, rel=1e-12)
    assert found.nc3 is None  # the layer has six rows for four classes


def test_dropout_and_modes_are_left_as_they_were(data):
    net = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 4)).double()
    net.train()
    assert neural_collapse(net, data).nc1 == neural_collapse(net, data, layer="3").nc1
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize("labels", [(-1, 1), (0, 1)])
def test_one_output_stands_for_two_classes(labels, data):
    x = data[0]
    net = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 1)).double(), 0)
    y = torch.where(x[:, 0] > 0, labels[1], labels[0])
    two = nn.Sequential(*net[:2], nn.Linear(6, 2).double())
    with torch.no_grad():
        two[2].weight.copy_(torch.cat([-net[2].weight, net[2].weight]))
        two[2].bias.copy_(torch.cat([-net[2].bias, net[2].bias]))
    same(neural_collapse(net, (x, y)), neural_collapse(two, (x, (y == labels[1]).long())))


def test_one_hot_labels_are_labels(data):
    net = seeded(perceptron, 0)
    same(neural_collapse(net, data), neural_collapse(net, (data[0], nn.functional.one_hot(data[1], 4).double())))


def test_classes_that_are_missing_leave_the_alignment_open(data):
    found = neural_collapse(seeded(perceptron, 0), (data[0], data[1] % 3))
    assert found.classes == (0, 1, 2)
    assert found.nc3 is None


def test_the_figure_shows_cosines(data):
    figure = neural_collapse(seeded(perceptron, 0), data).figure()
    assert len(figure.data["cosine"]) == 16
    assert figure.svg().startswith("<svg")


def test_small_classes_are_named():
    h, labels = drawn(classes=3, each=2)
    with pytest.raises(BadInput, match=r"\{2: 1\}"):
        collapse_of(h[:-1], labels[:-1])
    with pytest.raises(BadInput, match="at least 2 classes"):
        collapse_of(h, torch.zeros_like(labels))


def test_features_without_classes_are_refused():
    labels = torch.tensor([0, 0, 1, 1])
    with pytest.raises(BadInput, match="coincide"):
        collapse_of(torch.ones(4, 3), labels)
    with pytest.raises(BadInput, match="NaN"):
        collapse_of(torch.full((4, 3), math.nan), labels)
    with pytest.raises(BadInput, match="one row a class"):
        collapse_of(torch.randn(4, 3), labels, weight=torch.randn(3, 3))
    with pytest.raises(BadInput, match="as many labels"):
        collapse_of(torch.randn(4, 3), labels[:3])


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(5, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.inner(x)
        return h + self.last(h.relu())


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3)

    def forward(self, x):
        return self.conv(x[:, None]).mean(-1)


@pytest.mark.parametrize(
    ("net", "text"), [(Around(), "leads around"), (Pooled(), "not a matrix"), (nn.Softmax(dim=1), "no affine layer")]
)
def test_programs_without_a_last_layer_ask_for_a_name(net, text, data):
    with pytest.raises(BadInput, match=text):
        last_affine(capture(net, data[0][:2].float()))


def test_unknown_layers_and_labels_are_refused(data):
    net = seeded(perceptron, 0)
    with pytest.raises(BadInput, match="Known: 0, 1, 2, 3, 4"):
        neural_collapse(net, data, layer="head")
    with pytest.raises(BadInput, match="numbered from 0"):
        neural_collapse(net, (data[0], data[1] + 1))
    with pytest.raises(BadInput, match="classifiers"):
        neural_collapse(net, (data[0], data[0][:, 0]))
    with pytest.raises(BadInput, match="tells two classes apart"):
        neural_collapse(nn.Sequential(nn.Linear(5, 1)).double(), data)


def test_a_module_called_twice_has_no_single_input(data):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(5, 5).double(), nn.Linear(5, 4).double()

        def forward(self, x):
            return self.last(self.layer(self.layer(x)))

    with pytest.raises(BadInput, match="called 2 times"):
        neural_collapse(Twice(), data, layer="layer")


def test_what_cannot_be_captured_can_be_named(data):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = seeded(perceptron, 0)

        def forward(self, x):
            return self.layers(x) if float(x.detach().sum()) > -1e9 else self.layers(-x)

    with pytest.raises(CannotCapture):
        neural_collapse(Branching(), data)
    same(neural_collapse(Branching(), data, layer="layers.4"), neural_collapse(seeded(perceptron, 0), data))
