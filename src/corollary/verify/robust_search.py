"""A small search over architectures for the one that stays right under attack.

Each candidate of a declared space is trained on examples moved towards their least likely class, and is worth its
accuracy on such examples of a validation set. Candidates are drawn at random, or by regularised evolution, which
replaces the paper's controller: the reward is the paper's, the search strategy is one that fits a desk.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import prod
from typing import Literal, NamedTuple, TypeAlias, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.progress import track
from corollary.base.seeds import Seeds
from corollary.data import Dataset
from corollary.engine import fit, seeded
from corollary.evidence import Source
from corollary.verify.attacks import step_least_likely
from corollary.verify.classifier import predictions
from corollary.verify.reach import Clip

Choice: TypeAlias = int | float | str
Architecture: TypeAlias = Mapping[str, Choice]
"""One value for each choice of a space."""

REAL_2019 = Source(
    key="real2019regularized",
    authors=("Esteban Real", "Alok Aggarwal", "Yanping Huang", "Quoc V. Le"),
    title="Regularized evolution for image classifier architecture search",
    year=2019,
    arxiv="1802.01548",
)
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}
OPERATIONS: dict[str, Callable[[int], nn.Module]] = {  # of a cell: channels -> module that keeps the shape
    "identity": lambda channels: nn.Identity(),
    "convolution 1": lambda channels: _convolution(channels, 1),
    "convolution 3": lambda channels: _convolution(channels, 3),
    "separable 3": lambda channels: nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
    ),
    "average pool": lambda channels: nn.AvgPool2d(3, stride=1, padding=1),
    "max pool": lambda channels: nn.MaxPool2d(3, stride=1, padding=1),
}


@final
@dataclass(frozen=True)
class Space:
    """The architectures that a search may try.

    Args:
        choices: the values of each choice, by name.
        build: (architecture, shape of one input, classes) -> network with fresh weights.
    """

    choices: Mapping[str, tuple[Choice, ...]]
    build: Callable[[Architecture, tuple[int, ...], int], nn.Module]

    @property
    def size(self) -> int:
        """How many architectures there are."""
        return prod(len(values) for values in self.choices.values())

    def draw(self, generator: torch.Generator) -> dict[str, Choice]:
        """One of them, uniformly."""
        return {name: values[_below(len(values), generator)] for name, values in self.choices.items()}

    def mutate(self, architecture: Architecture, generator: torch.Generator) -> dict[str, Choice]:
        """The architecture with one of its choices, drawn at random, made differently."""
        open_choices = [name for name, values in self.choices.items() if len(values) > 1]
        name = open_choices[_below(len(open_choices), generator)]
        others = [value for value in self.choices[name] if value != architecture[name]]
        return {**architecture, name: others[_below(len(others), generator)]}


def mlp_space() -> Space:
    """Perceptrons on flattened inputs: 1 to 3 hidden layers, their width, activation and normalisation."""
    choices: dict[str, tuple[Choice, ...]] = {
        "hidden layers": (1, 2, 3),
        "width": (32, 64, 128, 256),
        "activation": tuple(ACTIVATIONS),
        "normalisation": ("none", "layer"),
    }
    return Space(choices, _build_mlp)


def cnn_space() -> Space:
    """Plain convolutional networks on images (channel, height, width): blocks of convolution and pooling."""
    choices: dict[str, tuple[Choice, ...]] = {
        "blocks": (1, 2, 3),
        "channels": (8, 16, 32),
        "kernel": (3, 5),
        "activation": tuple(ACTIVATIONS),
        "pooling": ("max", "average", "stride"),
        "normalisation": ("none", "batch"),
    }
    return Space(choices, _build_cnn)


def cell_space(nodes: int = 2) -> Space:
    """Stacked cells on images, in the manner of NASNet.

    A node of a cell adds two earlier states (the outputs of the two cells before and of earlier nodes), each through an
    operation of its own; the nodes joined are the cell's output. Between cells the image is halved.
    """
    choices: dict[str, tuple[Choice, ...]] = {"channels": (8, 16), "cells": (1, 2, 3)}
    for node in range(nodes):
        for side in ("left", "right"):
            choices[f"node {node} {side} input"] = tuple(range(node + 2))
            choices[f"node {node} {side} operation"] = tuple(OPERATIONS)
    return Space(choices, partial(_build_cells, nodes=nodes))


class Trial(NamedTuple):
    """One architecture, trained: its size, and its accuracy on validation inputs as they are and under attack."""

    architecture: Architecture
    parameters: int
    clean_accuracy: float
    adversarial_accuracy: float


@final
@dataclass(frozen=True)
class SearchResult:
    """All that a search tried, in order, and the trained network that did best under attack."""

    trials: tuple[Trial, ...]
    best: Trial
    network: nn.Module

    def correlation(self, column: Literal["parameters", "clean_accuracy"]) -> float:
        """Pearson's correlation over the trials of adversarial accuracy with clean accuracy, or with log size."""
        values = np.array([getattr(trial, column) for trial in self.trials], dtype=float)
        values = np.log(values) if column == "parameters" else values
        return float(np.corrcoef(values, [trial.adversarial_accuracy for trial in self.trials])[0, 1])


