"""The probe "stability": the learning rate a network was trained with against what its curvature allows SGD."""

import math
import time

from torch import Tensor, nn

from corollary.base.errors import NothingMeasured
from corollary.base.network import call, evaluating
from corollary.dynamics.stability import MULAYOFF_2023, WU_SU_2023, StabilityReport, stability_report
from corollary.evidence import Coverage, Finding, Measurement, Need, Range, Subject, probe

MOST = 2000
FEW = 16
"""Samples that the cost is measured on; the fewest that are worth a threshold, too."""
MORE = 128
SHARE = 0.6
"""Of the budget, for the gradients: the thresholds and the picture come after them."""
MOST_OUTPUTS = 128
BATCH_SIZE = 32
"""Where the batch size is not known."""
EDGE = Range(high=1.0, text="above 1 SGD leaves this minimum")
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@probe(
    "stability",
    room="dynamics",
    title="Dynamical stability",
    question="Is this minimum stable at the learning rate and batch size it was trained with?",
    needs=Need.GRADIENTS,
    data="targets",
    sources=(WU_SU_2023, MULAYOFF_2023),
)
def stability(subject: Subject) -> Finding:
    """Trace, largest eigenvalue and mean-square threshold against the learning rate; alone where it is not known."""
    x, y = subject.sample(MOST, "train")
    assert y is not None  # the probe asks for targets
    _refuse_many_outputs(subject, x)
    n = _affordable(subject, x, y)
    report = _report(subject, x[:n], y[:n])
    assert subject.data is not None  # the probe asks for targets
    coverage = Coverage(n, len(subject.data.train.x), "training samples")
    measurements = [*_against_the_rate(report, coverage), *_thresholds(report, coverage), _sharpest(report, coverage)]
    return Finding(tuple(measurements), (report.figure(),), _notes(subject, report, coverage))


def _refuse_many_outputs(subject: Subject, x: Tensor) -> None:
    with evaluating(subject.module):
        outputs = call(subject.module, x[:1])[0].numel()
    if outputs > MOST_OUTPUTS:
        raise NothingMeasured(
            f"the network has {outputs:,} outputs for each sample, and each needs a backward pass of its own: more "
            f"than {MOST_OUTPUTS} are not measured here. corollary.dynamics.stability_report takes any number."
        )


def _affordable(subject: Subject, x: Tensor, y: Tensor) -> int:
    """How many samples fit the budget, by a straight line through the cost of two small numbers of them."""

    def seconds(count: int) -> float:
        start = time.perf_counter()
        _report(subject, x[:count], y[:count], exact=False)
        return time.perf_counter() - start

    seconds(min(FEW, len(x)))  # the first pass sets things up
    base = seconds(min(FEW, len(x)))
    spent = SHARE * subject.budget.remaining()
    if len(x) <= MORE or base * MORE / FEW > spent:
        n = min(len(x), int(FEW * spent / base))
    else:
        trial = seconds(MORE)
        slope = max(trial - base, 0.1 * trial) / (MORE - FEW)
        n = min(len(x), MORE + int((spent - trial) / slope))
    if n < min(FEW, len(x)):
        raise NothingMeasured(
            f"the curvature of {FEW} samples takes {base:.2g} seconds here, and {subject.budget.remaining():.1f} are "
            "left: give more time (--budget)."
        )
    return n


def _report(subject: Subject, x: Tensor, y: Tensor, exact: bool | None = None) -> StabilityReport:
    training = subject.training
    assert subject.data is not None  # the probe asks for targets
    return stability_report(
        subject.module,
        subject.loss,
        (x, y),
        training.learning_rate if training.optimizer == "sgd" else None,
        min(training.batch_size or BATCH_SIZE, len(x)),
        momentum=training.momentum if training.optimizer == "sgd" else 0.0,
        # Of a part of the data, batches are those of the whole: drawn as if there were no end to it.
        replacement=len(x) < len(subject.data.train.x),
        exact=exact,
    )


