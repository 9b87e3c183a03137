"""The probe "opposing": which training samples pull the network in opposite directions, and whether they take turns."""

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from corollary.base.errors import NothingMeasured
from corollary.base.network import as_function, parameters_of
from corollary.dynamics.opposing import OpposingReport, opposing_report, replay
from corollary.dynamics.opposing_gradients import sharpest
from corollary.dynamics.opposing_groups import LOSSES, ROSENFELD_2024, SMALLEST_GROUP, GroupReading
from corollary.evidence import Coverage, Figure, Finding, Measurement, Need, Range, Subject, probe

STEPS = 60
FEW_STEPS = 12
FEW_SAMPLES = 200
BEYOND = 1.02
"""The replay's rate over 2 / sharpness where none is known: just beyond the edge, where what opposes grows."""
PASSES_A_STEP = 1.7
"""Gradients of all samples that a step of the replay costs: its own, the single losses, and the small groups."""
PASSES_FOR_SHARPNESS = 60
"""The same for a Lanczos run; a product costs about two."""
MOST_RESIDUAL = 0.05
"""Residual over sharpness from which on the sharpness is not believed."""
SHOWN = 8
"""Samples of each group in the picture."""


class _Plan(NamedTuple):
    """What is replayed: on which samples, how many steps, at which rate; `top` is the sharpness at the start, and
    `residual` the error of it."""

    x: Tensor
    y: Tensor
    steps: int
    top: float
    residual: float
    rate: float
    momentum: float
    weight_decay: float
    notes: tuple[str, ...]


@probe(
    "opposing",
    room="dynamics",
    title="Opposing signals",
    question="Which training samples pull the network in opposite directions, and do their losses alternate?",
    needs=Need.GRADIENTS,
    data="targets",
    sources=(ROSENFELD_2024,),
)
def opposing(subject: Subject) -> Finding:
    """Groups of samples whose losses move most, from a record of single losses or a short replay of full-batch GD."""
    assert subject.data is not None  # the probe asks for targets
    x, y = subject.data.train
    if y is None or len(x) < 2 * SMALLEST_GROUP:
        raise NothingMeasured(f"two groups of {SMALLEST_GROUP} need {2 * SMALLEST_GROUP} training samples with targets")
    seed = subject.seeds.integer("opposing signals")
    notes: tuple[str, ...] = ()
    record, training = subject.record, subject.training
    if record is not None and LOSSES in record:
        if record[LOSSES].shape[-1] == len(x):
            report = opposing_report(
                record, subject.module, subject.loss, (x, y), learning_rate=training.learning_rate, seed=seed
            )
            notes = ("Read from the record of single losses; gradients are those of the network at its end.",)
            top = (report.curvature.all, report.curvature.residual)
            edges = _edges(training.learning_rate, training.momentum, top, None)
            return _finding(subject, report, x, len(x), edges, notes)
        notes = (f"The record is of {record[LOSSES].shape[-1]} samples, the training set of {len(x)}: not used.",)
    plan = _plan(subject, seed)
    watched = replay(
        *(subject.module, subject.loss, (plan.x, plan.y)),
        learning_rate=plan.rate,
        steps=plan.steps,
        momentum=plan.momentum,
        weight_decay=plan.weight_decay,
        seed=seed,
    )
    report = watched.report(window=STEPS)
    if (made := len(watched.history.steps) - 1) < plan.steps:
        notes = (*notes, f"The replay diverged after {made} steps.")
    known = training.learning_rate if training.optimizer == "sgd" else None
    edges = _edges(known, plan.momentum, (plan.top, plan.residual), report.edge)
    return _finding(subject, report, plan.x, len(x), edges, (*plan.notes, *notes))