def robust_search(
    data: Dataset,
    space: Space,
    radius: float,
    *,
    trials: int = 20,
    strategy: Literal["evolution", "random"] = "evolution",
    epochs: int = 10,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    population: int = 8,
    tournament: int = 3,
    validation: float = 0.2,
    clip: Clip | None = (0, 1),
    seed: int = 0,
) -> SearchResult:
    """Search `space` for the network that is most accurate on adversarial validation inputs.

    Each candidate is trained by Adam with half of every batch moved by `step_least_likely`, and rewarded with its
    accuracy on validation inputs moved so. The test part of `data` is not looked at. No architecture is tried twice.

    Args:
        data: a classification set; a share `validation` of its training part is set aside for the reward.
        radius: of the perturbations, in training and in the reward.
        trials: candidates to train; fewer if the space has fewer.
        strategy: "random" draws; "evolution" draws the first `population`, then changes one choice of the best of
            `tournament` of the living, and lets the oldest die.
        clip: the range of the inputs.
    Raises: BadInput, if the data has no classes, or for numbers that leave nothing to search.
    Source: the reward, Cubuk et al. 2017, arXiv 1711.02846, section 5; evolution, Real et al. 2019, arXiv 1802.01548.
    """
    if data.task != "classification" or data.classes is None:
        raise BadInput(f"a robust architecture is one of a classifier, but the task of {data.name!r} is {data.task!r}")
    if trials < 1 or not 1 <= tournament <= population or space.size < 2:
        raise BadInput(
            f"a search needs a trial, a space of two or more, and a tournament within the population; got {trials} "
            f"trials, {space.size} architectures, a tournament of {tournament} in a population of {population}"
        )
    seeds = Seeds(seed).child("robust search")
    parts = replace(data, test=None).split(validation, seeds("validation samples"))
    propose = _Proposals(space, strategy, population, tournament, seeds("architectures"))
    done: list[Trial] = []
    best: tuple[Trial, nn.Module] | None = None
    for _ in track(range(min(trials, space.size)), "architectures"):
        architecture = propose.next()
        net = seeded(
            space.build, seeds.integer("weights"), architecture, tuple(data.train.x.shape[1:]), len(data.classes)
        )
        trained = fit(
            AdversariallyTrained(net.to(data.train.x), radius, clip),
            _pair(parts.train),
            epochs=epochs,
            batch_size=batch_size,
            optimizer=partial(torch.optim.Adam, lr=learning_rate),
            seed=seeds.integer("batches"),
        ).module
        trained = cast(AdversariallyTrained, trained).net
        trial = _judge(architecture, trained, _pair(parts.test), radius, clip)
        propose.tell(trial)
        done.append(trial)
        if best is None or trial.adversarial_accuracy > best[0].adversarial_accuracy:
            best = (trial, trained)
    assert best is not None  # one trial at least was made
    return SearchResult(tuple(done), *best)


@final
class AdversariallyTrained(nn.Module):
    """`net`, which sees in training the first half of each batch moved towards its least likely classes.

    Any training loop then trains on clean and adversarial examples in equal parts. In evaluation mode it is `net`.

    Source: Kurakin, Goodfellow and Bengio 2017, arXiv 1611.01236, section 3.
    """

    def __init__(self, net: nn.Module, radius: float, clip: Clip | None = (0, 1)):
        super().__init__()
        self.net, self.radius, self.clip = net, radius, clip

    def forward(self, x: Tensor) -> Tensor:
        half = len(x) // 2
        if self.training and half:
            x = torch.cat([step_least_likely(self.net, x[:half], self.radius, clip=self.clip), x[half:]])
        return self.net(x)


@final
class _Proposals:
    """Which architecture to try next, given what the ones before were worth."""

    def __init__(
        self,
        space: Space,
        strategy: Literal["evolution", "random"],
        population: int,
        tournament: int,
        generator: torch.Generator,
    ):
        self.space, self.generator, self.tournament = space, generator, tournament
        self.evolves = strategy == "evolution"
        self.living: deque[Trial] = deque(maxlen=population)
        self.seen: set[tuple[Choice, ...]] = set()

    def next(self) -> dict[str, Choice]:
        candidate = self._candidate()
        while self._key(candidate) in self.seen:  # a walk of mutations ends, as some architecture is still unseen
            candidate = self.space.mutate(candidate, self.generator)
        self.seen.add(self._key(candidate))
        return candidate

    def tell(self, trial: Trial) -> None:
        self.living.append(trial)

    def _candidate(self) -> dict[str, Choice]:
        if not self.evolves or len(self.living) < (self.living.maxlen or 0):
            return self.space.draw(self.generator)
        chosen = torch.randperm(len(self.living), generator=self.generator)[: self.tournament].tolist()
        parent = max((self.living[i] for i in chosen), key=lambda trial: trial.adversarial_accuracy)
        return self.space.mutate(parent.architecture, self.generator)

    def _key(self, architecture: Architecture) -> tuple[Choice, ...]:
        return tuple(architecture[name] for name in self.space.choices)