def _against_the_rate(report: StabilityReport, coverage: Coverage) -> list[Measurement]:
    rate = report.learning_rate
    if rate is None:
        return []
    lower, upper = report.limits(report.batch_size)
    between = (
        ""
        if report.exact
        else f" It lies between this and {rate / lower:.3g}: the threshold is bounded from both sides."
    )
    return [
        Measurement(
            "learning rate over the mean-square threshold",
            rate / upper,
            f"Above 1, the linearised steps of SGD with batch size {report.batch_size} grow in mean square away from "
            f"these weights, were they a minimum of every sample.{between}",
            reference=EDGE,
            coverage=coverage,
            headline=True,
        ),
        Measurement(
            "trace over its limit",
            rate / report.trace_limit,
            f"Learning rate times the trace of the curvature ({report.trace:.3g}) over what stability allows it at "
            "this batch size: the trace bounds the norms by which flat minima generalise. Necessary only: below 1 says "
            "nothing.",
            reference=EDGE,
            coverage=coverage,
        ),
        Measurement(
            "largest eigenvalue over the edge of stability",
            rate / report.gradient_descent_limit,
            f"Learning rate times the largest eigenvalue of the curvature ({report.largest_eigenvalue:.3g}) over "
            f"{2 * (1 + report.momentum):.3g}{', the edge of the heavy ball' if report.momentum else ''}: above 1 even "
            "full batches leave this minimum.",
            reference=EDGE,
            coverage=coverage,
        ),
    ]


def _thresholds(report: StabilityReport, coverage: Coverage) -> list[Measurement]:
    kind = f"with momentum {report.momentum:g}" if report.momentum else "without momentum"
    return [
        Measurement(
            "largest stable learning rate",
            report.mean_square_limit,
            f"Up to this rate SGD of batch size {report.batch_size}, {kind}, is stable at these weights in mean square"
            + ("." if report.exact else " (an upper bound of it)."),
            coverage=coverage,
            headline=report.learning_rate is None,
        ),
        Measurement(
            "largest stable learning rate, full batches",
            report.gradient_descent_limit,
            f"{2 * (1 + report.momentum):.3g} over the largest eigenvalue: gradient descent {kind} is stable up to it.",
            coverage=coverage,
        ),
    ]


def _sharpest(report: StabilityReport, coverage: Coverage) -> Measurement:
    moments = report.moments
    share = moments.largest_sample / (moments.samples * moments.trace) if moments.trace else math.nan
    return Measurement(
        "share of the sharpest sample",
        share,
        "Of the whole curvature, the part that one sample brings: where it is large, small batches are unstable "
        "because of the few steps that meet that sample.",
        reference=Range(text=f"even shares would be {1 / moments.samples:.1g}"),
        coverage=coverage,
    )


def _notes(subject: Subject, report: StabilityReport, coverage: Coverage) -> tuple[str, ...]:
    training, notes = subject.training, list(report.notes)
    if training.optimizer != "sgd":
        notes.append("Trained with Adam, whose steps are scaled by coordinate: thresholds are shown for SGD instead.")
    elif training.learning_rate is None:
        notes.append("The learning rate is not known: give --learning-rate to compare it with the thresholds.")
    if training.batch_size is None:
        notes.append(f"The batch size is not known (--batch-size): {report.batch_size} stands in for it.")
    elif training.batch_size > report.batch_size:
        notes.append(
            f"The batch size {training.batch_size} is above the samples measured: all of them are a batch here."
        )
    if coverage.measured < coverage.of:
        notes.append(
            f"Curvature from {coverage.measured:,} of {coverage.of:,} training samples, drawn at random: a sharper one "
            "among the others would lower the threshold of small batches."
        )
    if any(isinstance(module, _BATCH_NORMS) for module in subject.module.modules()):
        notes.append("Batch normalisation is held at its running statistics; in training it follows the batch.")
    return tuple(notes)