def _plan(subject: Subject, seed: int) -> _Plan:
    few = min(FEW_SAMPLES, len(subject.sample(FEW_SAMPLES, "train")[0]))
    cost = _seconds_per_gradient(subject)
    seconds = 0.6 * subject.budget.remaining()

    def samples_in(steps: int) -> int:
        return int(seconds / (cost * (PASSES_A_STEP * steps + 2 * PASSES_FOR_SHARPNESS)))

    steps = STEPS if samples_in(STEPS) >= few else FEW_STEPS
    if samples_in(steps) < 2 * SMALLEST_GROUP:
        raise NothingMeasured(
            f"a gradient of {2 * SMALLEST_GROUP} samples takes {2 * SMALLEST_GROUP * cost:.2g} s, and a replay needs "
            "hundreds: raise the budget (--budget), or record the losses of single samples in training (--record)"
        )
    x, y = subject.sample(samples_in(steps), "train")
    assert y is not None  # the caller looked
    generator = torch.Generator().manual_seed(seed)
    found = sharpest(subject.module, subject.loss, (x, y), tolerance=1e-3, generator=generator)
    top, residual = float(found.values), float(found.residuals)
    if not residual <= MOST_RESIDUAL * abs(top):
        raise NothingMeasured(
            f"the sharpness cannot be trusted: {top:.3g} with a residual of {residual:.2g} after {found.products} "
            "products. Give the network in float64"
        )
    notes = [f"{steps} steps of gradient descent on a copy, in evaluation mode (batch statistics fixed)."]
    training = subject.training
    if training.learning_rate is not None and training.optimizer == "sgd":
        notes.append(f"As it was trained: {training}.")
        rates = (training.learning_rate, training.momentum, training.weight_decay)
        return _Plan(x, y, steps, top, residual, *rates, tuple(notes))
    if not (top > 0 and math.isfinite(top)):
        raise NothingMeasured(f"the loss has no positive curvature here: the largest eigenvalue is {top:.3g}")
    rate = 2 * BEYOND / top
    why = "none is known" if training.learning_rate is None else "Adam's is no rate of gradient descent"
    notes.append(
        f"The learning rate is {rate:.3g}, {100 * (BEYOND - 1):.0f} % beyond the edge of stability, because {why} "
        "(--learning-rate)."
    )
    return _Plan(x, y, steps, top, residual, rate, 0.0, 0.0, tuple(notes))


def _seconds_per_gradient(subject: Subject) -> float:
    """Of the mean loss, for each sample of a batch."""
    x, y = subject.sample(FEW_SAMPLES, "train")
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in parameters_of(subject.module).items()}
    function = as_function(subject.module)
    seconds = math.inf
    for _ in range(2):  # the first pass also pays for what is loaded
        start = time.perf_counter()
        assert y is not None
        torch.autograd.grad(subject.loss(function(leaves, x), y), list(leaves.values()), allow_unused=True)
        seconds = min(seconds, time.perf_counter() - start)
    return seconds / len(x)


def _edges(
    rate: float | None, momentum: float, sharpest: tuple[float, float], after: float | None
) -> tuple[Measurement, ...]:
    """The edge of stability as the network is, of its sharpness and residual, and where the replay left it."""
    top, residual = sharpest
    limit = 2 * (1 + momentum) / top if top > 0 else math.inf
    stable = Measurement(
        "largest stable learning rate",
        limit,
        "Two over the sharpness (times 1 + momentum): above it full-batch gradient descent grows along the sharpest "
        "direction.",
        error=limit * residual / top if top > 0 else None,
        error_kind="residual of Lanczos",
    )
    found = [stable]
    if rate is not None:
        found.append(
            Measurement(
                "edge of stability",
                rate * top / (2 * (1 + momentum)),
                "The learning rate it was trained with over the largest stable one: around 1 it trained at the edge.",
                reference=Range(0.9, 1.15, "full-batch gradient descent at the edge"),
            )
        )
    if after is not None:
        found.append(
            Measurement(
                "edge of stability after the replay",
                after / (1 + momentum),
                "The replay's learning rate over the largest stable one where it ended: the steps themselves lower the "
                "sharpness where it falls below 1, and then nothing alternates.",
            )
        )
    return tuple(found)


def _finding(
    subject: Subject,
    report: OpposingReport,
    x: Tensor,
    of: int,
    edges: tuple[Measurement, ...],
    notes: tuple[str, ...],
) -> Finding:
    figures = [report.figure()]
    if (picture := sample_picture(x, report, subject)) is not None:
        figures.append(picture)
    else:
        notes = (*notes, "The samples are neither images nor rows of numbers and are not drawn.")
    coverage = Coverage(len(x), of, "training samples")
    return Finding((*_measurements(report, coverage), *edges), tuple(figures), notes)


def _measurements(report: OpposingReport, coverage: Coverage) -> tuple[Measurement, ...]:
    reading, curvature = report.reading, report.curvature
    size = len(reading.groups.rising)
    return (
        Measurement(
            "opposition",
            report.opposition,
            f"Cosine of the mean gradients of the {size} samples whose loss rises most and the {size} whose loss falls "
            "most: below 0, a step that serves one group hurts the other. Compare with random groups.",
            reference=Range(text="small networks on digits: -0.3 at the edge of stability, 0 below it"),
            coverage=coverage,
            headline=True,
        ),
        Measurement(
            "opposition of random groups",
            report.random_opposition,
            "The same for two random groups of that size: what no choice of samples gives.",
        ),
        *_turns(reading),
        Measurement(
            "concentration of changes",
            reading.concentration,
            "Share of all changes of single losses, in absolute value, that 2 % of the samples make.",
        ),
        Measurement(
            "curvature of the groups",
            max(curvature.rising, curvature.falling) / curvature.all,
            "Curvature of the loss of one group (the larger one) along the sharpest direction of all, over that of "
            f"all: how much more than its share it makes; a random group has {curvature.random / curvature.all:.2g}.",
        ),
    )


