"""The probe "noise": how hot SGD was, how far it carried the weights, and what another temperature would change."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corollary.base.errors import CorollaryError, NothingMeasured
from corollary.base.network import Inputs, Params, as_function, parameters_of
from corollary.dynamics.noise_diagram import sgd_temperature
from corollary.dynamics.noise_perceptron import SCLOCCHI_2023
from corollary.evidence import PALETTE, Coverage, Figure, Finding, Measurement, Need, Range, Subject, probe
from corollary.linalg import ntk_matrix

LAZY, FEATURES = 0.1, 0.4
"""Relative weight changes below which a network counts as lazy, and above which as having learned features."""
SAME = 1e-4
"""Relative difference of two norms that single precision and the record's own rounding explain."""
MOST, AT_ONCE = 2000, 500
KERNEL_SAMPLES = 24
BLOCK_BYTES = 2**28


@dataclass(frozen=True)
class _Path:
    """What the record says of the way the weights went: distance from the start over the norm there, by step."""

    steps: np.ndarray
    change: np.ndarray
    start_norm: float
    final_norm: float
    network_norm: float

    @property
    def total(self) -> float:
        return float(self.change[-1])

    @property
    def regime(self) -> str:
        return "lazy" if self.total < LAZY else "feature learning" if self.total >= FEATURES else "between the two"


@probe(
    "noise",
    room="dynamics",
    title="SGD noise",
    question="How hot was SGD, did the weights stay near their start or learn features, and would another "
    "temperature change that?",
    needs=Need.WEIGHTS,
    sources=(SCLOCCHI_2023,),
)
def noise(subject: Subject) -> Finding:
    """Temperature from the settings, weight and kernel change from the record and the start, points left unfitted."""
    notes: list[str] = []
    measurements = _of_settings(subject, notes)
    path = _attempt("weight change", notes, lambda: _path(subject))
    if path is not None:
        measurements += _of_path(path, notes)
        kernel = _attempt("kernel change", notes, lambda: _kernel_change(subject, path))
        measurements += [] if kernel is None else [kernel]
    if not measurements:
        raise NothingMeasured("nothing is known of how the network was trained.\n" + "\n".join(notes))
    unfitted = _attempt("points left to fit", notes, lambda: _unfitted(subject))
    measurements += [] if unfitted is None else [unfitted]
    return Finding(tuple(measurements), () if path is None else (_figure(path),), tuple(notes))


def _attempt(what: str, notes: list[str], measure: Callable[[], Any]) -> Any:
    """What was measured, or None with a note that says why it could not be."""
    try:
        return measure()
    except CorollaryError as error:
        notes.append(f"Not measured, {what}: {str(error).splitlines()[0]}.")
        return None


def _of_settings(subject: Subject, notes: list[str]) -> list[Measurement]:
    training = subject.training
    if training.optimizer != "sgd":
        notes.append(f"The temperature is that of SGD; this network was trained with {training.optimizer}.")
        return []
    if training.learning_rate is None or training.batch_size is None:
        notes.append("The temperature is learning rate over batch size: give both (--learning-rate, --batch-size).")
        return []
    heavy = training.momentum > 0
    return [
        Measurement(
            "temperature of SGD",
            sgd_temperature(training.learning_rate, training.batch_size, momentum=training.momentum),
            f"Learning rate over batch size{', over 1 - momentum' if heavy else ''}: how strong the noise of SGD is. "
            "It does not depend on the data; compare it between runs of one network.",
            reference=Range(text="networks of other widths or parametrisations have other scales"),
        )
    ]


def _path(subject: Subject) -> _Path:
    record = subject.record
    if record is None:
        raise NothingMeasured("it is read from a training record: give one (--record FILE)")
    missing = [name for name in ("distance", "weight_norm") if name not in record]
    if missing:
        raise NothingMeasured(f"the record has no {' and no '.join(missing)}: record with corollary.engine")
    steps, distance = record.measured("distance")
    norm_steps, norm = record.measured("weight_norm")
    if distance.ndim > 1:
        raise NothingMeasured("the record is of several networks: give the one of this (record.member(index))")
    if not len(steps) or norm_steps[0] != 0 or not norm[0] > 0:
        raise NothingMeasured("the record does not begin with the norm of the initial weights, at step 0")
    return _Path(steps, distance / norm[0], float(norm[0]), float(norm[-1]), _norm(_weights(subject)))


def _of_path(path: _Path, notes: list[str]) -> list[Measurement]:
    if not math.isclose(path.network_norm, path.final_norm, rel_tol=SAME):
        notes.append(
            f"The record ends at weights of norm {path.final_norm:.6g}, the network's have {path.network_norm:.6g}: it "
            "is the record of another run, or of another moment of this one."
        )
    total = path.total
    notes.append(
        f"Regimes by the relative weight change: lazy below {LAZY:g}, feature learning from {FEATURES:g} on, as in "
        "perceptrons on digits by the scale of their output. Weights before a normalisation may move without effect."
    )
    notes.append(
        "The effect of the temperature is that of networks trained until they fit every point: below a characteristic "
        "temperature none, above it the weight change is proportional to the temperature. One run cannot tell which."
    )
    hotter, colder = (f"{min(total, factor * total):.3g} to {max(total, factor * total):.3g}" for factor in (2, 0.5))
    return [
        Measurement(
            "relative weight change",
            total,
            "Distance of the last weights from the first over the norm of the first: small where the network only "
            "used the features of its start (lazy training), large where it learned its own.",
            reference=Range(text=f"lazy below {LAZY:g}, features from {FEATURES:g} on"),
            headline=True,
        ),
        Measurement("regime", path.regime, "What the relative weight change says of how the network learned."),
        Measurement(
            "weight change at twice the temperature",
            hotter,
            "Between no effect, if noise did not matter in this run, and proportionality, if it did.",
        ),
        Measurement(
            "weight change at half the temperature",
            colder,
            "Between proportionality, if noise mattered in this run, and no effect, if it did not.",
        ),
    ]


