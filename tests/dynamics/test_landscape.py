import math

import numpy as np
import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.dynamics.landscape import compare_runs, curvature, landscape_table
from corollary.dynamics.mode_connectivity import mode_connectivity
from corollary.dynamics.similarity import linear_cka
from corollary.dynamics.states import state_of
from corollary.dynamics.zoo import Cell, Recipe, train_zoo
from corollary.engine import cross_entropy
from corollary.linalg import hessian


def perceptron(width):
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).double()


@pytest.fixture(scope="module")
def data():
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


@pytest.fixture(scope="module")
def zoo(data):
    return train_zoo(perceptron, data, [2, 5], [8], seeds=3, recipe=Recipe(epochs=10))


CURVES = {"steps": 5, "points": 5}


def test_curvature_is_that_of_the_dense_hessian(data):
    torch.manual_seed(0)
    net = perceptron(6)
    exact = torch.linalg.eigvalsh(hessian(net, cross_entropy, data).to_dense())
    found = curvature(net, cross_entropy, data, steps=60, probes=200)
    assert found.largest == pytest.approx(float(exact[-1]), rel=1e-6)
    assert abs(found.trace - float(exact.sum())) <= 3 * found.trace_error
    assert found.trace_error < 0.1 * found.trace
    assert curvature(net, cross_entropy, data, steps=60, probes=200) == found


def test_curvature_of_a_dead_network_is_zero(data):
    """All units off: what is left of the Hessian must not be taken for a wrong derivative."""
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
    nn.init.constant_(net[0].bias, -100.0)
    nn.init.constant_(net[2].bias, 0.0)
    found = curvature(net, cross_entropy, (data[0].float(), data[1]))
    assert found.largest == pytest.approx(0.31, abs=0.1)  # of the last layer's biases only
    assert found.residual < 1e-5


def test_runs_are_compared_by_their_parts(zoo, data):
    states = [state_of(zoo.module(5, 8, index)) for index in range(3)]
    model = zoo.module(5, 8)
    found = compare_runs(model, states, data, data[0], **CURVES)
    assert len(found.paths) == len(found.cka) == 3
    alone = mode_connectivity(model, states[1], states[2], data, **CURVES)
    assert found.paths[2].mc == pytest.approx(alone.mc, abs=1e-12)
    with torch.no_grad():
        pair = [zoo.module(5, 8, index)(data[0]) for index in (1, 2)]
    assert found.cka[2] == pytest.approx(float(linear_cka(*pair)), abs=1e-12)
    assert found.mc == pytest.approx(np.mean([path.mc for path in found.paths]))
    one = compare_runs(model, states, data, data[0], pairs=[(0, 2)], **CURVES)
    assert one.cka == pytest.approx((found.cka[1],))


def test_one_run_has_nothing_to_be_compared_with(zoo, data):
    with pytest.raises(BadInput, match="two or more are needed, got 1"):
        compare_runs(zoo.module(5, 8), [state_of(zoo.module(5, 8))], data, data[0])


def test_the_table_holds_means_over_networks(zoo, data):
    table = landscape_table(zoo, data, data, **CURVES)
    assert table["width"].tolist() == [2, 5]
    assert table["networks"].tolist() == [3, 3]
    for row, width in enumerate((2, 5)):
        nets = [zoo.module(width, 8, index) for index in range(3)]
        with torch.no_grad():
            errors = [float((net(data[0]).argmax(1) != data[1]).double().mean()) for net in nets]
            losses = [float(cross_entropy(net(data[0]), data[1])) for net in nets]
        sharp = [curvature(net, cross_entropy, data) for net in nets]
        assert table["train_error"][row] == pytest.approx(np.mean(errors))
        assert table["test_accuracy"][row] == pytest.approx(1 - np.mean(errors))
        assert table["train_loss"][row] == pytest.approx(np.mean(losses))
        assert table["lambda_max"][row] == pytest.approx(np.mean([one.largest for one in sharp]))
        assert table["trace_error"][row] == pytest.approx(np.sqrt(sum(one.trace_error**2 for one in sharp)) / 3)
        compared = compare_runs(nets[0], [state_of(net) for net in nets], data, data[0], **CURVES)
        assert table["mc"][row] == pytest.approx(compared.mc)
        assert table["cka"][row] == pytest.approx(compared.similarity)
    assert set(table["phase"]) <= {"I", "II", "III", "IV-A", "IV-B"}


def test_what_is_measured_on_a_part(zoo, data):
    part = (data[0][:10], data[1][:10])
    table = landscape_table(zoo, data, data, sample=part, **CURVES)
    with torch.no_grad():
        errors = [(zoo.module(2, 8, i)(part[0]).argmax(1) != part[1]).double().mean() for i in range(3)]
    assert table["train_error"][0] == pytest.approx(float(torch.stack(errors).mean()))


def test_diverged_cells_are_phase_one_with_a_count(data):
    wild = train_zoo(perceptron, data, [2], [8], seeds=2, recipe=Recipe(epochs=20, learning_rate=1e200))
    assert wild.cells[Cell(2, 8)].finished == ()
    table = landscape_table(wild, data, data, **CURVES)
    assert table["diverged"].tolist() == [2]
    assert table["phase"].tolist() == ["I"]
    assert math.isnan(table["mc"][0])


def test_pairs_need_two_networks_and_errors_need_classes(data):
    single = train_zoo(perceptron, data, [2], [8], seeds=1, recipe=Recipe(epochs=1))
    with pytest.raises(BadInput, match="seeds=2 or more"):
        landscape_table(single, data, data)
    quantities = (data[0], torch.randn(40, 3, dtype=torch.float64))
    loss = nn.functional.mse_loss
    fitted = train_zoo(perceptron, quantities, [2], [8], seeds=2, recipe=Recipe(epochs=1), loss=loss)
    with pytest.raises(BadInput, match="must be classes"):
        landscape_table(fitted, quantities, quantities, loss=loss)
