"""Opposing signals in a training run: two small groups of samples whose gradients oppose and whose losses alternate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import (
    Batch,
    Loss,
    Params,
    as_function,
    batch_length,
    evaluating,
    first_tensor,
    map_inputs,
    parameters_of,
)
from corollary.base.progress import track
from corollary.base.seeds import Seeds
from corollary.dynamics.opposing_gradients import CurvatureShares, curvature_shares, opposition, per_sample_losses
from corollary.dynamics.opposing_groups import GroupReading, Losses, LossHistory, OpposingGroups, extremes, group_size
from corollary.engine import TrainingRecord
from corollary.evidence import PALETTE, Figure
from corollary.linalg.problem import Problem

RANDOM_PAIRS = 10
"""Pairs of random groups where they are compared at one set of weights."""
LABELS = {"rising": "loss rose most", "falling": "loss fell most", "all": "all samples"}
COLOURS = (PALETTE[1], PALETTE[0], PALETTE[6])


class Cosines(NamedTuple):
    """At one step, the cosine of the mean gradients of the two groups, and of two random groups of their size."""

    step: int
    groups: float
    random: float


@final
@dataclass(frozen=True)
class OpposingReport:
    r"""What a run says of opposing signals.

    Args:
        reading: what the losses say: groups, alternation, concentration, persistence.
        opposition: cosine of the mean gradients of the rising and the falling group at the weights before the change,
            mean over the events; groups are chosen by their changes of loss, so compare with `random_opposition`.
        random_opposition: the same of two disjoint random groups of the same size, mean over draws.
        curvature: of the groups, at the last weights seen.
        learning_rate: as given; None if it was not.
        table: a row for each sample of the groups.
        traces: mean losses of both groups and of all samples over the window.
    """

    reading: GroupReading
    opposition: float
    random_opposition: float
    curvature: CurvatureShares
    learning_rate: float | None
    table: Mapping[str, Sequence[Any]]
    traces: Mapping[str, np.ndarray]

    @property
    def edge(self) -> float | None:
        r"""$\eta \lambda / 2$: above 1 gradient descent is unstable along the top eigenvector. None: no rate given."""
        return None if self.learning_rate is None else self.learning_rate * self.curvature.all / 2

    def figure(self) -> Figure:
        """Losses of the two groups and of all samples over the last steps."""
        return loss_traces(self.traces, self.reading)


@final
class OpposingSignals:
    """Watches a training loop for opposing groups: call `observe(step)` at each step, before or after the update.

    The network is seen in evaluation mode (batch statistics fixed, no dropout) and never written to. `data` is the full
    batch, or under mini-batches any fixed set of samples: then noise moves every loss, and only what stands out of
    `random_opposition` and `alternation_of_all` means anything. One extra forward pass a step, and the gradients of
    four groups; keeps all losses in float32.

    Args:
        net: the network being trained.
        loss: mean over samples.
        data: (inputs, targets), one pair.
        fraction: of the samples in each group, at least 5 samples.
        learning_rate: of the loop, for the edge of stability.
        seed: of the random groups.
    Raises: BadInput, for fewer than 10 samples, a loss that is no mean over samples, or samples that depend on each
        other; NotDeterministic, if two passes disagree.
    Source: Rosenfeld and Risteski 2024, arXiv:2311.04163.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Loss,
        data: Batch,
        *,
        fraction: float = 0.01,
        learning_rate: float | None = None,
        seed: int = 0,
    ):
        with evaluating(net):
            Problem.of(net, data, loss)  # checked at the door
        self._net, self._loss, self._data = net, loss, data
        self._size = group_size(batch_length(data[0]), fraction)
        self._fraction, self._learning_rate, self._seeds = fraction, learning_rate, Seeds(seed)
        self._random = self._seeds("random groups")
        self._steps: list[int] = []
        self._losses: list[Tensor] = []
        self._cosines: list[Cosines] = []
        self._state: dict[str, Tensor] = {}

    def observe(self, step: int, params: Params | None = None) -> None:
        """Take in the network as it is at `step`.

        Args: `params`: weights to see in place of the network's own, by name (buffers too).
        Raises: BadInput, for a step that is not after the last one, or losses that are not finite.
        """
        if self._steps and step <= self._steps[-1]:
            raise BadInput(f"steps are observed in order, got step {step} after step {self._steps[-1]}")
        state = {**dict(self._net.named_buffers()), **parameters_of(self._net), **(params or {})}
        with evaluating(self._net):
            losses = per_sample_losses(self._net, self._loss, self._data, params=state).float().cpu()
            if not bool(losses.isfinite().all()):
                raise BadInput(f"single losses are not finite at step {step}: training diverged; stop observing there")
            if self._steps and step == self._steps[-1] + 1:
                self._compare(torch.stack([self._losses[-1], losses]))
        self._steps.append(step)
        self._losses.append(losses)
        self._state = {name: tensor.detach().clone() for name, tensor in state.items()}

    @property
    def history(self) -> LossHistory:
        """The losses observed so far.

        Raises: BadInput, for fewer than 3 observed steps.
        """
        return LossHistory.of(self.record())

    def record(self) -> TrainingRecord:
        """The losses as a record with the column `per_sample_loss`, to be saved."""
        record = TrainingRecord({"learning_rate": self._learning_rate, "samples": batch_length(self._data[0])})
        for step, losses in zip(self._steps, self._losses, strict=True):
            record.log(step, per_sample_loss=losses)
        return record

    def groups(self, step: int | None = None) -> OpposingGroups:
        """The groups at `step`, by default at the step at which the mean loss rose most."""
        return self.history.groups(step, fraction=self._fraction)

    def report(self, *, window: int = 60) -> OpposingReport:
        """What the last `window` steps say, with the curvature at the last weights seen.

        Raises: BadInput, for fewer than 3 observed steps.
        """
        history = self.history
        reading = history.read(fraction=self._fraction, window=window)
        seen = [cosine for cosine in self._cosines if cosine.step >= history.steps[-window - 1 :][0]]
        return _report(
            *(self._net, self._loss, self._data, history, reading),
            cosines=[cosine.groups for cosine in seen if cosine.step in reading.events],
            random_cosines=[cosine.random for cosine in seen],
            params=self._state,
            window=window,
            learning_rate=self._learning_rate,
            generator=self._seeds("curvature"),
        )

    def _compare(self, losses: Float[Tensor, "2 sample"]) -> None:
        """The cosines at the weights before the change."""
        rising, falling = extremes(losses.diff(dim=0), self._size)
        drawn = torch.randperm(losses.shape[1], generator=self._random)[: 2 * self._size]
        pairs = ((rising[0], falling[0]), (drawn[: self._size], drawn[self._size :]))
        found = [opposition(self._net, self._loss, self._data, *pair, params=self._state) for pair in pairs]
        self._cosines.append(Cosines(self._steps[-1], *found))