def _judge(
    architecture: Architecture, net: nn.Module, held_out: tuple[Tensor, Tensor], radius: float, clip: Clip | None
) -> Trial:
    x, y = held_out
    attacked = torch.cat([step_least_likely(net, some, radius, clip=clip) for some in x.split(512)])
    clean, adversarial = ((predictions(net, inputs) == y).double().mean() for inputs in (x, attacked))
    return Trial(dict(architecture), sum(p.numel() for p in net.parameters()), float(clean), float(adversarial))


def _pair(part: tuple[Tensor, Tensor | None] | None) -> tuple[Tensor, Tensor]:
    assert part is not None  # the data was split just before
    assert part[1] is not None  # and is a classification set
    return part[0], part[1]


def _below(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=generator))


def _build_mlp(architecture: Architecture, shape: tuple[int, ...], classes: int) -> nn.Module:
    width = int(architecture["width"])
    sizes = [prod(shape), *[width] * int(architecture["hidden layers"])]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        layers.append(nn.Linear(before, after))
        if architecture["normalisation"] == "layer":
            layers.append(nn.LayerNorm(after))
        layers.append(ACTIVATIONS[str(architecture["activation"])]())
    return nn.Sequential(*layers, nn.Linear(width, classes))


def _build_cnn(architecture: Architecture, shape: tuple[int, ...], classes: int) -> nn.Module:
    _refuse_no_image(shape)
    kernel, pooling = int(architecture["kernel"]), architecture["pooling"]
    channels = [shape[0], *(int(architecture["channels"]) * 2**block for block in range(int(architecture["blocks"])))]
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        stride = 2 if pooling == "stride" else 1
        layers.append(nn.Conv2d(before, after, kernel, stride=stride, padding=kernel // 2))
        if architecture["normalisation"] == "batch":
            layers.append(nn.BatchNorm2d(after))
        layers.append(ACTIVATIONS[str(architecture["activation"])]())
        if pooling != "stride":  # rounded up, so that no image is too small for its network
            layers.append((nn.MaxPool2d if pooling == "max" else nn.AvgPool2d)(2, ceil_mode=True))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels[-1], classes))


def _build_cells(architecture: Architecture, shape: tuple[int, ...], classes: int, *, nodes: int) -> nn.Module:
    _refuse_no_image(shape)
    return _CellNetwork(architecture, nodes, shape[0], classes)


def _refuse_no_image(shape: tuple[int, ...]) -> None:
    if len(shape) != 3:
        raise BadInput(f"convolutions need images (channel, height, width), got inputs of shape {shape}: use mlp_space")


def _convolution(channels: int, kernel: int) -> nn.Module:
    convolution = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(nn.ReLU(), convolution, nn.BatchNorm2d(channels))


@final
class _CellNetwork(nn.Module):
    """A stem, cells with an image half as large after each but the last, and a linear head on the mean."""

    def __init__(self, architecture: Architecture, nodes: int, inputs: int, classes: int):
        super().__init__()
        channels = int(architecture["channels"])
        self.stem = nn.Sequential(nn.Conv2d(inputs, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.cells = nn.ModuleList(_Cell(architecture, nodes, channels) for _ in range(int(architecture["cells"])))
        self.halve = nn.AvgPool2d(2, ceil_mode=True)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        before = last = self.stem(x)
        for place, cell in enumerate(self.cells):
            if place:
                before, last = self.halve(before), self.halve(last)
            before, last = last, cell(before, last)
        return self.head(last.relu().mean((2, 3)))


@final
class _Cell(nn.Module):
    """One cell: nodes over the outputs of the two cells before it."""

    def __init__(self, architecture: Architecture, nodes: int, channels: int):
        super().__init__()
        sides = [[f"node {node} {side}" for side in ("left", "right")] for node in range(nodes)]
        self.sources = [[int(architecture[f"{side} input"]) for side in pair] for pair in sides]
        self.operations = nn.ModuleList(
            OPERATIONS[str(architecture[f"{side} operation"])](channels) for pair in sides for side in pair
        )
        self.join = nn.Conv2d(nodes * channels, channels, 1, bias=False)

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        states = [before, last]
        for node, (left, right) in enumerate(self.sources):
            states.append(self.operations[2 * node](states[left]) + self.operations[2 * node + 1](states[right]))
        return self.join(torch.cat(states[2:], dim=1))
