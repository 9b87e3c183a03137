"""The networks and images of the study `simplicity-bias`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corollary.data import digits, load
from corollary.dynamics.slab_data import PairedImages, concat_blocks


def perceptron(inputs: int, width: int) -> nn.Sequential:
    """The paper's fully connected network: two hidden layers."""
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


def convolutional(channels: int) -> nn.Sequential:
    """A small convolutional network for images of any size."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(1024, 2),
    )


class Ensemble(nn.Module):
    """The mean of the outputs of several networks."""

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs in the shape of a single member's."""
        return torch.stack([member(x) for member in self.members]).mean(0)


def digit_pairs(seed: int) -> tuple[PairedImages, PairedImages]:
    """Training and test images of 16 x 8 pixels: 0 or 1 above a blurred 4 or 9, which are harder to tell apart."""
    data = digits(image=True)
    assert data.train.y is not None  # the digits have labels and a test part
    assert data.test is not None
    assert data.test.y is not None
    parts = ((data.train.x, data.train.y), (data.test.x, data.test.y))
    train, test = (concat_blocks(*_two(x, y, (0, 1)), *_two(_blurred(x), y, (4, 9)), seed=seed) for x, y in parts)
    return train, test


def mnist_cifar_pairs(seed: int) -> tuple[PairedImages, PairedImages]:
    """The paper's MNIST-CIFAR: 0 or 1, padded to 32 x 32, above an automobile or a truck; on a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers, pictures = load("mnist").to(device=device), load("cifar10").to(device=device)
    found = []
    for part in ("train", "test"):
        top, bottom = getattr(numbers, part), getattr(pictures, part)
        padded = F.pad(top.x, (2, 2, 2, 2)).expand(-1, 3, -1, -1)
        found.append(concat_blocks(*_two(padded, top.y, (0, 1)), *_two(bottom.x, bottom.y, (1, 9)), seed=seed))
    return found[0], found[1]


def _two(x: Tensor, y: Tensor, classes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The samples of two classes, labelled 0 and 1."""
    chosen = (y == classes[0]) | (y == classes[1])
    return x[chosen], (y[chosen] == classes[1]).long()


def _blurred(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 5, stride=1, padding=2)
