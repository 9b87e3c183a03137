"""The probe "pixels": how few pixels must change before the network answers differently, seen from outside only."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.base.network import call
from corollary.evidence import PALETTE, Coverage, Figure, Finding, Measurement, Need, Subject, probe
from corollary.verify.game_search import Budget, TestReport, feature_guided_searches
from corollary.verify.saliency import WICKER_2018

IMAGES, SIMULATIONS, PARALLEL = 20, 40, 4
SMALLEST_SIDE, MOST_PIXELS = 5, 300 * 300


@probe(
    "pixels",
    room="verify",
    title="Pixels that change the answer",
    question="How many pixels must be changed before the network gives another answer?",
    needs=Need.FORWARD,
    data="inputs",
    sources=(WICKER_2018,),
)
def pixels(subject: Subject) -> Finding:
    """The median number of pixels over some of the samples, the queries that it took, and the most fragile sample."""
    if subject.task == "regression":
        raise BadInput("this is asked of classifiers, whose answer is a class; the task is regression")
    x, _ = subject.sample(IMAGES)
    shape = _image_shape(subject, x)
    low, span = _range_of(subject, shape)
    images = ((x.reshape(len(x), *shape) - low) / span).clamp(0, 1)

    def predict(rows: Tensor) -> Tensor:
        return call(subject.module, (rows * span + low).reshape(len(rows), *x.shape[1:]))

    found = feature_guided_searches(
        predict,
        images,
        budget=Budget(simulations=SIMULATIONS, seconds=max(0.1, 0.7 * subject.budget.remaining())),
        parallel=PARALLEL,
        seed=subject.seeds.integer("pixels"),
    )
    reached = [report for report in found if report.found]
    figures = (_figure(images, found, subject),) if reached else ()
    return Finding(_measurements(found, len(images[0, 0].flatten())), figures, _notes(subject, found))


def _image_shape(subject: Subject, x: Tensor) -> tuple[int, int, int]:
    """Channels, height and width of a sample; a flat one must say by its feature names that it is a picture.

    Raises: BadInput, if the samples are no pictures, or too large to be searched in a report's time.
    """
    shape: tuple[int, ...] = tuple(x.shape[1:])
    if len(shape) == 1 and subject.data is not None and subject.data.feature_names is not None:
        places = [re.fullmatch(r"pixel_(\d+)_(\d+)", name) for name in subject.data.feature_names]
        rows, columns = (1 + max((int(p[i]) for p in places if p), default=-1) for i in (1, 2))
        if all(places) and rows * columns == len(places):
            shape = (1, rows, columns)
    shape = (1, *shape) if len(shape) == 2 else shape
    if len(shape) != 3 or not x.is_floating_point() or min(shape[1:]) < SMALLEST_SIDE or shape[0] > 4:
        raise BadInput(
            f"this is asked of images: samples (channel, height, width) of at least {SMALLEST_SIDE} pixels a side, "
            f"got samples of shape {list(x.shape[1:])} of {x.dtype}"
        )
    if shape[1] * shape[2] > MOST_PIXELS:
        raise BadInput(
            f"images of {shape[1]} x {shape[2]} pixels are searched with corollary.verify.feature_guided_search, and a "
            "budget of their own"
        )
    return shape[0], shape[1], shape[2]


def _range_of(
    subject: Subject, shape: tuple[int, int, int]
) -> tuple[Float[Tensor, "channel 1 1"], Float[Tensor, "channel 1 1"]]:
    """Least value and range of each channel over the data: what black and white are to this network."""
    assert subject.data is not None  # the caller has samples of it
    parts = [part.x for part in (subject.data.train, subject.data.test) if part is not None]
    channels = [part.reshape(len(part), shape[0], -1) for part in parts]
    low = torch.stack([c.amin((0, 2)) for c in channels]).amin(0)
    high = torch.stack([c.amax((0, 2)) for c in channels]).amax(0)
    return low[:, None, None], (high - low).where(high > low, 1.0)[:, None, None]


def _measurements(found: list[TestReport], pixels: int) -> tuple[Measurement, ...]:
    needed = np.array([report.severity["L0"] for report in found])
    first = [report.first_query for report in found if report.first_query is not None]
    median = float(np.median(needed))
    coverage = Coverage(int(np.isfinite(needed).sum()), len(found), "samples with another answer found")
    return (
        Measurement(
            "pixels to change the answer",
            median if math.isfinite(median) else None,
            f"Median over the samples of the fewest pixels, of {pixels:,}, each set to its far end, that were found to "
            "change the class; fewer may do, since the search sees outputs only.",
            unit="pixels",
            coverage=coverage,
            headline=True,
        ),
        Measurement(
            "fewest pixels",
            float(needed.min()) if np.isfinite(needed).any() else None,
            "The same for the sample that needed least.",
            unit="pixels",
        ),
        Measurement(
            "queries to change the answer",
            float(np.median(first)) if first else None,
            f"Median number of questions, asked {PARALLEL} at a time, until another class was the answer.",
            unit="queries",
        ),
        Measurement(
            "queries used",
            sum(report.queries for report in found),
            "Times the network was asked in all.",
            unit="queries",
        ),
    )


def _notes(subject: Subject, found: list[TestReport]) -> tuple[str, ...]:
    simulations = [len(report.trace) for report in found]
    notes = [
        f"{len(found)} samples were searched, with {min(simulations)} to {max(simulations)} simulations each; it is "
        "the predicted class that had to change.",
    ]
    if max(simulations) < SIMULATIONS:
        notes.append(f"The budget of {subject.budget.seconds:.3g} s ended the search; a longer one finds fewer pixels.")
    return tuple(notes)


def _figure(images: Tensor, found: list[TestReport], subject: Subject) -> Figure:
    worst = int(np.argmin([report.severity["L0"] for report in found]))
    report, original = found[worst], images[worst]
    assert report.image is not None  # one was reached, and this one is the nearest
    height, width = original.shape[1:]
    names = subject.data.classes if subject.data is not None else None
    before, after = (names[k] if names and k is not None else str(k) for k in (report.label, report.predicted))
    return Figure(
        "fewest-pixels",
        "The sample whose answer changes most easily",
        "Left: the sample. Middle: where an eye would look, which guides the search. Right: the changed sample, its "
        f"changed pixels framed; the class goes from {before} to {after}.",
        {
            "row": np.repeat(np.arange(height), width),
            "column": np.tile(np.arange(width), height),
            "sample": original.mean(0).flatten().cpu().numpy(),
            "saliency": report.features.map().flatten().cpu().numpy(),
            "changed": report.image.mean(0).flatten().cpu().numpy(),
            "is_changed": (report.image != original).any(0).flatten().cpu().numpy(),
        },
        _draw,
        size=(8.0, 3.0),
        panels=(1, 3),
    )


def _draw(axes: Any, data: Mapping[str, Any]) -> None:
    shape = (int(np.max(data["row"])) + 1, int(np.max(data["column"])) + 1)
    for panel, name in zip(axes, ("sample", "saliency", "changed"), strict=True):
        panel.imshow(np.asarray(data[name]).reshape(shape), cmap="cividis" if name == "saliency" else "gray")
        panel.set(title=name, xlabel="column", ylabel="row")
        panel.grid(False)
    changed = np.asarray(data["is_changed"])
    rows, columns = np.asarray(data["row"])[changed], np.asarray(data["column"])[changed]
    axes[2].plot(columns, rows, "s", mfc="none", color=PALETTE[1], label=f"{int(changed.sum())} changed")
    axes[2].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
