"""The probe "phase": sharpness and error of the network, and with other runs of it their connectivity and its phase."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corollary.base.errors import CorollaryError, NothingMeasured
from corollary.base.network import call
from corollary.dynamics.landscape import Comparison, Curvature, compare_runs, curvature
from corollary.dynamics.mode_connectivity import GARIPOV_2018, Metric, draw_paths, mode_connectivity, path_columns
from corollary.dynamics.phases import COLOURS, DIGITS, SCHUERHOLT_2025, YANG_2021, phase_of
from corollary.dynamics.similarity import KORNBLITH_2019
from corollary.dynamics.states import state_of
from corollary.engine.scores import hits
from corollary.evidence import PALETTE, Coverage, Figure, Finding, Measurement, Need, Range, Subject, probe
from corollary.linalg import hessian

MOST = 2000
"""Training samples for curvature and paths, and test samples for similarity."""
LANCZOS, PROBES = 20, 10
STEPS, POINTS = 150, 11
FEWEST_STEPS = 30
TIMED = 64
"""Samples, or steps over a tenth of it, that a cost is measured on."""


@dataclass(frozen=True)
class _Runs:
    """The comparison with other runs, how many of them, and in which metric."""

    comparison: Comparison
    steps: int
    of: int


@probe(
    "phase",
    room="dynamics",
    title="Phase of training",
    question="Is the network too small, trained too little, or well trained, and do other runs of it agree?",
    needs=Need.GRADIENTS,
    data="targets",
    sources=(SCHUERHOLT_2025, YANG_2021, GARIPOV_2018, KORNBLITH_2019),
)
def phase(subject: Subject) -> Finding:
    """Training error and curvature; from other runs of the architecture, connectivity, similarity and the phase."""
    train = _sample(subject)
    notes: list[str] = []
    loss, error = _fit(subject, train)
    sharp, count = _attempt("curvature", notes, lambda: _curvature(subject, train)) or (None, 0)
    runs = _attempt("paths to other runs", notes, lambda: _runs(subject, train)) if subject.checkpoints else None
    found = [_of_fit(loss, error, len(train[1])), *_of_curvature(sharp, count, len(train[1]))]
    figures: tuple[Figure, ...] = ()
    if runs is not None:
        found += _of_runs(runs, error)
        figures = (_figure(runs, error),)
        if runs.steps < STEPS:
            notes.append(
                f"Curves were trained for {runs.steps} of {STEPS} steps within the budget: barriers may be too high."
            )
    elif not subject.checkpoints:
        notes.append(
            "Mode connectivity, similarity and the phase are told by other runs of the same architecture: give their "
            "weights (--checkpoints run1.safetensors,run2.safetensors)."
        )
    if math.isnan(error):
        notes.append("The targets are not classes: there is no training error, by which phases are told.")
    else:
        found.append(_of_phase(runs, error))
    return Finding(tuple(found), figures, tuple(notes))


def _sample(subject: Subject) -> tuple[Tensor, Tensor]:
    x, y = subject.sample(MOST, "train")
    if y is None:
        raise NothingMeasured("the training error and its curvature need targets: give the data set a y")
    return x, y


def _attempt(what: str, notes: list[str], measure: Callable[[], Any]) -> Any:
    """What was measured, or None with a note that says why it could not be."""
    try:
        return measure()
    except CorollaryError as error:
        notes.append(f"Not measured, {what}: {str(error).splitlines()[0]}")
        return None


def _fit(subject: Subject, train: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Mean loss and share of errors (NaN where targets are not classes)."""
    x, y = train
    with torch.no_grad():
        outputs = torch.cat([call(subject.module, part) for part in x.split(256)])
    correct = hits(outputs, y)
    return float(subject.loss(outputs, y)), math.nan if correct is None else float(1 - correct.double().mean())


