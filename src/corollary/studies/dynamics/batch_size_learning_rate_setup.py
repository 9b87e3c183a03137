"""The networks, data and random matrices of the study `batch-size-learning-rate`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from corollary.data import Dataset, Split, digits, load
from corollary.dynamics.batch_curvature import BatchCurvature
from corollary.dynamics.broadening import spiked_wigner, spiked_wishart

SPIKES = (8.0, 4.0, 2.5, 1.5)
"""Eigenvalues planted in noise of unit scale."""
WISHART_SPIKE = 5.0
"""Planted in a covariance that is 1 in all other directions, with 4 samples for each dimension."""


def tanh_network() -> nn.Module:
    """The network whose batch Hessians are measured."""
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()


def relu_network() -> nn.Module:
    """The network that learning rates are searched for."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def vgg16() -> nn.Module:
    """VGG-16 for images of 32 x 32 pixels, without batch normalisation."""
    layers: list[nn.Module] = []
    channels = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def centred_digits() -> Dataset:
    """The digits, pixels in [0, 1], less the mean image of the training part."""
    data = digits()
    assert data.test is not None  # the digits have a test part
    centre = data.train.x.mean(0)
    return replace(
        data, train=Split(data.train.x - centre, data.train.y), test=Split(data.test.x - centre, data.test.y)
    )


def pictures() -> Dataset:
    """CIFAR-10, in the place of the paper's CIFAR-100, on a GPU where there is one."""
    return load("cifar10").standardised().to(device="cuda" if torch.cuda.is_available() else "cpu")


def wigner_draw(size: int, generator: torch.Generator) -> Tensor:
    """Relative errors of the law at each spike planted in a symmetric noise matrix, and at the edge of the noise."""
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    noise = (noise + noise.T) / (2 * size) ** 0.5
    noise.diagonal()[: len(SPIKES)] += torch.tensor(SPIKES, dtype=torch.float64)
    top = torch.linalg.eigvalsh(noise).flip(0)[: len(SPIKES) + 1]
    law = torch.from_numpy(spiked_wigner(np.array([*SPIKES, 0.0]), 1.0, 1.0))
    return top / law - 1


def wishart_draw(dimension: int, generator: torch.Generator) -> Tensor:
    """Relative errors of the law at the spike of a sample covariance, and at the edge of its bulk."""
    samples = torch.randn(4 * dimension, dimension, generator=generator, dtype=torch.float64)
    samples[:, 0] *= WISHART_SPIKE**0.5
    top = torch.linalg.eigvalsh(samples.T @ samples / len(samples)).flip(0)[:2]
    law = torch.from_numpy(spiked_wishart(np.array([WISHART_SPIKE, 0.0]), 1.0, 0.25))
    return top / law - 1


def stored(curve: BatchCurvature) -> dict[str, Any]:
    """A curve as columns and numbers, one row a batch."""
    repeats = curve.largest.shape[1]
    return {
        "batch_size": np.repeat(curve.batch_sizes, repeats),
        "largest": curve.largest.reshape(-1).numpy(),
        "smallest": curve.smallest.reshape(-1).numpy(),
        "fluctuation": curve.fluctuation.reshape(-1).numpy(),
        "residual": curve.residuals.reshape(-1).numpy(),
        **{name: getattr(curve, name) for name in ("full_largest", "full_smallest", "samples", "parameters")},
    }


def restored(curve: Mapping[str, Any], whole: Mapping[str, Any]) -> BatchCurvature:
    """The curve of stored tables."""
    sizes = np.unique(curve["batch_size"])
    columns = (
        torch.as_tensor(np.asarray(curve[name], dtype=np.float64)).reshape(len(sizes), -1)
        for name in ("largest", "smallest", "fluctuation", "residual")
    )
    return BatchCurvature(
        tuple(int(size) for size in sizes),
        *columns,
        full_largest=float(whole["full_largest"][0]),
        full_smallest=float(whole["full_smallest"][0]),
        samples=int(whole["samples"][0]),
        parameters=int(whole["parameters"][0]),
        kind="hessian",
    )
