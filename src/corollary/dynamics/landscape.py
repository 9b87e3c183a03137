"""The loss landscape around trained networks: curvature at them, paths between them, and how alike they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import Batch, Inputs, Loss, Params, batch_length, map_inputs
from corollary.base.progress import track
from corollary.base.seeds import Seeds
from corollary.dynamics.mode_connectivity import ModeConnectivity, mode_connectivities
from corollary.dynamics.phases import DIGITS, Thresholds, label_phases
from corollary.dynamics.similarity import linear_cka
from corollary.dynamics.states import stacked, state_of
from corollary.dynamics.zoo import TrainedCell, Zoo
from corollary.engine import Members, cross_entropy
from corollary.engine.members import ROWS_AT_ONCE
from corollary.linalg import eigenpairs, hessian, trace

OF_NETWORKS = ("train_loss", "train_error", "test_loss", "test_accuracy", "lambda_max", "trace", "trace_error")
OF_PAIRS = ("mc", "mc_deviation", "straight_mc", "cka", "cka_deviation")


class Curvature(NamedTuple):
    """The Hessian of the training loss: largest eigenvalue with its residual, trace with its standard error."""

    largest: float
    residual: float
    trace: float
    trace_error: float


def curvature(
    model: nn.Module, loss: Loss, data: Batch, *, steps: int = 20, probes: int = 10, seed: int = 0
) -> Curvature:
    """Largest eigenvalue and trace of the Hessian of the mean loss, in the mode the model is in.

    Args:
        loss: the mean over samples, which is taken on trust here.
        steps: of Lanczos, at most; each is a Hessian-vector product.
        probes: random signs for the trace outside the top eigenvector, whose share is exact.
    Source: Hutchinson 1990; Lanczos 1950.
    """
    seeds = Seeds(seed)
    # The check of second derivatives looks at two samples: where the network is sure of both, or dead, their Hessian is
    # rounding, and a right one is refused. An operator that is not symmetric shows in the residual, which is computed.
    op = hessian(model, loss, data, check=False)
    top = eigenpairs(op, 1, steps=steps, generator=seeds("start of Lanczos"))
    total = trace(op, probes, known=top, generator=seeds("probes of the trace"))
    return Curvature(float(top.values), float(top.residuals), total.value, total.standard_error)


@final
@dataclass(frozen=True)
class Comparison:
    """Pairs of runs: the paths between them, and the similarity of what they compute (NaN for constant outputs)."""

    paths: tuple[ModeConnectivity, ...]
    cka: tuple[float, ...]

    @property
    def mc(self) -> float:
        """Mean mode connectivity along the trained curves."""
        return float(np.mean([path.mc for path in self.paths]))

    @property
    def straight_mc(self) -> float:
        """Mean mode connectivity along straight lines."""
        return float(np.mean([path.straight_mc for path in self.paths]))

    @property
    def similarity(self) -> float:
        """Mean CKA over the pairs that have one."""
        known = [value for value in self.cka if not math.isnan(value)]
        return float(np.mean(known)) if known else math.nan


def compare_runs(
    model: nn.Module,
    states: Sequence[Params],
    train: Batch,
    test_inputs: Inputs,
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
    **curves: Any,
) -> Comparison:
    """Mode connectivity (on `train`) and CKA of outputs (for `test_inputs`) of pairs of runs.

    Args:
        states: parameters and buffers by name of each run.
        pairs: indices into `states`; by default every two.
        curves: settings of `mode_connectivities`.
    Raises: BadInput, for fewer than two runs, or runs that do not fit the model.
    """
    if len(states) < 2:
        raise BadInput(
            f"mode connectivity and similarity are of pairs of runs: two or more are needed, got {len(states)}"
        )
    chosen = list(combinations(range(len(states)), 2)) if pairs is None else list(pairs)
    paths = mode_connectivities(model, [(states[a], states[b]) for a, b in chosen], train, **curves)
    outputs = _outputs(stacked(model, states), test_inputs)
    first, second = (outputs[[pair[end] for pair in chosen]] for end in (0, 1))
    return Comparison(paths, tuple(linear_cka(first, second).tolist()))


def _outputs(members: Members, inputs: Inputs) -> Tensor:
    size = max(1, ROWS_AT_ONCE // len(members))
    parts = [
        members(map_inputs(lambda tensor, i=i: tensor[i : i + size], inputs))
        for i in range(0, batch_length(inputs), size)
    ]
    return torch.cat(parts, dim=1).flatten(2)


def landscape_table(
    zoo: Zoo,
    train: Batch,
    test: Batch,
    *,
    loss: Loss = cross_entropy,
    thresholds: Thresholds = DIGITS,
    sample: Batch | None = None,
    seed: int = 0,
    **curves: Any,
) -> dict[str, np.ndarray]:
    """The landscape metrics of every cell, means over its networks (or pairs of them), and its phase.

    Networks that diverged are counted in the column `diverged` and left out; with fewer than two others the cell is of
    phase I and has no metrics of pairs (NaN).

    Args:
        train: `(inputs, targets)`, for the curves between networks.
        test: for accuracy and similarity.
        sample: training data that everything else is measured on, by default `train`; a part of a large set.
        curves: settings of `mode_connectivities`.
    Returns: columns of equal length: width, batch_size, networks, diverged, train_loss, train_error, test_loss,
        test_accuracy, lambda_max, trace, trace_error (standard error of the mean, of the random probes), mc,
        mc_deviation (between pairs), straight_mc, cka, cka_deviation, phase (its label).
    Raises: BadInput, for a zoo of one network a cell.
    Source: Schürholt et al. 2025, arXiv 2504.18072; phases as in Yang et al. 2021, arXiv 2107.11228.
    """
    if any(len(trained.seeds) < 2 for trained in zoo.cells.values()):
        raise BadInput("mode connectivity and similarity are of pairs: train the zoo with seeds=2 or more")
    rows = []
    for cell, trained in track(zoo.cells.items(), "landscape of a cell", len(zoo.cells)):
        metrics = _cell_metrics(trained, train, test, sample or train, loss, seed, **curves)
        rows.append({**cell._asdict(), **metrics})
    table = {name: np.asarray([row[name] for row in rows]) for name in rows[0]}
    return {**table, "phase": np.asarray(label_phases(table, thresholds))}


def _cell_metrics(
    trained: TrainedCell, train: Batch, test: Batch, sample: Batch, loss: Loss, seed: int, **curves: Any
) -> dict[str, Any]:
    networks = [trained.members.module(index) for index in trained.finished]
    found: dict[str, Any] = {"networks": len(trained.seeds), "diverged": len(trained.seeds) - len(networks)}
    found |= dict.fromkeys((*OF_NETWORKS, *OF_PAIRS), math.nan)
    if not networks:
        return found
    states = [state_of(network) for network in networks]
    members = stacked(networks[0], states)
    on_train, on_test = scores(members, sample, loss), scores(members, test, loss)
    sharp = np.array([curvature(network, loss, sample, seed=seed) for network in networks])
    found |= {
        "train_loss": float(on_train["loss"].mean()),
        "train_error": float(1 - on_train["accuracy"].mean()),
        "test_loss": float(on_test["loss"].mean()),
        "test_accuracy": float(on_test["accuracy"].mean()),
        "lambda_max": sharp[:, 0].mean(),
        "trace": sharp[:, 2].mean(),
        "trace_error": np.sqrt((sharp[:, 3] ** 2).sum()) / len(sharp),
    }
    if len(networks) < 2:
        return found
    compared = compare_runs(networks[0], states, train, test[0], loss=loss, sample=sample, seed=seed, **curves)
    similar = [value for value in compared.cka if not math.isnan(value)]
    return found | {
        "mc": compared.mc,
        "mc_deviation": float(np.std([path.mc for path in compared.paths])),
        "straight_mc": compared.straight_mc,
        "cka": compared.similarity,
        "cka_deviation": float(np.std(similar)) if similar else math.nan,
    }


def scores(members: Members, data: Batch, loss: Loss) -> dict[str, Tensor]:
    """`loss` and `accuracy`, `[members]` each.

    Raises: BadInput, where targets are not classes.
    """
    found = members.evaluate(data, loss)
    if "accuracy" not in found:
        raise BadInput("phases are told by the training error: the targets must be classes, as integers [samples]")
    return found