def _turns(reading: GroupReading) -> tuple[Measurement, ...]:
    """How often losses turn; nothing where the record does not hold consecutive steps."""
    if math.isnan(reading.alternation):
        return ()
    return (
        Measurement(
            "alternation",
            reading.alternation,
            "Share of consecutive steps between which a loss of the two groups turns from rising to falling or back: "
            "near 1 the groups take turns, near 0 training runs smoothly.",
        ),
        Measurement(
            "alternation of all samples",
            reading.alternation_of_all,
            "The same over all samples: where it is as high, the whole batch swings along one direction.",
        ),
    )


def sample_picture(x: Tensor, report: OpposingReport, subject: Subject) -> Figure | None:
    """The first samples of both groups: square images as pictures, other numbers as rows; None for what is neither."""
    if not x.is_floating_point():
        return None
    table, classes = report.table, subject.data.classes if subject.data is not None else None
    groups = np.asarray(table["group"])
    chosen = np.concatenate([np.flatnonzero(groups == group)[:SHOWN] for group in ("rising", "falling")])
    rows = x[torch.as_tensor(np.asarray(table["sample"])[chosen]).to(x.device)].detach().cpu().float()
    columns = {
        "sample": np.asarray(table["sample"])[chosen],
        "group": groups[chosen],
        "target": [_name(table["target"][i], classes) for i in chosen],
        "prediction": [_name(table["prediction"][i], classes) for i in chosen],
    }
    images = _as_images(rows)
    across = len(chosen) // 2
    caption = (
        "Upper: samples whose loss rose most; lower: those whose loss fell most, the most extreme first. Their target, "
        "and in brackets the network's answer where it is another. What the groups share is the feature they pull at."
    )
    if images is not None:
        return Figure(
            "opposing-samples",
            "Samples of the two groups",
            caption,
            {**columns, "image": images.numpy()},
            _draw_images,
            size=(min(10.0, 1.25 * across + 0.4), 3.1),
            panels=(2, across),
        )
    return Figure(
        "opposing-samples",
        "Samples of the two groups",
        f"{caption} A row is a sample, a column one of its features.",
        {**columns, "features": rows.flatten(start_dim=1).numpy()},
        _draw_rows,
        size=(7.2, 4.4),
        panels=(2, 1),
    )


def _as_images(rows: Tensor) -> Tensor | None:
    """[n, height, width] or [n, height, width, 3]: of square vectors, matrices, and one or three channels."""
    if rows.ndim == 2:
        side = math.isqrt(rows.shape[1])
        return rows.reshape(-1, side, side) if side * side == rows.shape[1] and side >= 8 else None
    if rows.ndim == 3:
        return rows
    if rows.ndim == 4 and rows.shape[1] in (1, 3):
        return rows[:, 0] if rows.shape[1] == 1 else rows.permute(0, 2, 3, 1)
    return rows.mean(dim=1) if rows.ndim == 4 else None


def _name(value: Any, classes: tuple[str, ...] | None) -> str:
    if classes is not None and isinstance(value, int):
        return classes[value] if value < len(classes) else str(value)
    return f"{value:.3g}"


def _labels(data: Mapping[str, Any]) -> list[str]:
    pairs = zip(data["target"], data["prediction"], strict=True)
    return [target if target == answer else f"{target} ({answer})" for target, answer in pairs]


def _draw_images(axes: Any, data: Mapping[str, Any]) -> None:
    images, labels, groups = data["image"], _labels(data), list(data["group"])
    low, high = float(images.min()), float(images.max())
    shown = (images - low) / (high - low) if high > low else images
    for place, (panel, image) in enumerate(zip(axes.reshape(-1), shown, strict=True)):
        panel.imshow(image, cmap="gray", vmin=0, vmax=1)
        panel.set_title(labels[place], fontsize=8)
        panel.set(xticks=[], yticks=[])
        panel.grid(False)
        if place in (0, len(groups) // 2):
            panel.set_ylabel("loss rose" if groups[place] == "rising" else "loss fell")


def _draw_rows(axes: Any, data: Mapping[str, Any]) -> None:
    labels, groups = _labels(data), np.asarray(data["group"])
    limit = float(np.abs(data["features"]).max()) or 1.0
    for panel, group in zip(axes, ("rising", "falling"), strict=True):
        rows = np.flatnonzero(groups == group)
        drawn = panel.imshow(data["features"][rows], cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        panel.set_yticks(range(len(rows)), [labels[row] for row in rows])
        panel.set(ylabel="loss rose" if group == "rising" else "loss fell", xlabel="feature")
        panel.grid(False)
        panel.figure.colorbar(drawn, ax=panel, label="value")
