"""The probe "batch": how the largest stable learning rate depends on batch size, and what that means for yours."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from corollary.base.errors import BadInput, NothingMeasured
from corollary.base.network import batches
from corollary.dynamics.batch_curvature import GRANZIOL_2022, BatchCurvature, batch_curvature_curve
from corollary.dynamics.broadening import Broadening, OptimizerName, fit_broadening, max_learning_rate
from corollary.evidence import Coverage, Finding, Measurement, Need, Range, Subject, Training, probe
from corollary.linalg import hessian

MOST_SAMPLES, FEWEST_SAMPLES = 4096, 128
SIZES = (8, 32, 128, 512, 2048)
REPEATS, STEPS, NOISE_PROBES = (24, 12, 6), 15, 2
"""How many batches of each size, at best and where the budget is short."""
AT_ONCE = 1024
UNSAID_BATCH = 64
"""The batch size that numbers are given for where the user's is not known."""
FACTORS = (1, 2, 4, 8)
LANCZOS_SECONDS = 4e-4
"""Of one Lanczos step beside its product, on a small network."""
FAILED = 0.6
"""Mean relative error beyond which the law says nothing about the batches."""


@dataclass(frozen=True)
class _Plan:
    """How much is measured: so many samples stand for all, with batches of these sizes."""

    samples: int
    sizes: tuple[int, ...]
    repeats: int


@probe(
    "batch",
    room="dynamics",
    title="Batch size and learning rate",
    question="Which learning rate goes with which batch size, and from which batch on is a larger one no use?",
    needs=Need.GRADIENTS,
    data="targets",
    sources=(GRANZIOL_2022,),
)
def batch_probe(subject: Subject) -> Finding:
    """The curve of the batch Hessian's largest eigenvalue, the law fitted to it, and the learning rates it gives."""
    x, y = subject.sample(MOST_SAMPLES, "train")
    assert subject.data is not None  # the probe asks for targets
    of = len(subject.data.train.x)
    if y is None:
        raise NothingMeasured("the Hessian is of a loss: it needs targets")
    if len(x) < 2 * SIZES[0]:
        raise NothingMeasured(f"batches smaller than all data are compared; {len(x)} samples are too few")
    curve = _curve(subject, x, y)
    if not curve.full_largest > 0:
        raise NothingMeasured("the loss curves upwards in no direction here, so that every learning rate is stable")
    # The sample stands for all data; batches of all data are measured in the user's own number of samples.
    law = replace(fit_broadening(curve), samples=of)
    about, notes = _of_law(law, curve, of), _notes(curve, of, subject.training)
    if float(law.relative_errors.mean()) > FAILED:
        why = (
            "The law does not describe these batches, so no rates are read from it: few batches were measured, or few "
            "samples carry most of the curvature and most batches miss them. A larger --budget measures more."
        )
        return Finding(about[1:], (law.figure(), curve.figure()), (why, *notes))
    return Finding((*about, *_of_rates(law, subject.training)), (law.figure(), curve.figure()), notes)


def _curve(subject: Subject, x: Tensor, y: Tensor) -> BatchCurvature:
    plan = _plan(subject, x, y)
    x, y = x[: plan.samples], y[: plan.samples]
    return batch_curvature_curve(
        subject.module,
        subject.loss,
        (x, y),
        plan.sizes,
        repeats=plan.repeats,
        steps=STEPS,
        probes=NOISE_PROBES,
        seed=subject.seeds.integer("batch curvature"),
        samples_at_once=AT_ONCE,
    )