def opposing_report(
    losses: Losses,
    net: nn.Module,
    loss: Loss,
    data: Batch,
    *,
    fraction: float = 0.01,
    window: int = 60,
    learning_rate: float | None = None,
    seed: int = 0,
) -> OpposingReport:
    """The report of a run that is over, from its recorded losses and the network at its end.

    Args:
        losses: a record with the column `per_sample_loss`, or a matrix [step, sample]; see `LossHistory.of`.
        net: its weights stand in for those of the steps at which groups were read, for the opposition.
        data: the recorded samples in the order of the columns, (inputs, targets).
    Raises: BadInput, for fewer than 3 recorded steps, or data of another number of samples.
    """
    history = LossHistory.of(losses)
    samples = batch_length(data[0])
    if history.losses.shape[1] != samples:
        raise BadInput(f"losses of {history.losses.shape[1]} samples were recorded, but the data has {samples}")
    reading = history.read(fraction=fraction, window=window)
    rising, falling, _ = reading.groups
    generator = Seeds(seed)("random groups")
    drawn = [torch.randperm(samples, generator=generator)[: 2 * len(rising)].chunk(2) for _ in range(RANDOM_PAIRS)]
    with evaluating(net):
        cosine = opposition(net, loss, data, rising, falling)
        random_cosines = [opposition(net, loss, data, *pair) for pair in drawn]
    return _report(
        *(net, loss, data, history, reading),
        cosines=[cosine],
        random_cosines=random_cosines,
        params=parameters_of(net),
        window=window,
        learning_rate=learning_rate,
        generator=generator,
    )


