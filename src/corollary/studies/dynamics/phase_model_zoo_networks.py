"""The networks and the data of the study `phase-model-zoo`."""

import torch
from torch import Tensor, nn

from corollary.data import digits, load

DIGITS_TRAIN = 1000


def perceptron(width: int) -> nn.Module:
    """64-width-width-10 with ReLU units, from He's uniform weights and zero biases."""
    net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    return _he_uniform(net)


def resnet18(width: int) -> nn.Module:
    """ResNet-18 for 32 x 32 images whose stages have 1, 2, 4 and 8 times `width` channels, without biases."""
    blocks: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    channels = width
    for stage in range(4):
        for place in range(2):
            blocks.append(Residual(channels, width * 2**stage, stride=2 if stage and not place else 1))
            channels = width * 2**stage
    blocks += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10, bias=False)]
    return _he_uniform(nn.Sequential(*blocks))


class Residual(nn.Module):
    """Two 3 x 3 convolutions with batch normalisation, beside the identity or a 1 x 1 convolution.

    Source: He et al. 2016, arXiv 1512.03385, section 3.3.
    """

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.beside: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.beside = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, height, width] to [n, out, height / stride, width / stride]."""
        return torch.relu(self.inner(x) + self.beside(x))


def _he_uniform(net: nn.Module) -> nn.Module:
    for layer in net.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return net


def digits_or_images(images: bool) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test set: 1000 and 797 digits; or CIFAR-10, standardised, on a graphics processor where one is."""
    if not images:
        data = digits()
        assert data.test is not None  # the digits have a test part
        x, y = torch.cat([data.train.x, data.test.x]), torch.cat([_labels(data.train.y), _labels(data.test.y)])
        return (x[:DIGITS_TRAIN], y[:DIGITS_TRAIN]), (x[DIGITS_TRAIN:], y[DIGITS_TRAIN:])
    data = load("cifar10").standardised().to(device="cuda" if torch.cuda.is_available() else "cpu")
    assert data.test is not None  # the images have a test part
    return (data.train.x, _labels(data.train.y)), (data.test.x, _labels(data.test.y))


def _labels(y: Tensor | None) -> Tensor:
    assert y is not None  # classification data has labels
    return y
