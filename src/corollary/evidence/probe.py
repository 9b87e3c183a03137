"""A probe: one question `inspect` can ask of a network, and what it needs for the answer."""

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from corollary.base.errors import BadInput, CannotCapture
from corollary.base.network import Loss, Params
from corollary.base.registry import registry
from corollary.base.seeds import Seeds
from corollary.data import Dataset
from corollary.engine import TrainingRecord
from corollary.evidence.figure import Figure
from corollary.evidence.measurement import Measurement
from corollary.evidence.source import Source
from corollary.evidence.training import Training
from corollary.graph import Graph

Wants: TypeAlias = Literal["none", "inputs", "targets"]


class Need(enum.IntEnum):
    """What a probe needs of a network, each rung harder to have than the one before."""

    WEIGHTS = 0
    FORWARD = 1
    ACTIVATIONS = 2
    GRADIENTS = 3
    PROGRAM = 4


@dataclass(frozen=True)
class Finding:
    """What a probe found."""

    measurements: tuple[Measurement, ...]
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()


class Budget:
    """A number of seconds to spend, from now."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.start = time.perf_counter()

    def remaining(self) -> float:
        """Seconds left, never below zero."""
        return max(0.0, self.seconds - (time.perf_counter() - self.start))


@dataclass
class Subject:
    """The network under inspection and all that is known of it.

    Args:
        module: in evaluation mode. For an ONNX file, the graph as a module.
        program: the captured graph, or the reason why there is none.
        loss: mean over samples.
        budget: seconds this probe may take; a probe that could take longer measures less and says so.
        training: the settings it was trained with, as far as they are known.
        record: what was measured while it was trained.
        checkpoints: parameters and buffers of other runs of the same architecture, by name as in `module`.
    """

    name: str
    module: nn.Module
    program: Graph | CannotCapture
    data: Dataset | None
    loss: Loss
    seeds: Seeds
    budget: Budget
    training: Training = field(default_factory=Training)
    record: TrainingRecord | None = None
    checkpoints: tuple[Params, ...] = ()

    @property
    def graph(self) -> Graph:
        """The network as a graph.

        Raises: CannotCapture, if it could not be captured.
        """
        if isinstance(self.program, CannotCapture):
            raise self.program
        return self.program

    @property
    def task(self) -> str:
        """ "classification", "regression" or "unlabelled"."""
        return self.data.task if self.data else "unlabelled"

    def sample(self, n: int, split: Literal["train", "test"] = "test") -> tuple[Tensor, Tensor | None]:
        """At most `n` samples of a part of the data, drawn without replacement, the same on every call.

        The test part stands in for a missing one of the two. Raises: BadInput, if there is no data.
        """
        if self.data is None:
            raise BadInput("this needs data: give inspect a data set (--data)")
        part = self.data.train if split == "train" or self.data.test is None else self.data.test
        if n >= len(part.x):
            return part.x, part.y
        rows = torch.randperm(len(part.x), generator=self.seeds(f"sample {split}"))[:n].sort().values
        return part.x[rows], None if part.y is None else part.y[rows]


@dataclass(frozen=True)
class Probe:
    """A question with its method. `run` gets a `Subject` and returns a `Finding`."""

    name: str
    room: str
    title: str
    question: str
    needs: Need
    data: Wants
    sources: tuple[Source, ...]
    run: Callable[[Subject], Finding]


def probe(
    name: str,
    *,
    room: str,
    title: str,
    question: str,
    needs: Need,
    data: Wants = "none",
    sources: tuple[Source, ...] = (),
) -> Callable[[Callable[[Subject], Finding]], Probe]:
    """Make a probe of a function and register it under `name`, so that `inspect` runs it.

    Args:
        room: the section of the report it stands in.
        question: what it answers, as the reader would ask it.
        data: whether it needs samples, or samples with targets.
    """

    def register(run: Callable[[Subject], Finding]) -> Probe:
        made = Probe(name, room, title, question, needs, data, sources, run)
        registry("probes").register(name, made)
        return made

    return register