def _report(
    net: nn.Module,
    loss: Loss,
    data: Batch,
    history: LossHistory,
    reading: GroupReading,
    *,
    cosines: Sequence[float],
    random_cosines: Sequence[float],
    params: Params,
    window: int,
    learning_rate: float | None,
    generator: torch.Generator,
) -> OpposingReport:
    with evaluating(net):
        curvature = curvature_shares(net, loss, data, reading.groups, params=params, generator=generator)
        table = _table(net, data, history, reading.groups, params)
    return OpposingReport(
        reading=reading,
        opposition=float(np.mean(cosines)),
        random_opposition=float(np.mean(random_cosines)),
        curvature=curvature,
        learning_rate=learning_rate,
        table=table,
        traces=traces(history, reading.groups, window),
    )


def _table(
    net: nn.Module, data: Batch, history: LossHistory, groups: OpposingGroups, params: Params
) -> dict[str, list[Any]]:
    inputs, targets = data
    rows = torch.cat([groups.rising, groups.falling])
    x = map_inputs(lambda tensor: tensor[rows.to(tensor.device)], inputs)
    with torch.no_grad():
        outputs = as_function(net)(params, x)
    entries = first_tensor(x).reshape(len(rows), -1).double()
    pair = int((history.steps == groups.step).nonzero()[0, 0])
    return {
        "sample": rows.tolist(),
        "group": ["rising"] * len(groups.rising) + ["falling"] * len(groups.falling),
        "target": _answers(targets[rows.to(targets.device)]),
        "prediction": _answers(outputs),
        "loss": history.losses[pair, rows].tolist(),
        "change": history.changes[pair, rows].tolist(),
        "input_mean": entries.mean(dim=1).tolist(),
        "input_deviation": entries.std(dim=1, correction=0).tolist(),
    }


def replay(
    net: nn.Module,
    loss: Loss,
    data: Batch,
    *,
    learning_rate: int | float,
    steps: int = 60,
    momentum: int | float = 0.0,
    weight_decay: int | float = 0.0,
    fraction: float = 0.01,
    seed: int = 0,
) -> OpposingSignals:
    """Some steps of full-batch gradient descent from a trained network, watched for opposing groups.

    The network is in evaluation mode, and stays as it is: copies of its weights move. Ends early where it diverges.

    Args: as for `torch.optim.SGD` and `OpposingSignals`.
    """
    watcher = OpposingSignals(net, loss, data, fraction=fraction, learning_rate=learning_rate, seed=seed)
    params = {name: tensor.clone().requires_grad_() for name, tensor in parameters_of(net).items()}
    optimizer = torch.optim.SGD(params.values(), lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
    function, (inputs, targets) = as_function(net), data
    largest = torch.finfo(torch.float32).max / len(targets)  # single losses are kept in float32
    for step in track(range(steps + 1), "steps of gradient descent"):
        with evaluating(net):
            value = loss(function(params, inputs), targets)
        if not float(value.detach()) <= largest:
            break
        watcher.observe(step, params)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return watcher


def traces(history: LossHistory, groups: OpposingGroups, window: int = 60) -> dict[str, np.ndarray]:
    """Mean losses of both groups and of all samples over the last `window` steps, as columns."""
    steps, losses = history.steps[-window - 1 :], history.losses[-window - 1 :]
    means = {"rising": losses[:, groups.rising], "falling": losses[:, groups.falling], "all": losses}
    return {"step": steps.numpy(), **{name: part.double().nanmean(dim=1).numpy() for name, part in means.items()}}


def loss_traces(columns: Mapping[str, np.ndarray], reading: GroupReading) -> Figure:
    """The figure of `traces`."""
    return Figure(
        "opposing-losses",
        "Losses of the two groups",
        f"Mean loss of the {len(reading.groups.rising)} samples whose loss rose most at step {reading.groups.step} "
        "(dotted line), of as many whose loss fell most, and of all. At the edge of stability the two groups take "
        "turns; below it all lines run smoothly.",
        {**columns, "groups_of_step": [reading.groups.step]},
        _draw_traces,
    )


def _draw_traces(axes: Any, data: Mapping[str, Any]) -> None:
    for place, (name, label) in enumerate(LABELS.items()):
        axes.plot(data["step"], data[name], color=COLOURS[place], label=label, marker=".", linewidth=1.2)
    axes.axvline(data["groups_of_step"][0], color=PALETTE[6], linestyle=":", linewidth=1)
    axes.set(xlabel="step", ylabel="mean loss", yscale="log")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3)


def _answers(values: Tensor) -> list[Any]:
    """Class numbers, of labels or of rows of scores; of a single output its values."""
    if values.ndim == 2 and values.shape[1] > 1:
        return values.argmax(dim=1).tolist()
    return values.reshape(len(values), -1)[:, 0].tolist()
