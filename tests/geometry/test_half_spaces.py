"""Normals against the weights they are made of and against differentiation; kernels against counting."""

import math

import pytest
import torch
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.geometry.codes import activation_codes
from corollary.geometry.half_spaces import (
    code_kernels,
    half_space_normals,
    named_units,
    overlap_alignment,
    principal_plane,
    target_kernel,
)
from corollary.geometry.path_kernel import overlap_kernel
from corollary.graph import capture


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.LeakyReLU(), nn.Linear(5, 3))
    net = nn.Sequential(*layers).double().eval()
    net[1].running_var.uniform_(0.5, 2.0)
    net[1].running_mean.normal_()
    return net


X = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def normals_of(net: nn.Module, x: Tensor, points: int = 3, most: int = 100):
    graph = capture(net, x)
    units = named_units(graph, activation_codes(graph, x))
    return half_space_normals(graph, x[:points], units, most=most, generator=torch.Generator().manual_seed(0))


def test_normals_of_the_first_layer_are_its_scaled_weights_everywhere():
    net = perceptron()
    (first, _), skipped = normals_of(net, X)
    wanted = net[0].weight * (net[1].weight / (net[1].running_var + net[1].eps).sqrt())[:, None]
    torch.testing.assert_close(first.normals, nn.functional.normalize(wanted, dim=1).detach())
    assert first.exact
    assert first.units == 6
    assert skipped == {}


def test_normals_of_a_deeper_layer_are_gradients_at_each_sample():
    net = perceptron()
    (_, second), _ = normals_of(net, X)
    gradients = torch.func.vmap(torch.func.jacrev(lambda z: net[:4](z[None])[0]))(X[:3]).transpose(0, 1)  # units first
    assert not second.exact
    assert second.sample.tolist() == [0, 1, 2] * 5
    torch.testing.assert_close(second.normals, nn.functional.normalize(gradients.flatten(0, 1), dim=1).detach())


def test_of_many_units_some_are_drawn():
    found, _ = normals_of(perceptron(), X, most=4)
    assert [len(layer.normals) for layer in found] == [4, 3]  # one unit at three samples each
    assert [layer.units for layer in found] == [6, 5]


def test_units_that_nothing_moves_have_no_normal():
    net = perceptron()
    with torch.no_grad():
        net[3].weight[2] = 0.0
    found, _ = normals_of(net, X)
    assert [layer.unmoved for layer in found] == [0, 3]


def test_smooth_layers_and_pools_before_it_make_a_layer_local():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(1, 2, 2), nn.MaxPool1d(2), nn.ReLU()).double()
    (only,), _ = normals_of(net, X[:, None, :])
    assert not only.exact
    (_, clamp), _ = normals_of(nn.Sequential(nn.ReLU(), nn.Linear(4, 3), nn.Hardtanh()).double(), X)
    assert not clamp.exact


def test_units_that_compare_two_values_are_named_with_the_reason():
    class Maxout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.maximum(self.a(x), self.b(x))

    found, skipped = normals_of(nn.Sequential(Maxout(), nn.ReLU()).double(), X)
    assert len(found) == len(skipped) == 1
    assert "compares several values" in next(iter(skipped.values()))


def test_several_inputs_are_refused():
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.relu(a + b)

    graph = capture(Two(), (X, X + 1))
    with pytest.raises(BadInput, match="takes 2"):
        half_space_normals(graph, X, {}, most=3)


def test_principal_plane_holds_planted_directions_and_counts_layers_alike():
    e = torch.eye(5, dtype=torch.float64)
    many, few = e[:1].repeat(1000, 1), -e[1:2]
    plane = principal_plane([many, few])
    torch.testing.assert_close((plane**2).sum(0), (e[0] + e[1]))
    assert principal_plane([e[:1]]).tolist() == [e[0].tolist(), [0.0] * 5]


def test_kernels_of_codes_multiply_to_the_overlap_kernel():
    net = perceptron()
    kernels = code_kernels(activation_codes(net, X))
    product = torch.ones(12, 12, dtype=torch.float64)
    for kernel in kernels.values():
        product *= kernel
    torch.testing.assert_close(product, overlap_kernel(net, X))


def test_gates_that_are_the_classes_align_fully_and_unrelated_ones_do_not():
    labels = torch.arange(60) % 3
    own = (labels[:, None] == labels).double()
    targets = target_kernel(labels, classes=True)
    noise = torch.randn(60, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = overlap_alignment({"own": own, "other": noise @ noise.T, "same": torch.ones_like(own)}, noise, targets)
    assert found.alone[0] == found.through[0] == pytest.approx(1, abs=1e-12)
    assert abs(found.alone[1]) < 0.1  # an unbiased estimate: of the order of 1 / 60
    assert math.isnan(found.alone[2])
    assert found.through[1] == found.through[2]
    assert found.inputs == pytest.approx(found.alone[1], abs=1e-12)


def test_numbers_as_targets_are_standardised():
    y = torch.rand(20, 2, dtype=torch.float64)
    torch.testing.assert_close(
        target_kernel(y, classes=False), target_kernel(y * torch.tensor([1e3, 1.0]) + 7, classes=False)
    )
