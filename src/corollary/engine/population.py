"""Train many small networks as one batched program, each with its own seed, hyperparameters, labels and fate."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import Batch, Loss, Params, map_inputs
from corollary.engine.arguments import (
    PerMember,
    checked_data,
    due,
    initial_members,
    member_batches,
    member_seeds,
    noisy_targets,
    per_member,
    population_size,
    step_counts,
    validation_sets,
)
from corollary.engine.members import Members
from corollary.engine.process import Outcome, Process, Run, run
from corollary.engine.record import Schedule, TrainingRecord
from corollary.engine.rules import Rule, sgd
from corollary.engine.sampling import Order
from corollary.engine.schedules import LearningRateSchedule
from corollary.engine.scores import cross_entropy
from corollary.engine.training import Trainer, TrainingState

_OUTCOMES = tuple(Outcome)


class MemberOutcome(NamedTuple):
    """How one member ended, and at which step (the number of updates behind its last weights)."""

    outcome: Outcome
    step: int


@final
@dataclass(frozen=True)
class Population:
    """Trained networks, stacked.

    Attributes:
        final: the members after their last update.
        best: the members at their lowest monitored loss, if `validation` or `patience` was given.
        snapshots: the members at the steps asked for.
        record: measurements by step, one column entry per member; NaN once a member has ended.
        outcomes: one per member.
        seeds: one per member; `population(..., size=1, seeds=[seeds[i]])` repeats member `i` alone.
        steps: updates of the member that made most.
        training_set: `(inputs, targets)` of a member by index: its subset, with its label noise.
    """

    final: Members
    best: Members | None
    snapshots: Mapping[int, Members]
    record: TrainingRecord
    outcomes: tuple[MemberOutcome, ...]
    seeds: tuple[int, ...]
    steps: int
    loss: Loss
    training_set: Callable[[int], Batch]

    def __len__(self) -> int:
        return len(self.final)

    @property
    def params(self) -> Params:
        """Final parameters by name, `[members, ...]`."""
        return self.final.params

    @property
    def buffers(self) -> Params:
        """Final buffers and frozen parameters by name, `[members, ...]`."""
        return self.final.buffers

    @property
    def finished(self) -> tuple[bool, ...]:
        """For each member, whether it made its steps or met its stopping rule: neither diverged nor out of time."""
        return tuple(outcome in (Outcome.FINISHED, Outcome.STOPPED) for outcome, _ in self.outcomes)

    def member(self, index: int) -> nn.Module:
        """Member `index` after its last update, as a module of its own in evaluation mode."""
        return self.final.module(index)

    def evaluate(self, data: Batch) -> dict[str, Tensor]:
        """`{"loss": [members], "accuracy": [members]}` of the final members on `data`, in evaluation mode."""
        return self.final.evaluate(data, self.loss)


def population(
    nets: Callable[..., nn.Module] | Sequence[nn.Module],
    data: Batch,
    *,
    size: int | None = None,
    seeds: int | Sequence[int] = 0,
    width: PerMember | None = None,
    initial_scale: PerMember = 1.0,
    subsets: Sequence[Tensor] | None = None,
    label_noise: PerMember = 0.0,
    loss: Loss = cross_entropy,
    optimizer: Rule | None = None,
    learning_rate: PerMember = 0.1,
    weight_decay: PerMember = 0.0,
    schedule: LearningRateSchedule | None = None,
    gradient_clip: float | None = None,
    batch_size: PerMember | None = None,
    order: Order = "shuffle",
    drop_last: bool = False,
    steps: int | None = None,
    epochs: int | None = None,
    validation: Batch | Mapping[str, Batch] | None = None,
    measure_train: bool = False,
    measures: Mapping[str, Callable[[Members], Tensor]] | None = None,
    record_every: int | Schedule | None = None,
    snapshots: Sequence[int] = (),
    patience: int | None = None,
    stop_when: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
    diverged_above: float = math.inf,
    seconds: float | None = None,
    checkpoint: Path | str | None = None,
) -> Population:
    r"""Train a population of networks as one batched program: $w_i \leftarrow w_i - \eta_i\, u(\nabla L_i(w_i))$.

    Every member is exactly the run it would be alone: its initial weights, batches and label noise are functions of
    its own seed (only dropout masks are drawn for all members together). A member that diverges, or meets a stopping
    rule, is frozen with its outcome and its step; the others do not notice, and once a quarter have ended, those that
    have are no longer computed. Whatever is called "one per member" may
    be one number for all, or a sequence or tensor `[members]`.

    What is measured at step t belongs to the weights after t updates: `loss` and `accuracy` on the batch of step t in
    training mode, `learning_rate`, `gradient_norm`, `weight_norm`, `distance` (from the initial weights), then what
    `validation`, `measure_train` and `measures` ask for. The last weights are always measured.

    Args:
        nets: a function that makes a network with PyTorch's default generator (called as `nets()`, or `nets(width)`
            where `width` is given), or modules to start from; they are copied, never written to.
        data: training set `(inputs, targets)`, shared by all members; inputs a tensor, a tuple or a mapping.
        size: number of members, where nothing given has one entry per member.
        seeds: one per member (equal seeds for paired comparisons), or one integer from which they are derived.
        width: passed to `nets`, one per member. Narrow members are padded with zeros to the widest, which is exact
            unless a layer mixes units (LayerNorm, attention); such networks are refused.
        initial_scale: factor on all initial trainable parameters, one per member.
        subsets: for each member the indices of the samples it trains on; repeats count as often as they stand there.
        label_noise: fraction of a member's training labels changed to another class, one per member.
        loss: (outputs, targets) -> mean over samples.
        optimizer: an update rule, `sgd(...)` (the default), `adam(...)` or your own `Rule`.
        learning_rate: one per member.
        weight_decay: one per member.
        schedule: step -> factor on the learning rate, a number or `[members]`; `decay_every`, `warmup_cosine`.
        gradient_clip: largest gradient norm of a member; longer gradients are shortened to it.
        batch_size: one per member; by default all samples at once (gradient descent). Members of different batch
            sizes run with masked samples, which BatchNorm does not allow.
        order: how an epoch visits samples, see `batch_order`.
        drop_last: leave out the last batch of an epoch where it is smaller.
        steps: updates of each member. Give this or `epochs`.
        epochs: passes of each member over its own training set; then members may make different numbers of steps.
        validation: `(inputs, targets)`, measured as `test_loss` and `test_accuracy`; or several by name, measured as
            `<name>_loss` and `<name>_accuracy`. The first is monitored for the best weights.
        measure_train: also measure `train_loss` and `train_accuracy` over each member's whole training set, in
            evaluation mode.
        measures: further columns by name: members -> `[members]`, or `[members, ...]` of a fixed shape.
        record_every: when to measure: every so many steps, or a schedule; by default about 100 times.
        snapshots: steps whose weights are kept; 0 is the start.
        patience: a member stops after this many measurements without a new lowest monitored loss: that of the first
            `validation` set, else `train_loss`, else `loss`.
        stop_when: measured columns -> which members stop here, boolean `[members]`; asked at each measurement.
        diverged_above: a larger loss counts as diverged; by default only a loss or gradient that is not finite.
        seconds: time budget.
        checkpoint: file to save to, at intervals and when interrupted, and to resume from, bit-equal.
    Returns: the trained members, their record and outcomes.
    Raises: BadInput, for data that is empty, unequal in length, or not finite; for anything per member of the wrong
        length; for networks that differ in more than width or cannot be batched; for a checkpoint of another run.
    Source: stacking as in torch.func's model ensembling; the rules as in their own sources.
    """
    inputs, targets = checked_data(data)
    sets = validation_sets(validation)
    given = {
        "nets": nets,
        "seeds": seeds,
        "width": width,
        "subsets": subsets,
        "initial_scale": initial_scale,
        "label_noise": label_noise,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "batch_size": batch_size,
    }
    count = population_size(size, given)
    each_seed = member_seeds(seeds, count)
    members = initial_members(nets, inputs, each_seed, per_member(initial_scale, count, "initial_scale"), width)
    batches = member_batches(members, inputs, each_seed, subsets, batch_size, order, drop_last)
    noisy, own_targets = noisy_targets(targets, per_member(label_noise, count, "label_noise"), batches)
    limits = step_counts(steps, epochs, batches.steps_per_epoch)
    _refuse_unreached(snapshots, max(limits))
    like = next(iter(members.params.values()))
    trainer = Trainer(
        members=members,
        inputs=inputs,
        targets=noisy,
        own_targets=own_targets,
        batches=batches,
        shared_batch=subsets is None and batches.full,
        loss=loss,
        rule=sgd() if optimizer is None else optimizer,
        learning_rate=per_member(learning_rate, count, "learning_rate").to(like),
        weight_decay=per_member(weight_decay, count, "weight_decay").to(like),
        schedule=schedule,
        gradient_clip=gradient_clip,
        limits=tuple(limits),
        record_at=due(record_every, max(limits)),
        snapshot_steps=frozenset(snapshots),
        validation=sets,
        measure_train=measure_train,
        measures=dict(measures or {}),
        monitor=f"{next(iter(sets))}_loss" if sets else "train_loss" if measure_train else "loss",
        patience=patience,
        keep_best=bool(sets) or patience is not None,
        stop_when=stop_when,
        diverged_above=diverged_above,
    )
    done = _run(trainer, max(limits), seconds, checkpoint)
    return _result(trainer, done)


def _run(trainer: Trainer, steps: int, seconds: float | None, checkpoint: Path | str | None) -> Run[TrainingState]:
    _keep_freed_memory()
    count, dtype = len(trainer.members), trainer.learning_rate.dtype
    return run(
        Process(trainer.init, trainer.step, trainer.finish, trainer.save, trainer.load),
        steps=steps,
        stop=trainer.is_over,
        seconds=seconds,
        checkpoint=checkpoint,
        identity="" if checkpoint is None else trainer.identity(),
        meta={"members": count, "optimizer": trainer.rule.name, "dtype": str(dtype)},
        doing=f"training {count} networks",
    )


def _result(trainer: Trainer, done: Run[TrainingState]) -> Population:
    state, members = done.state, trainer.members

    def training_set(index: int) -> Batch:
        rows = trainer.batches.subsets[index].to(trainer.targets.device)
        targets = trainer.targets[index] if trainer.own_targets else trainer.targets
        return map_inputs(lambda t: t[rows], trainer.inputs), targets[rows]

    return Population(
        final=members.with_values(state.params, state.buffers),
        best=members.with_values(**state.best) if state.best else None,
        snapshots={step: members.with_values(**kept) for step, kept in sorted(state.snapshots.items())},
        record=done.record,
        outcomes=tuple(
            MemberOutcome(_OUTCOMES[code], step)
            for code, step in zip(state.outcome.tolist(), state.ended.tolist(), strict=True)
        ),
        seeds=trainer.batches.seeds,
        steps=done.steps,
        loss=trainer.loss,
        training_set=training_set,
    )


def _refuse_unreached(snapshots: Sequence[int], steps: int) -> None:
    if unreached := [step for step in snapshots if not 0 <= step <= steps]:
        raise BadInput(f"snapshots are asked for at steps {unreached}, but this run has steps 0 to {steps}")


def _keep_freed_memory() -> None:
    """Have the C library keep what a step frees, for the next step, instead of giving it back to the system.

    glibc returns the end of its heap whenever more of it is free than twice the largest block it ever freed to the
    system; each step of a population would then pay page faults for its activations (a fifth of its time). Freeing
    one large block, never touched and so never real memory, raises that mark. Other allocators are unaffected.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
