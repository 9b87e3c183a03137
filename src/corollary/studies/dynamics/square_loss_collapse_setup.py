"""The data, networks and lengths of the study `square-loss-collapse` at each scale."""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from corollary.data import digits, load
from corollary.dynamics.rho import with_constant

WIDTH = 128


@dataclass(frozen=True)
class Setup:
    """One scale.

    Args:
        images: CIFAR-10 and convolutional networks instead of digits and perceptrons.
        samples: how many to train on, at most.
        scale_steps, scale_batch: of the training with a penalty on the scale.
        steps: of SGD; `late_steps` of them, the last ones, are measured one by one.
        snapshots: steps at which rank and collapse are measured.
        noise_samples: whose gradients are formed one by one.
    """

    images: bool
    samples: int
    scale_steps: int
    scale_batch: int | None
    steps: int
    late_steps: int
    snapshots: tuple[int, ...]
    noise_samples: int

    def classes(self) -> tuple[Tensor, Tensor]:
        """Standardised inputs and labels of ten classes, in float32."""
        x, y = _images() if self.images else _digits()
        return x[: self.samples], y[: self.samples]

    def two_classes(self) -> tuple[Tensor, Tensor]:
        """Two of the classes with labels -1 and 1, and a constant input in the place of biases."""
        first, second = (1, 2) if self.images else (3, 8)
        x, y = self.classes()
        kept = (y == first) | (y == second)
        signs = torch.where(y[kept] == first, 1.0, -1.0)
        if self.images:
            return torch.cat([x[kept], torch.ones_like(x[kept][:, :1])], dim=1), signs
        return with_constant(x[kept].double()), signs.double()

    def homogeneous(self) -> nn.Sequential:
        """Layers without biases between ReLU units, one output."""
        if self.images:
            return _convolutional(4, 1, bias=False)
        return _perceptron((65, 64, 64, 1), bias=False)

    def classifier(self) -> nn.Sequential:
        """The network of ten classes that SGD trains."""
        if self.images:
            return _convolutional(3, 10, bias=True)
        return _perceptron((64, WIDTH, WIDTH, WIDTH, 10), bias=True)

    @property
    def last_layer(self) -> str:
        """The name of its last layer."""
        return str(len(self.classifier()) - 1)


SETUPS = {
    "smoke": Setup(False, 300, 40, None, 60, 20, (1, 60), 100),
    "desk": Setup(False, 1797, 6000, None, 6000, 500, (1, 60, 200, 600, 2000, 6000), 1797),
    "paper": Setup(True, 50_000, 60_000, 128, 200_000, 500, (1, 600, 6000, 20_000, 60_000, 200_000), 5000),
}


def one_hot(y: Tensor) -> Tensor:
    """Labels of ten classes as rows."""
    return nn.functional.one_hot(y, 10).float()


def two_layers() -> nn.Sequential:
    """A small perceptron with biases, for identities; wider than a batch."""
    return _perceptron((64, 32, 10), bias=True)


def smooth_perceptron() -> nn.Sequential:
    """A perceptron whose loss has stationary points that descent can reach."""
    return nn.Sequential(nn.Linear(64, 8), nn.Softplus(), nn.Linear(8, 10))


def _perceptron(widths: tuple[int, ...], *, bias: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _convolutional(channels: int, outputs: int, *, bias: bool) -> nn.Sequential:
    """Four convolutions of stride 2 on images of 32 x 32, then a linear layer."""
    widths = (channels, 32, 64, 128, 128)
    layers: list[nn.Module] = []
    for inputs, filters in pairwise(widths):
        layers += [nn.Conv2d(inputs, filters, 3, stride=2, padding=1, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 4, outputs, bias=bias))


@cache
def _digits() -> tuple[Tensor, Tensor]:
    data = digits()
    assert data.test is not None  # the digits have a test part, and labels
    assert data.train.y is not None
    assert data.test.y is not None
    x = torch.cat([data.train.x, data.test.x])
    # A pixel that never changes stays 0.
    x = (x - x.mean(dim=0)) / (x.std(dim=0) + 1e-6)
    return x, torch.cat([data.train.y, data.test.y])


@cache
def _images() -> tuple[Tensor, Tensor]:
    data = load("cifar10")
    assert data.train.y is not None  # CIFAR-10 has labels
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = data.train.x.to(device)
    mean, spread = x.mean(dim=(0, 2, 3), keepdim=True), x.std(dim=(0, 2, 3), keepdim=True)
    return (x - mean) / spread, data.train.y.to(device)
