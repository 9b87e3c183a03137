"""The probe "reliance": which parts of its input a classifier uses, and which would be enough."""

import re
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from corollary.base.errors import NothingMeasured
from corollary.dynamics.grokking import outputs_of
from corollary.dynamics.reliance import RelianceProfile, log_odds, reliance_profile
from corollary.dynamics.slab_data import SHAH_2020, Blocks
from corollary.evidence import Coverage, Finding, Measurement, Need, Range, Subject, probe

GRID = 4
"""Regions along each side of an image."""
MOST_BLOCKS = 64
MOST = 2000
REPEATS = 5
FEWEST = 50
"""Samples below which AUCs say little; a smaller budget is overrun to have them."""


class Layout(NamedTuple):
    """How samples are cut into blocks, with what should be said of it."""

    blocks: Blocks
    notes: tuple[str, ...]


@probe(
    "reliance",
    room="dynamics",
    title="What the answers rely on",
    question="Which parts of the input does the network use, and does it lean on one part alone?",
    needs=Need.FORWARD,
    data="inputs",
    sources=(SHAH_2020,),
)
def reliance(subject: Subject) -> Finding:
    """Accuracy and AUC with each block of the input shuffled, and with all others shuffled."""
    if subject.task == "regression":
        raise NothingMeasured("reliance is measured on classes; this network answers with quantities")
    x, y = subject.sample(MOST)
    order = torch.randperm(len(x), generator=subject.seeds("samples")).to(x.device)  # data may be sorted by class
    x, y = x[order], None if y is None else y[order]
    names = None if subject.data is None else subject.data.feature_names
    layout = default_blocks(tuple(x.shape[1:]), names)
    notes = list(layout.notes)
    if y is None:
        y = log_odds(outputs_of(subject.module, x)).argmax(1)
        notes.append("The data has no labels: the network's own answers stand in for them.")
    if len(y.unique()) < 2:
        raise NothingMeasured(f"all {len(y)} samples are of class {int(y[0])}: there is nothing to tell apart")
    count = _affordable(subject, x, y, layout.blocks)
    profile = reliance_profile(
        subject.module,
        x[:count],
        y[:count],
        layout.blocks,
        repeats=REPEATS,
        seed=subject.seeds.integer("permutations"),
    )
    notes.append(
        f"Blocks are shuffled one at a time, their entries together, by the same {REPEATS} permutations of {count:,} "
        "samples. Where two blocks say the same, shuffling one of them costs little, though each may be used."
    )
    return Finding(tuple(_measurements(profile, len(x))), (profile.figure(),), tuple(notes))


def default_blocks(shape: tuple[int, ...], names: tuple[str, ...] | None = None) -> Layout:
    """Blocks for samples of a shape: a 4 x 4 grid for images, else single columns, joined where there are many.

    A flat sample is an image if its feature names end in all row and column numbers, or if it has no names and a square
    number of entries, 64 or more.
    """
    entries = int(np.prod(shape))
    if len(shape) >= 2 and min(shape[-2:]) >= GRID:
        return Layout(_grid(shape), ())
    if len(shape) == 1 and (image := _as_image(entries, names)) is not None:
        note = f"Samples of {entries} entries were read as images of {image[0]} x {image[1]}."
        return Layout(_grid(image), (note,))
    labels = names or tuple(f"entry {i}" for i in range(entries))
    if entries <= MOST_BLOCKS:
        return Layout({label: torch.tensor([i]) for i, label in enumerate(labels)}, ())
    groups = torch.arange(entries).tensor_split(MOST_BLOCKS)
    joined = {f"{labels[int(group[0])]} to {labels[int(group[-1])]}": group for group in groups}
    return Layout(joined, (f"The {entries:,} entries of a sample were joined, in order, to {MOST_BLOCKS} blocks.",))


def _as_image(entries: int, names: tuple[str, ...] | None) -> tuple[int, int] | None:
    if names is None:
        side = round(entries**0.5)
        return (side, side) if side * side == entries and side >= 2 * GRID else None
    found = [re.search(r"(\d+)\D+(\d+)$", name) for name in names]
    places = [(int(match[1]), int(match[2])) for match in found if match is not None]
    if len(places) < len(names):
        return None
    rows, columns = (len({place[axis] for place in places}) for axis in (0, 1))
    whole = sorted(set(places)) == places and rows * columns == entries and min(rows, columns) >= GRID
    return (rows, columns) if whole else None


def _grid(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Regions of an image by row and column, over all channels."""
    entries = torch.arange(int(np.prod(shape))).reshape(shape)
    return {
        f"row {i + 1}, column {j + 1}": region.flatten()
        for i, band in enumerate(entries.tensor_split(GRID, dim=-2))
        for j, region in enumerate(band.tensor_split(GRID, dim=-1))
    }


def _affordable(subject: Subject, x: Tensor, y: Tensor, blocks: Blocks) -> int:
    """How many samples the budget allows, by the seconds that one block takes on few and on four times as many."""
    name = next(iter(blocks))

    def seconds(count: int) -> float:
        start = time.perf_counter()
        reliance_profile(subject.module, x[:count], y[:count], {name: blocks[name]}, repeats=1)
        return time.perf_counter() - start

    few, more = FEWEST, 4 * FEWEST
    if len(x) <= few or len(y[:few].unique()) < 2:
        return len(x)
    seconds(few)  # the first pass pays for what is loaded
    small = seconds(few)
    # One block and one permutation make three passes, of which one is shared by all blocks and permutations.
    runs = 2 / 3 * len(blocks) * REPEATS
    if len(x) <= more or runs * small > subject.budget.remaining():
        return few if runs * small * len(x) / few > subject.budget.remaining() else len(x)
    each = max((seconds(more) - small) / (more - few), 1e-9)
    fixed = max(small - few * each, 0.0)
    return max(few, min(len(x), int((0.8 * subject.budget.remaining() / runs - fixed) / each)))


def _measurements(profile: RelianceProfile, samples: int) -> list[Measurement]:
    name = profile.most_used
    most = profile.metrics[name]
    coverage = Coverage(profile.samples, samples, "samples")
    error_kind = f"standard error over {profile.repeats} permutations"
    losses = np.array([max(found.reliance, 0.0) for found in profile.metrics.values()])
    return [
        Measurement(
            "accuracy lost with the most used block",
            most.accuracy - most.without.accuracy,
            f"Accuracy, {most.accuracy:.3f} as it is, that is lost when the block {name!r} is shuffled across samples.",
            error=most.without.accuracy_error,
            error_kind=error_kind,
            coverage=coverage,
            headline=True,
        ),
        Measurement(
            "reliance on that block",
            most.reliance,
            f"Twice the AUC lost with it, of {most.auc:.4f}: 0 where a block is not used, 1 where nothing else is.",
            error=2 * most.without.auc_error,
            error_kind=error_kind,
            reference=Range(text="near 1 is extreme simplicity bias: one part of the input decides"),
            coverage=coverage,
        ),
        Measurement(
            "AUC from that block alone",
            most.alone.auc,
            f"AUC with everything but the block {name!r} shuffled; chance is 0.5.",
            error=most.alone.auc_error,
            error_kind=error_kind,
            coverage=coverage,
        ),
        Measurement(
            "blocks relied on",
            float(losses.sum() ** 2 / (losses**2).sum()) if losses.any() else 0.0,
            f"Number of the {len(losses)} blocks that share the lost AUC, if they shared it equally: 1 where one block "
            "decides alone.",
            reference=Range(low=1, high=len(losses)),
            coverage=coverage,
        ),
    ]
