"""One training step of all members at once: their gradients, what is measured, who ends, and the update of the others.

Members are independent, so the gradient of the sum of their losses holds the gradient of each: one ordinary backward
pass through the batched forward pass, which costs less than a batched gradient transform.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from corollary.base.network import Batch, Inputs, Loss, map_inputs
from corollary.base.seeds import Seeds
from corollary.engine.members import ROWS_AT_ONCE, Members
from corollary.engine.process import Outcome
from corollary.engine.record import Schedule
from corollary.engine.rules import Rule, Slots, along
from corollary.engine.sampling import Batches
from corollary.engine.schedules import LearningRateSchedule
from corollary.engine.scores import accuracy_of, hits
from corollary.engine.storage import fingerprint

_OUTCOMES = tuple(Outcome)


@dataclass
class TrainingState:
    """Everything a population carries from step to step; tensors have a leading members axis.

    Attributes:
        step: updates made so far.
        alive: who is still training.
        outcome: index into `Outcome` of how a member ended, -1 while it trains; `ended` is its last step.
        best_value: lowest monitored loss so far, and `since` the measurements made since then.
        best, snapshots: `{"params": ..., "buffers": ...}` at each member's best, and by step.
    """

    step: int
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    slots: Slots
    alive: Tensor
    outcome: Tensor
    ended: Tensor
    best_value: Tensor
    since: Tensor
    best: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    snapshots: dict[int, dict[str, dict[str, Tensor]]] = field(default_factory=dict)


class Pass(NamedTuple):
    """What one forward and backward pass gave.

    Fields:
        rows: the members it was of, or None for all; to the others it gave zeros.
        outputs, targets, sample_weights, buffers: of those members; all else is of all members.
    """

    rows: Tensor | None
    losses: Tensor
    outputs: Tensor
    targets: Tensor
    sample_weights: Tensor | None
    buffers: dict[str, Tensor]
    gradients: dict[str, Tensor]


@final
@dataclass(frozen=True)
class Trainer:
    """The configuration of a population, checked, and its `init`, `step` and `finish` (see `Process`).

    Attributes:
        members: the stack, with initial parameters and buffers.
        inputs, targets: training data, shared; `targets` is `[members, samples]` where labels differ.
        own_targets: whether they do.
        shared_batch: whether every step of every member sees all the data.
        limits: number of updates of each member.
        monitor: the measured column that early stopping and the best weights go by.
    """

    members: Members
    inputs: Inputs
    targets: Tensor
    own_targets: bool
    batches: Batches
    shared_batch: bool
    loss: Loss
    rule: Rule
    learning_rate: Tensor
    weight_decay: Tensor
    schedule: LearningRateSchedule | None
    gradient_clip: float | None
    limits: tuple[int, ...]
    record_at: Schedule
    snapshot_steps: frozenset[int]
    validation: Mapping[str, Batch]
    measure_train: bool
    measures: Mapping[str, Callable[[Members], Tensor]]
    monitor: str
    patience: int | None
    keep_best: bool
    stop_when: Callable[[Mapping[str, Tensor]], Tensor] | None
    diverged_above: float

    def init(self) -> TrainingState:
        """Initial weights, nothing measured, everyone training."""
        torch.manual_seed(Seeds(self.batches.seeds[0]).integer("dropout"))
        size, device = len(self.members), self.targets.device
        return TrainingState(
            step=0,
            params={name: p.clone() for name, p in self.members.params.items()},
            buffers={name: b.clone() for name, b in self.members.buffers.items()},
            slots=self.rule.init(self.members.params),
            alive=torch.ones(size, dtype=torch.bool, device=device),
            outcome=torch.full((size,), -1, device=device),
            ended=torch.full((size,), -1, device=device),
            best_value=torch.full((size,), math.inf, dtype=torch.float64, device=device),
            since=torch.zeros(size, dtype=torch.long, device=device),
        )

    def save(self, state: TrainingState) -> dict[str, Any]:
        """The state as plain values."""
        return dict(vars(state))

    def load(self, plain: Mapping[str, Any]) -> TrainingState:
        """The inverse of `save`."""
        return TrainingState(**plain)

    def identity(self) -> str:
        """A fingerprint of all that decides what the steps do, except how many there are."""
        return fingerprint(
            *(self.members.params, self.members.buffers, self.members.masks, self.inputs, self.targets),
            *(self.batches.seeds, self.batches.subsets, self.batches.sizes, self.batches.order, self.batches.drop_last),
            *(self.loss, self.rule.name, self.learning_rate, self.weight_decay, self.schedule, self.gradient_clip),
            *(dict(self.validation), dict(self.measures), self.measure_train, self.patience, self.stop_when),
            *(sorted(self.snapshot_steps), self.diverged_above),
            self.limits if len(set(self.limits)) > 1 else None,  # one length for all may be raised later
        )

    def is_over(self, state: TrainingState) -> bool:
        """Whether no member trains any more."""
        return not bool(state.alive.any())

    def step(self, state: TrainingState) -> tuple[TrainingState, dict[str, Tensor]]:
        """Measure where due, end those who end here, update the others."""
        step = state.step
        done = self._differentiate(state)
        self._end_diverged(state, done)
        some_finish = step in self.limits
        info = self._measure(state, done) if some_finish or self.record_at(step) else {}
        self._keep_snapshot(state)
        if some_finish:
            self._end(state, self._at_limit(state), Outcome.FINISHED)
        self._update(state, done)
        state.step = step + 1
        return state, info

    def finish(self, state: TrainingState) -> dict[str, Tensor]:
        """Measure the last weights, without an update, for those who made all their steps."""
        self._keep_snapshot(state)
        if self.is_over(state):
            return {}
        done = self._differentiate(state)
        self._end_diverged(state, done)
        info = self._measure(state, done)
        self._end(state, self._at_limit(state), Outcome.FINISHED)
        self._end(state, state.alive, Outcome.OUT_OF_TIME)
        return info

    def _targets_at(self, indices: Tensor, rows: Tensor | None) -> Tensor:
        if not self.own_targets:
            return _rows(self.targets, indices)
        return _of(self.targets, rows).gather(1, indices)

    def _differentiate(self, state: TrainingState) -> Pass:
        rows = _still_training(state.alive)
        members = self._members_of(state, rows)
        indices, sample_weights = self.batches(state.step)
        sample_weights = None if sample_weights is None else _of(sample_weights, rows)
        if self.shared_batch:
            inputs, own = self.inputs, (False, self.own_targets)
            targets = _of(self.targets, rows) if self.own_targets else self.targets
        else:
            indices, own = _of(indices, rows), (True, True)
            inputs, targets = map_inputs(lambda t: _rows(t, indices), self.inputs), self._targets_at(indices, rows)
        leaves = {name: p.detach().requires_grad_() for name, p in members.params.items()}
        members = members.with_values(leaves, members.buffers)
        losses, outputs, buffers = members.forward_train(inputs, targets, sample_weights, self.loss, own)
        found = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
        gradients = {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
        if members.masks is not None:  # where an activation is not 0 at 0, outgoing weights of padding have a gradient
            gradients = {name: g * members.masks[name] for name, g in gradients.items()}
        size = len(self.members)
        return Pass(
            rows=rows,
            losses=_among(losses.detach(), rows, size),
            outputs=outputs.detach(),
            targets=targets if own[1] else targets.expand(len(members), *targets.shape),
            sample_weights=sample_weights,
            buffers=buffers,
            gradients={name: _among(gradient, rows, size) for name, gradient in gradients.items()},
        )

    def _members_of(self, state: TrainingState, rows: Tensor | None) -> Members:
        members = self.members.with_values(state.params, state.buffers)
        return members if rows is None else members.select(rows)

    def _end_diverged(self, state: TrainingState, done: Pass) -> None:
        probe = done.losses
        for gradient in done.gradients.values():  # a sum is finite if its terms are; no temporary of the same size
            probe = probe + _over_entries(torch.sum, gradient)
        fine = torch.isfinite(probe) & (done.losses <= self.diverged_above)
        if not bool(fine.all()):
            self._end(state, state.alive & ~fine, Outcome.DIVERGED)

    def _end(self, state: TrainingState, who: Tensor, outcome: Outcome) -> None:
        state.outcome = torch.where(who, _OUTCOMES.index(outcome), state.outcome)
        state.ended = torch.where(who, state.step, state.ended)
        state.alive = state.alive & ~who

    def _at_limit(self, state: TrainingState) -> Tensor:
        return state.alive & torch.tensor([limit <= state.step for limit in self.limits], device=state.alive.device)

    def _rate(self, step: int) -> Tensor:
        if self.schedule is None:
            return self.learning_rate
        return self.learning_rate * self.schedule(step)

    def _measure(self, state: TrainingState, done: Pass) -> dict[str, Tensor]:
        """All columns, NaN for members that have ended; then the stopping rules and the best weights by them."""
        training, size = self._members_of(state, done.rows), len(self.members)
        values = {"loss": done.losses}
        correct = hits(done.outputs, done.targets)
        if correct is not None:
            values["accuracy"] = _among(accuracy_of(correct, done.sample_weights), done.rows, size)
        values["learning_rate"] = self._rate(state.step)
        values["gradient_norm"] = stacked_norm(done.gradients)
        values["weight_norm"] = stacked_norm(state.params)
        values["distance"] = stacked_norm({name: p - self.members.params[name] for name, p in state.params.items()})
        scores = {
            f"{name}_{key}": value
            for name, data in self.validation.items()
            for key, value in training.evaluate(data, self.loss).items()
        }
        if self.measure_train:
            scores |= {f"train_{key}": value for key, value in self._evaluate_training(training, done.rows).items()}
        values |= {name: _among(value, done.rows, size) for name, value in scores.items()}
        now = self._members_of(state, None)
        values |= {name: measure(now) for name, measure in self.measures.items()}
        stopping = self.stop_when(values).to(torch.bool) if self.stop_when is not None else None
        self._keep_best(state, values[self.monitor])
        if stopping is not None:
            self._end(state, state.alive & stopping, Outcome.STOPPED)
        return {name: _alive_only(value, state) for name, value in values.items()}

    def _evaluate_training(self, members: Members, rows: Tensor | None) -> dict[str, Tensor]:
        if self.shared_batch and not self.own_targets:
            return members.evaluate((self.inputs, self.targets), self.loss)
        subsets = self.batches.subsets if rows is None else [self.batches.subsets[row] for row in rows.tolist()]
        sizes = torch.tensor([len(subset) for subset in subsets])[:, None]
        samples = torch.nn.utils.rnn.pad_sequence(list(subsets), batch_first=True)
        weights = (torch.arange(samples.shape[1]) < sizes) / sizes.to(torch.float64)
        totals: dict[str, Tensor] = {}
        width = max(1, ROWS_AT_ONCE // len(members))
        for some, share in zip(samples.split(width, dim=1), weights.split(width, dim=1), strict=True):
            some, share = some.to(self.targets.device), share.to(self.targets.device)
            data = (map_inputs(lambda t, some=some: _rows(t, some), self.inputs), self._targets_at(some, rows))
            for name, value in members.evaluate(data, self.loss, own=True, weights=share).items():
                totals[name] = totals.get(name, 0) + value
        return totals

    def _keep_best(self, state: TrainingState, monitored: Tensor) -> None:
        better = state.alive & (monitored < state.best_value)
        state.best_value = torch.where(better, monitored.to(torch.float64), state.best_value)
        state.since = torch.where(better, 0, state.since + 1)
        if self.keep_best:
            kept = state.best or {"params": {}, "buffers": {}}
            for group, values in (("params", state.params), ("buffers", state.buffers)):
                for name, value in values.items():
                    kept[group][name] = torch.where(along(better, value), value, kept[group].get(name, value))
            state.best = kept
        if self.patience is not None:
            self._end(state, state.alive & (state.since >= self.patience), Outcome.STOPPED)

    def _keep_snapshot(self, state: TrainingState) -> None:
        over = self.is_over(state) if self.snapshot_steps else False  # then later snapshots are of the same weights
        for step in self.snapshot_steps:
            if step == state.step or (over and step > state.step):
                state.snapshots[step] = {
                    "params": {name: p.clone() for name, p in state.params.items()},
                    "buffers": {name: b.clone() for name, b in state.buffers.items()},
                }

    def _update(self, state: TrainingState, done: Pass) -> None:
        gradients = done.gradients
        if self.gradient_clip is not None:
            scale = (self.gradient_clip / (stacked_norm(gradients) + 1e-6)).clamp(max=1)
            gradients = {name: g * along(scale, g) for name, g in gradients.items()}
        rate = self._rate(state.step)
        changes = self.rule.change(state.params, gradients, state.slots, rate, self.weight_decay, state.step)
        everyone, alive = bool(state.alive.all()), state.alive.nonzero().flatten()
        for name, change in changes.items():
            if self.members.masks is not None:
                change = change * self.members.masks[name]
            if everyone:
                state.params[name] += change
            elif done.rows is None:  # a product with 0 would let a NaN through
                state.params[name] += torch.where(along(state.alive, change), change, 0)
            else:
                state.params[name].index_add_(0, alive, change.index_select(0, alive))
        kept = None if done.rows is None else state.alive.index_select(0, done.rows)
        for name, buffer in done.buffers.items():
            old = state.buffers[name]
            if kept is not None:
                old.index_copy_(0, alive, buffer[kept])
            else:
                state.buffers[name] = buffer if everyone else torch.where(along(state.alive, buffer), buffer, old)


def stacked_norm(stacks: Mapping[str, Tensor]) -> Tensor:
    """Euclidean norm over all parameters of each member, `[members]`."""
    parts = [_over_entries(torch.linalg.vector_norm, stack) for stack in stacks.values()]
    return torch.linalg.vector_norm(torch.stack(parts), dim=0)


def _over_entries(reduce: Callable[..., Tensor], stack: Tensor) -> Tensor:
    """`reduce` over all axes but the members' (flattening would copy a gradient that is stored transposed)."""
    return reduce(stack, dim=tuple(range(1, stack.ndim))) if stack.ndim > 1 else reduce(stack[:, None], dim=1)


def _still_training(alive: Tensor) -> Tensor | None:
    """Numbers of the members that still train, once so many have ended that leaving them out repays the copies."""
    rows = alive.nonzero().flatten()
    return rows if 4 * len(rows) <= 3 * len(alive) else None


def _of(stack: Tensor, rows: Tensor | None) -> Tensor:
    return stack if rows is None else stack.index_select(0, rows)


def _among(stack: Tensor, rows: Tensor | None, size: int) -> Tensor:
    """The inverse of `_of`: zeros for all other members."""
    return stack if rows is None else stack.new_zeros(size, *stack.shape[1:]).index_copy_(0, rows, stack)


def _rows(tensor: Tensor, indices: Tensor) -> Tensor:
    """`tensor[indices]`; selecting rows by one flat list is several times faster than indexing by a matrix."""
    return tensor.index_select(0, indices.flatten()).unflatten(0, indices.shape)


def _alive_only(values: Tensor, state: TrainingState) -> Tensor:
    measured = state.alive | (state.ended == state.step)  # who ends at this step was measured at it
    diverged = state.outcome == _OUTCOMES.index(Outcome.DIVERGED)
    shown = along(measured & ~diverged, values) if values.ndim else measured
    return torch.where(shown, values, math.nan)
