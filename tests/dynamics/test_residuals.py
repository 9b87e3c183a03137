import numpy as np
import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.dynamics.feature_noise import FeatureNoiseData, PatchSquaredReLU
from corollary.dynamics.losses import half_square
from corollary.dynamics.residuals import (
    feature_alignment,
    loss_reversals,
    residual_drift,
    single_sample_projection,
)
from corollary.engine import TrainingRecord


def record_of(**columns):
    record = TrainingRecord()
    for step, row in enumerate(zip(*columns.values(), strict=True)):
        record.log(step, **{name: np.asarray(value) for name, value in zip(columns, row, strict=True)})
    return record


def test_residuals_of_outputs_are_summed_and_their_signs_counted():
    record = record_of(output=[[0.5, -2.0], [1.5, -0.5], [0.5, -0.5], [1.5, 0.0]])
    drift = residual_drift(record, torch.tensor([1.0, -1.0]))
    assert np.allclose(drift.residuals, [[0.5, -1.0], [-0.5, 0.5], [0.5, 0.5], [-0.5, 1.0]])
    assert np.allclose(drift.cumulative[-1], [0.0, 1.0])
    assert np.allclose(drift.sign_changes, [1.0, 1 / 3])


def test_residuals_on_record_need_no_targets():
    drift = residual_drift(record_of(residual=[[0.2, 0.1], [-0.1, 0.1], [0.3, 0.0]]))
    assert np.allclose(drift.cumulative[:, 0], [0.2, 0.1, 0.4])
    assert drift.sign_changes.tolist() == [1.0, 0.0]  # what is exactly fitted has no side


def test_outputs_of_classes_count_the_right_one():
    outputs = np.array([[[0.2, 0.9], [0.5, 0.4]], [[0.3, 1.2], [0.7, 0.2]]])
    drift = residual_drift(record_of(output=outputs), torch.tensor([1, 0]))
    assert np.allclose(drift.residuals, [[0.1, 0.5], [-0.2, 0.3]])


def test_missing_measurements_are_left_out():
    drift = residual_drift(record_of(residual=[[1.0, 1.0], [-1.0, np.nan], [1.0, 1.0]]))
    assert np.isnan(drift.sign_changes[1])
    assert drift.cumulative[-1].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("columns", "targets", "says"),
    [
        ({"loss": [1.0, 2.0]}, None, "no per-sample outputs"),
        ({"output": [[1.0], [2.0]]}, None, "pass targets"),
        ({"output": [[1.0], [2.0]]}, torch.tensor([0.0]), "labels of -1 and 1"),
        ({"output": [[1.0], [2.0]]}, torch.tensor([1.0, 1.0]), "1 labels"),
        ({"output": [[[1.0, 2.0]], [[2.0, 1.0]]]}, torch.tensor([2]), "class numbers 0 to 1"),
        ({"output": [[[1.0, 2.0]], [[2.0, 1.0]]]}, torch.tensor([0.5]), "class numbers"),
        ({"residual": [1.0, 2.0]}, None, "one number a sample"),
    ],
)
def test_what_has_no_residual_is_refused(columns, targets, says):
    with pytest.raises(BadInput, match=says):
        residual_drift(record_of(**columns), targets)


def test_turns_of_a_loss_tell_oscillation_from_descent_and_noise():
    steps = np.arange(400)
    noise = np.random.default_rng(0).normal(size=(400, 50))
    columns = np.column_stack([np.exp(-steps / 50), 1 + 0.5 * (-1.0) ** steps, noise + 10])
    turns = loss_reversals(record_of(per_sample_loss=columns))
    assert turns[:2].tolist() == [0.0, 1.0]
    assert turns[2:].mean() == pytest.approx(2 / 3, abs=0.01)


@pytest.mark.parametrize("losses", [[[1.0], [2.0]], [1.0, 2.0, 3.0]])
def test_too_little_to_turn_is_refused(losses):
    with pytest.raises(BadInput, match="three or more"):
        loss_reversals(record_of(per_sample_loss=losses))


def test_alignment_is_the_slope_of_the_margin_along_the_feature():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([1.0, -1, 1, -1, 1])
    direction = torch.tensor([0.0, 1.0, 0.0])
    found = feature_alignment(net, x, y, direction)
    with torch.no_grad():
        wanted = (net(x + 1e-6 * direction) - net(x - 1e-6 * direction))[:, 0] / 2e-6 * y
    assert torch.allclose(found, wanted, atol=1e-8)
    assert not found.requires_grad


def test_alignment_of_classes_follows_the_right_one():
    net = nn.Linear(3, 4).double()
    x, labels = torch.randn(2, 3, dtype=torch.float64), torch.tensor([3, 1])
    found = feature_alignment(net, x, labels, torch.tensor([1.0, 0.0, 0.0]))
    assert torch.allclose(found, net.weight.detach()[[3, 1], 0])


@pytest.mark.parametrize("multiple", [0.5, 1.3])
def test_projections_are_those_of_the_trained_network(multiple):
    strong, weak, width = 1.2, 0.2, 4
    data = FeatureNoiseData(20, 1, strong=strong, weak=weak)
    net = PatchSquaredReLU(20, width, seed=1)
    one = data.of_labels(torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.bool), torch.Generator())
    features, rate = torch.stack([data.strong, data.weak]), multiple * net.edge(strong)
    paths, outputs = [], []
    for _ in range(60):
        value = net(one.x)
        paths.append((net.weight.detach() @ features.T).flatten(0, 1))
        outputs.append(value.detach())
        (gradient,) = torch.autograd.grad(half_square(value, one.y), [net.weight])
        with torch.no_grad():
            net.weight.sub_(rate * gradient)
    seen = torch.stack(paths)
    signs = torch.tensor([1.0] * width + [-1.0] * width, dtype=torch.float64)
    found = single_sample_projection(width, strong, weak, rate, seen[0, :, 0], seen[0, :, 1], 59, signs=signs)
    assert torch.allclose(found.strong, seen[..., 0], atol=1e-12)
    assert torch.allclose(found.weak, seen[..., 1], atol=1e-12)
    assert torch.allclose(found.outputs, torch.cat(outputs), atol=1e-12)


def test_oscillation_feeds_the_weak_projection_by_the_exact_sum():
    width, weak, rate = 8, 0.2, 1.3 * 4
    start = torch.full((3,), 0.1, dtype=torch.float64)
    path = single_sample_projection(width, 1.0, weak, rate, start, 0.1 * start, 500)
    growth = torch.log1p(2 * rate * weak**2 / width * (1 - path.outputs[:-1])).sum()
    assert float(torch.log(path.weak[-1, 0] / path.weak[0, 0])) == pytest.approx(float(growth), abs=1e-12)
    assert float((1 - path.outputs[100:]).sum()) > 1


def test_a_unit_that_overshoots_is_off_for_good():
    big = torch.tensor([3.0], dtype=torch.float64)
    path = single_sample_projection(1, 1.0, 0.2, 1.0, big, torch.zeros_like(big), 3)
    assert float(path.strong[1]) < 0
    assert torch.equal(path.strong[1], path.strong[3])


def test_projections_of_different_units_are_refused():
    with pytest.raises(BadInput, match="every unit"):
        single_sample_projection(2, 1.0, 0.2, 0.1, torch.ones(2), torch.ones(3), 1)