def _plan(subject: Subject, x: Tensor, y: Tensor) -> _Plan:
    """Fewer samples, then fewer batch sizes, then fewer batches of each, until the budget will do."""
    few = min(len(x) // 2, 64)
    fixed, slope = _cost(subject, x, y, few)
    budget = 0.8 * subject.budget.remaining()
    plan = _Plan(len(x), SIZES, REPEATS[0])
    for samples in (len(x), 1024, 512, 256, FEWEST_SAMPLES):
        for sizes in (SIZES, SIZES[::2]):
            for repeats in REPEATS:
                taken = min(samples, len(x))
                plan = _Plan(taken, tuple(size for size in sizes if size <= taken // 2), repeats)
                if _seconds(plan, fixed, slope) <= budget:
                    return plan
    return plan


def _cost(subject: Subject, x: Tensor, y: Tensor, few: int) -> tuple[float, float]:
    """Seconds of a product: a fixed part, and one for each sample."""
    times = []
    for samples in (few, min(len(x), 8 * few)):
        try:
            op = hessian(subject.module, subject.loss, batches((x[:samples], y[:samples]), AT_ONCE))
        except BadInput as error:
            raise NothingMeasured(f"the Hessian of this network could not be had.\n{error}") from error
        vector = op.flatten({name: p.detach() for name, p in subject.module.named_parameters() if p.requires_grad})
        _ = op @ vector  # the first product builds the graph
        start = time.perf_counter()
        _ = float((op @ vector)[0])
        times.append(time.perf_counter() - start)
    slope = max(0.0, (times[1] - times[0]) / max(1, min(len(x), 8 * few) - few))
    return times[0] + LANCZOS_SECONDS, slope


def _seconds(plan: _Plan, fixed: float, slope: float) -> float:
    products = STEPS + NOISE_PROBES + 4  # two for residuals, two to build the graph
    each = [products * (fixed + slope * size) for size in plan.sizes]
    return plan.repeats * sum(each) + 3 * products * (fixed + slope * plan.samples)


def _of_law(law: Broadening, curve: BatchCurvature, of: int) -> tuple[Measurement, ...]:
    moment, error = curve.moment_kappa()
    errors = law.relative_errors
    return (
        Measurement(
            "critical batch size",
            law.critical_batch,
            "Batch size at which the largest stable learning rate is half of what batches of all data allow: well "
            "below it the rate must shrink with the batch, well above it a larger batch allows no larger rate.",
            unit="samples",
            error=law.critical_batch_error,
            error_kind="standard deviation over resamplings of the batches",
            coverage=Coverage(curve.samples, of, "samples"),
            headline=True,
        ),
        Measurement(
            "largest eigenvalue, all data",
            law.eigenvalue,
            "Sharpness of the loss over all samples that were measured; batches are sharper by their noise.",
        ),
        Measurement(
            "noise of the Hessian",
            law.kappa,
            "The one constant of the law, kappa: a batch of b samples broadens the spectrum by kappa over the root of "
            f"b. Read from the size of the noise alone it would be {moment:.3g} ± {error:.1g}: low-rank noise pushes "
            "eigenvalues further out.",
        ),
        Measurement(
            "error of the law",
            float(errors.mean()),
            "Mean relative distance of the law from the measured largest eigenvalues; above 0.3 do not lean on it.",
            reference=Range(high=0.3),
        ),
    )


def _of_rates(law: Broadening, training: Training) -> list[Measurement]:
    batch = min(training.batch_size or UNSAID_BATCH, law.samples)
    rate, momentum = training.learning_rate, training.momentum
    # Checked where the settings are made: a Training knows these two optimizers only.
    optimizer: OptimizerName = "adam" if training.optimizer == "adam" else "sgd"
    found: list[Measurement] = []
    if optimizer == "sgd":
        largest = max_learning_rate(law, batch, momentum=momentum)
        found.append(
            Measurement(
                f"largest stable learning rate, batch {batch}",
                largest,
                f"2 (1 + momentum) over the largest eigenvalue of a batch, momentum {momentum:g}: around these weights "
                "larger gradient steps grow from step to step.",
            )
        )
        if rate is not None:
            found.append(
                Measurement(
                    "learning rate over the largest stable one",
                    rate / largest,
                    "Below 1 steps were stable around these weights; well below 1 a larger rate would have been, too.",
                    reference=Range(high=1.0),
                )
            )
    for factor in FACTORS:
        other = factor * batch
        if other > law.samples or (rate is None and optimizer == "adam"):
            continue
        known = None if rate is None else (batch, rate)
        value = max_learning_rate(law, other, optimizer, reference=known, momentum=momentum)
        if rate is None and factor == 1:
            continue  # the largest stable rate at this batch is there already
        name = "learning rate" if rate is not None else "largest stable learning rate,"
        found.append(Measurement(f"{name} for a batch of {other}", value, _meaning(factor, optimizer, known)))
    return found


def _meaning(factor: int, optimizer: OptimizerName, known: tuple[int, float] | None) -> str:
    if known is None:
        return "2 (1 + momentum) over the largest eigenvalue that the law gives for a batch of this size."
    if factor == 1:
        return "The rate you train with at this batch: the others are scaled from it."
    law = "the root of the effective batch, up to the critical one" if optimizer == "adam" else "one over its sharpness"
    return f"Your rate, {known[1]:g} at a batch of {known[0]}, scaled to this batch by {law}."


def _notes(curve: BatchCurvature, of: int, training: Training) -> tuple[str, ...]:
    sizes: Sequence[int] = curve.batch_sizes
    notes = [
        f"{curve.largest.shape[1]} batches each of {', '.join(map(str, sizes))} from {curve.samples} of {of} training "
        "samples, in evaluation mode; the law is of the weights as they are now, not of those before training.",
        f"Largest residual of an eigenvalue: {float(np.max(curve.residuals.numpy())):.2g}.",
    ]
    if training.batch_size is None:
        notes.append(f"Your batch size is not known (--batch-size): numbers are for {min(UNSAID_BATCH, of)}.")
    if training.learning_rate is None:
        what = "the scale of Adam's rate is not in the spectrum" if training.optimizer == "adam" else "limits are shown"
        notes.append(f"Your learning rate is not known (--learning-rate): {what}.")
    return tuple(notes)
