"""Where a network of one's own stands among the phases: it is trained again a few times, and its runs are compared."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.base.network import Batch, Loss, Params, batch_length, evaluating
from corollary.base.seeds import Seeds
from corollary.dynamics.landscape import Comparison, Curvature, compare_runs, curvature, scores
from corollary.dynamics.mode_connectivity import path_figure
from corollary.dynamics.phases import DIGITS, Phase, Thresholds, phase_of
from corollary.dynamics.states import stacked, state_of
from corollary.engine import adam, cross_entropy, population, sgd, warmup_cosine
from corollary.evidence import Figure, Training

ZOO_TRAINING = Training("sgd", learning_rate=0.05, batch_size=32, momentum=0.9, weight_decay=5e-4, epochs=30)
"""The recipe of the digits zoo at a batch size in its middle."""


@final
@dataclass(frozen=True)
class Placement:
    """A network's own metrics, the comparison with its other runs (network first in each pair), and its phase."""

    train_loss: float
    train_error: float
    test_loss: float
    test_accuracy: float
    curvature: Curvature
    comparison: Comparison
    phase: Phase

    def figure(self) -> Figure:
        """Training error on the way from the network to its other runs."""
        return path_figure(self.comparison.paths, "paths-to-other-runs")


def place_model(
    model: nn.Module,
    train: Batch,
    test: Batch,
    *,
    others: int | Sequence[Params] = 2,
    training: Training = ZOO_TRAINING,
    loss: Loss = cross_entropy,
    thresholds: Thresholds = DIGITS,
    seed: int = 0,
    **curves: Any,
) -> Placement:
    """The landscape metrics and the phase of `model`, a trained network.

    Args:
        train, test: `(inputs, targets)`.
        others: how often to train its architecture again, from new initial weights; or parameters and buffers by name
            of other runs that are there already.
        training: how to train it: best as `model` was. What it does not say is taken from the digits zoo.
        loss: mean over samples.
        thresholds: of the phase rule; CKA of other data and outputs may need another.
        curves: settings of `mode_connectivities`.
    Raises: BadInput, for no other runs; for a layer whose weights cannot be drawn anew; where targets are not classes.
    """
    states = retrained(model, train, others, training, loss, seed) if isinstance(others, int) else list(others)
    if not states:
        raise BadInput("a phase is told by pairs of runs: ask for at least one other, or pass its parameters")
    with evaluating(model):
        own = stacked(model, [state_of(model)])
        on_train, on_test = scores(own, train, loss), scores(own, test, loss)
        sharp = curvature(model, loss, train, seed=seed)
        pairs = [(0, index) for index in range(1, len(states) + 1)]
        compared = compare_runs(
            model, [state_of(model), *states], train, test[0], pairs=pairs, loss=loss, seed=seed, **curves
        )
    error = float(1 - on_train["accuracy"])
    return Placement(
        float(on_train["loss"]),
        error,
        float(on_test["loss"]),
        float(on_test["accuracy"]),
        sharp,
        compared,
        phase_of(error, compared.mc, compared.similarity, thresholds),
    )


def retrained(
    model: nn.Module, data: Batch, runs: int, training: Training, loss: Loss = cross_entropy, seed: int = 0
) -> list[Params]:
    """Parameters and buffers of `runs` networks like `model`, trained from new initial weights as `training` says.

    The learning rate warms up over 30 % of the steps and falls to 0 by a cosine, as in a zoo.

    Raises: BadInput, naming a layer that has parameters and no `reset_parameters`.
    """
    if runs < 1:
        raise BadInput(f"a phase is told by pairs of runs: at least one other is needed, got others={runs}")
    seeds = [Seeds(seed).integer(f"other run {index}") for index in range(runs)]
    size = training.batch_size or ZOO_TRAINING.batch_size or 1
    epochs = training.epochs or ZOO_TRAINING.epochs or 1
    steps = epochs * -(-batch_length(data[0]) // size)
    trained = population(
        [_drawn_anew(model, own) for own in seeds],
        data,
        seeds=seeds,
        loss=loss,
        optimizer=adam() if training.optimizer == "adam" else sgd(training.momentum),
        learning_rate=training.learning_rate or ZOO_TRAINING.learning_rate or 0.05,
        weight_decay=training.weight_decay,
        schedule=warmup_cosine(steps, 0.3),
        batch_size=size,
        epochs=epochs,
    )
    return [state_of(trained.member(index)) for index in range(runs)]


def _drawn_anew(model: nn.Module, seed: int) -> nn.Module:
    fresh = deepcopy(model).train()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(Seeds(seed).integer("initial weights"))
        for name, layer in fresh.named_modules():
            reset = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()
            elif next(layer.parameters(recurse=False), None) is not None:
                raise BadInput(
                    f"layer {name!r} ({type(layer).__name__}) has parameters and no reset_parameters(), so its initial "
                    "weights cannot be drawn anew: train other runs yourself and pass their parameters as others=[...]"
                )
    return fresh