def _curvature(subject: Subject, train: tuple[Tensor, Tensor]) -> tuple[Curvature, int]:
    """On as many samples as its share of the budget allows: half where other runs are to be compared, else most."""
    x, y = train
    few = min(TIMED, len(y))
    share = (0.4 if subject.checkpoints else 0.7) * subject.budget.remaining()
    op = hessian(subject.module, subject.loss, (x[:few], y[:few]), check=False)  # see `curvature`
    vector = torch.ones(op.shape[0], dtype=op.dtype, device=op.device)
    seconds = _seconds(lambda: op @ vector)
    products = LANCZOS + PROBES + 4  # the rest is for residuals, and for checks of the data
    count = min(len(y), max(few, int(share / (products * seconds) * few)))
    settings: dict[str, Any] = {"steps": LANCZOS, "probes": PROBES, "seed": subject.seeds.integer("curvature")}
    return curvature(subject.module, subject.loss, (x[:count], y[:count]), **settings), count


def _seconds(task: Callable[[], object]) -> float:
    """The shorter of two runs: the first pays for what is set up."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        task()
        times.append(time.perf_counter() - start)
    return min(times)


def _runs(subject: Subject, train: tuple[Tensor, Tensor]) -> _Runs:
    """Compare with as many other runs, and for as many steps, as the budget allows."""
    test_inputs, _ = subject.sample(MOST)
    states = [state_of(subject.module), *subject.checkpoints]
    classes = hits(call(subject.module, train[0][:2]), train[1][:2]) is not None
    settings: dict[str, Any] = {
        "loss": subject.loss,
        "metric": "error" if classes else "loss",
        "seed": subject.seeds.integer("curves"),
    }

    def timed(steps: int) -> float:
        return _seconds(
            lambda: mode_connectivity(subject.module, states[0], states[1], train, steps=steps, points=3, **settings)
        )

    still = timed(0)
    step = max(0.0, timed(TIMED // 10) - still) / (TIMED // 10)
    values = still / 6 * 2 * POINTS
    budget = 0.8 * subject.budget.remaining()
    count = int(min(len(states) - 1, max(1, budget // (values + STEPS * step))))
    steps = STEPS if count > 1 else int(min(STEPS, max(FEWEST_STEPS, (budget - values) / max(step, 1e-9))))
    pairs = [(0, index) for index in range(1, count + 1)]
    compared = compare_runs(
        subject.module, states[: count + 1], train, test_inputs, pairs=pairs, steps=steps, points=POINTS, **settings
    )
    return _Runs(compared, steps, len(states) - 1)


# -------------------------------------------------------------------------------------------------------- measurements


def _of_fit(loss: float, error: float, samples: int) -> Measurement:
    if math.isnan(error):
        return Measurement("training loss", loss, f"Mean loss over {samples:,} training samples.")
    return Measurement(
        "training error",
        error,
        f"Share of {samples:,} training samples classified wrongly. Above {DIGITS.error:g} the network does not fit "
        "its data: it is too small, or was not trained to the end.",
        reference=Range(high=DIGITS.error, text="it fits"),
    )


def _of_curvature(sharp: Curvature | None, count: int, of: int) -> list[Measurement]:
    if sharp is None:
        return []
    coverage = Coverage(count, of, "training samples")
    return [
        Measurement(
            "largest Hessian eigenvalue",
            sharp.largest,
            "Curvature of the training loss in its steepest direction. Hot training (small batches, large steps) ends "
            "where it is small.",
            error=sharp.residual,
            error_kind="residual of the eigenvector",
            reference=Range(text="perceptrons on digits: 0.2 after batches of 8 to 13 after batches of 512"),
            coverage=coverage,
        ),
        Measurement(
            "Hessian trace",
            sharp.trace,
            "Sum of the curvatures of the training loss in all directions.",
            error=sharp.trace_error,
            error_kind=f"standard error over {PROBES} random probes",
            coverage=coverage,
        ),
    ]


def _of_runs(runs: _Runs, error: float) -> list[Measurement]:
    compared = runs.comparison
    pairs, known = len(compared.paths), [value for value in compared.cka if not math.isnan(value)]
    unit = "training loss" if math.isnan(error) else "training error"
    connected = None if math.isnan(error) else Range(-DIGITS.connectivity, DIGITS.connectivity, "connected")
    coverage = Coverage(pairs, runs.of, "other runs")
    kind = f"standard deviation between {pairs} pairs"
    measurements = [
        Measurement(
            "mode connectivity",
            compared.mc,
            f"How far the {unit} along a curve trained to stay low parts from its mean at the two runs: negative for a "
            "barrier, positive where networks on the way are better than both.",
            error=float(np.std([path.mc for path in compared.paths])) if pairs > 1 else None,
            error_kind=kind,
            reference=connected,
            coverage=coverage,
        ),
        Measurement(
            "straight-line connectivity",
            compared.straight_mc,
            "The same on the straight line between the weights: near 0 only if their plain average works as well.",
            error=float(np.std([path.straight_mc for path in compared.paths])) if pairs > 1 else None,
            error_kind=kind,
            coverage=coverage,
        ),
    ]
    if known:
        measurements.append(
            Measurement(
                "similarity of runs",
                compared.similarity,
                "Linear CKA of the outputs of two runs for the same inputs: 1 where they compute the same up to "
                "rotation, shift and scale.",
                error=float(np.std(known)) if len(known) > 1 else None,
                error_kind=kind,
                reference=Range(low=DIGITS.similarity, text="perceptrons on digits that generalise"),
                coverage=Coverage(len(known), runs.of, "other runs"),
            )
        )
    return measurements


def _of_phase(runs: _Runs | None, error: float) -> Measurement:
    if runs is None:
        possible = "I or II" if error > DIGITS.error else "III or IV"
        means = "too small, or trained too little" if error > DIGITS.error else "too small, or well connected"
        return Measurement("phase", possible, f"By the training error alone: {means}. Other runs would tell which.")
    compared = runs.comparison
    found = phase_of(error, compared.mc, compared.similarity, DIGITS)
    return Measurement(
        "phase",
        found.label,
        f"{found.value.partition(': ')[2].capitalize()}. By thresholds that were set for small perceptrons on digits.",
        headline=True,
    )


# --------------------------------------------------------------------------------------------------------------- figure


def _figure(runs: _Runs, error: float) -> Figure:
    paths = runs.comparison.paths
    metric = paths[0].metric
    columns = {
        **path_columns(paths),
        "mode connectivity": [path.mc for path in paths],
        "similarity": list(runs.comparison.cka),
    }
    left = f"Training {metric} on the way from the network to its other runs."
    right = (
        "Each other run by mode connectivity and similarity (CKA), among the phases of a network with this training "
        "error."
        if metric == "error"
        else "Each other run by mode connectivity and similarity (CKA)."
    )
    return Figure(
        "phase",
        "Paths to other runs, and the phase",
        f"Left: {left} Right: {right}",
        columns,
        lambda axes, data: _draw(axes, data, metric, error),
        size=(8.6, 3.6),
        panels=(1, 2),
    )


def _draw(axes: Any, data: Mapping[str, Any], metric: Metric, error: float) -> None:
    left, right = axes
    draw_paths(left, data, metric)
    connectivity = np.asarray(data["mode connectivity"])
    reach = max(0.1, 1.3 * float(np.abs(connectivity).max()))
    for label, (x0, x1), (y0, y1) in _regions(error, reach) if metric == "error" else ():
        right.fill_between([x0, x1], y0, y1, color=COLOURS[label], alpha=0.2, linewidth=0)
        right.text((x0 + x1) / 2, (y0 + y1) / 2, label, ha="center", va="center", fontsize=8)
    # Outputs that are the same for all samples have no similarity: those runs are drawn on the axis.
    right.plot(connectivity, np.nan_to_num(np.asarray(data["similarity"])), "o", color=PALETTE[0], label="other run")
    right.set(xlabel="mode connectivity", ylabel="similarity (CKA)", xlim=(-reach, reach), ylim=(0, 1.02))
    right.legend(loc="lower left")


def _regions(error: float, reach: float) -> list[tuple[str, tuple[float, float], tuple[float, float]]]:
    """The phases in the plane of connectivity and similarity, for this training error."""
    edge, similar = DIGITS.connectivity, DIGITS.similarity or 0.0
    if error > DIGITS.error:
        return [("I", (-reach, edge), (0, 1)), ("II", (edge, reach), (0, 1))]
    return [
        ("III", (-reach, -edge), (0, 1)),
        ("IV-A", (-edge, reach), (0, similar)),
        ("IV-B", (-edge, reach), (similar, 1)),
    ]
