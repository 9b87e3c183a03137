"""The networks and data of the study `ibp-tightness`."""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from corollary.data import digits, load

TRAIN = 1437
"""Digits to train on; the other 360 are for testing."""


def perceptron(width: int) -> nn.Sequential:
    """The network that learns digits: two hidden layers."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def convolutional(width: int) -> nn.Sequential:
    """The paper's CNN3 on MNIST at width 128; channels in proportion elsewhere."""
    first = max(1, width // 8)
    return nn.Sequential(
        nn.Conv2d(1, first, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(first, 2 * first, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * first * 49, 10),
    )


@cache
def images_or_digits(images: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test inputs and labels: digits, or MNIST on a GPU where there is one."""
    data = load("mnist") if images else digits()
    assert data.train.y is not None  # both sets have labels and a test part
    assert data.test is not None
    assert data.test.y is not None
    device = "cuda" if images and torch.cuda.is_available() else "cpu"
    train, x, y = len(data.train.x) if images else TRAIN, (data.train.x, data.test.x), (data.train.y, data.test.y)
    everything, labels = torch.cat(x).to(device), torch.cat(y).to(device)
    return everything[:train], labels[:train], everything[train:], labels[train:]


def gaussian(widths: Sequence[int], draws: int, generator: torch.Generator) -> list[Tensor]:
    """Standard normal weights of so many networks, one tensor a layer."""
    return [
        torch.randn(draws, outputs, inputs, generator=generator, dtype=torch.float64)
        for inputs, outputs in pairwise(widths)
    ]


def flipped(weights: Sequence[Tensor], widths: Sequence[int], generator: torch.Generator) -> list[Tensor]:
    """The same sizes with a random sign for each unit, on the weights into it and those out of it."""
    draws = len(weights[0])
    signs = [2.0 * torch.randint(2, (draws, width), generator=generator).double() - 1 for width in widths]
    return [
        after[:, :, None] * weight * before[:, None]
        for weight, before, after in zip(weights, signs, signs[1:], strict=False)
    ]