def _kernel_change(subject: Subject, path: _Path) -> Measurement:
    start = _start(subject, path)
    if start is None:
        raise NothingMeasured("the initial weights are not known: give them among the checkpoints (--checkpoints FILE)")
    if subject.data is None:
        raise NothingMeasured("the tangent kernel is of samples: give data (--data)")
    net, weights = as_function(subject.module), _weights(subject)
    x, _ = subject.sample(KERNEL_SAMPLES, "train")
    with torch.no_grad():
        outputs = net(weights, x[:1]).numel()
    held = len(x) * outputs * sum(p.numel() * p.element_size() for p in weights.values())
    if held > BLOCK_BYTES:
        x = x[: max(0, len(x) * BLOCK_BYTES // held)]
    if len(x) < 2:
        raise NothingMeasured("the Jacobian of two samples is larger than 256 MB")
    kept = {name: tensor for name, tensor in start.items() if name not in weights}

    def kernel_of(function: Callable[[Params, Inputs], Tensor], params: Params) -> Tensor:
        return ntk_matrix(function, x, outputs="trace", params=params, check=False).double()

    before = kernel_of(lambda p, inputs: net({**kept, **p}, inputs), {name: start[name] for name in weights})
    change = float((kernel_of(net, weights) - before).norm() / before.norm())
    return Measurement(
        "relative kernel change",
        change,
        "Distance of the tangent kernel from that of the initial weights, over the norm of that: near 0 training was "
        "that of a fixed kernel (lazy).",
        reference=Range(text="perceptrons on digits: below 0.1 lazy and cold, above 1 learning features"),
        coverage=Coverage(len(x), len(subject.data.train.x), "samples"),
    )


def _start(subject: Subject, path: _Path) -> Params | None:
    """The checkpoint that this run began from: its norm is the record's first, its distance the record's last."""
    weights = _weights(subject)
    for checkpoint in subject.checkpoints:
        start = {name: checkpoint[name].detach() for name in weights}
        distance = _norm({name: weights[name] - start[name] for name in weights})
        same_norm = math.isclose(_norm(start), path.start_norm, rel_tol=SAME)
        if same_norm and math.isclose(distance, path.total * path.start_norm, rel_tol=SAME):
            return checkpoint
    return None


def _unfitted(subject: Subject) -> Measurement:
    if subject.data is None or subject.task != "classification":
        raise NothingMeasured("they are the training samples of wrong class: give labelled data (--data)")
    x, y = subject.sample(MOST, "train")
    assert y is not None  # classes are labels
    wrong: list[Tensor] = []
    with torch.no_grad():
        for inputs, labels in zip(x.split(AT_ONCE), y.split(AT_ONCE), strict=True):
            outputs = subject.module(inputs)
            if outputs.ndim != 2 or outputs.shape[1] < 2:
                raise NothingMeasured(f"one output a class is wanted, the network gives {list(outputs.shape)}")
            wrong.append(outputs.argmax(1) != labels)
            if subject.budget.remaining() == 0:
                break
    judged = torch.cat(wrong)
    share = float(judged.double().mean())
    return Measurement(
        "training points left to fit",
        share,
        "Share of training samples of wrong answer. Noise acts late, through the last of them: while some are left, "
        "the weights are still being carried.",
        error=math.sqrt(share * (1 - share) / len(judged)) if len(judged) < len(subject.data.train.x) else None,
        error_kind=f"standard error over {len(judged)} samples",
        coverage=Coverage(len(judged), len(subject.data.train.x), "samples"),
    )


def _weights(subject: Subject) -> dict[str, Tensor]:
    return parameters_of(subject.module)


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def _figure(path: _Path) -> Figure:
    return Figure(
        "noise-weight-change",
        "How far the weights went",
        "Distance from the initial weights over their norm, by step of the record; the bands are those of lazy "
        "training and of feature learning.",
        {"step": path.steps, "change": path.change},
        _draw,
    )


def _draw(axes: Any, data: Mapping[str, Any]) -> None:
    steps, change = np.asarray(data["step"]) + 1, np.asarray(data["change"])
    moved = change > 0  # the start itself has no place on a logarithmic axis
    axes.plot(steps[moved], change[moved], color=PALETTE[0], label="this run")
    top = max(2 * FEATURES, 1.5 * float(change.max()))
    axes.axhspan(
        min(LAZY / 10, float(change[moved].min(initial=LAZY))), LAZY, color=PALETTE[2], alpha=0.12, label="lazy"
    )
    axes.axhspan(FEATURES, top, color=PALETTE[1], alpha=0.12, label="feature learning")
    axes.set(xscale="log", yscale="log", xlabel="step + 1", ylabel="relative weight change")
    axes.legend()
