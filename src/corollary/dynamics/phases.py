"""Phases of trained networks: is the model too small, trained too little, or well trained, and do its runs agree?

High training error with better networks on the way from one run to another: trained too little (II), else too small as
well (I). Low error with a barrier between runs: too small (III). Low error without one: well connected (IV), and its
runs compute the same (B) or not (A). The Hessian is measured beside it; the rule does not use it.
"""

import enum
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from corollary.base.errors import BadInput
from corollary.evidence import PALETTE, Figure, Source

SCHUERHOLT_2025 = Source(
    key="schuerholt2025phase",
    authors=(
        "Konstantin Schürholt",
        "Léo Meynent",
        "Yefan Zhou",
        "Haiquan Lu",
        "Yaoqing Yang",
        "Damian Borth",
    ),
    title="A model zoo on phase transitions in neural networks",
    year=2025,
    arxiv="2504.18072",
    venue="DMLR",
)
YANG_2021 = Source(
    key="yang2021taxonomizing",
    authors=(
        "Yaoqing Yang",
        "Liam Hodgkinson",
        "Ryan Theisen",
        "Joe Zou",
        "Joseph E. Gonzalez",
        "Kannan Ramchandran",
        "Michael W. Mahoney",
    ),
    title="Taxonomizing local versus global structure in neural network loss landscapes",
    year=2021,
    arxiv="2107.11228",
    venue="NeurIPS",
)


COLOURS = {"I": PALETTE[6], "II": PALETTE[4], "III": PALETTE[1], "IV-A": PALETTE[5], "IV-B": PALETTE[2]}
"""One for each phase, by its label."""


class Phase(enum.Enum):
    """Where a network stands; the value says it in words."""

    I = "I: under-fitted and under-sized; it is too small for the data, and not trained to the end"
    II = "II: under-fitted; the networks between two runs are better than the runs, so train on"
    III = "III: under-sized; it fits, but a barrier parts its runs"
    IV_A = "IV-A: over-fitted; its runs are connected but do not compute the same"
    IV_B = "IV-B: generalising; its runs are connected and compute the same"

    @property
    def label(self) -> str:
        """The short name: "IV-B"."""
        return self.name.replace("_", "-")


class Thresholds(NamedTuple):
    """What the phase rule compares with.

    Fields:
        error: a larger training error, in [0, 1], is high.
        connectivity: mode connectivity nearer to 0 than this is connected; in training error.
        similarity: CKA of connected runs that compute the same. None, in a table: the middle of the largest gap among
            the CKAs of its phase IV.
    """

    error: float = 0.10
    connectivity: float = 0.03
    similarity: float | None = 0.85


DIGITS = Thresholds()
"""Those of small perceptrons on the digits."""


def phase_of(train_error: float, mc: float, cka: float, thresholds: Thresholds = DIGITS) -> Phase:
    """The phase of a network by its training error, its mode connectivity (negative: a barrier) and similarity of runs.

    Args: `cka`: used in phase IV only, NaN elsewhere is fine.
    Raises: BadInput, for an error outside [0, 1], connectivity that is not a number, or in phase IV a CKA or a
        threshold of it that is missing.
    Source: the taxonomy of Yang et al. 2021, arXiv 2107.11228; the thresholds are not theirs.
    """
    if not 0 <= train_error <= 1 or math.isnan(mc):
        raise BadInput(
            f"a phase is told by the share of training errors, in [0, 1], and mode connectivity in the same unit; got "
            f"{train_error} and {mc}"
        )
    if train_error > thresholds.error:
        return Phase.II if mc > thresholds.connectivity else Phase.I
    if mc < -thresholds.connectivity:
        return Phase.III
    if math.isnan(cka) or thresholds.similarity is None:
        raise BadInput(
            f"phase IV parts into A and B by the similarity of runs; got cka={cka} and the threshold "
            f"{thresholds.similarity}"
        )
    return Phase.IV_B if cka >= thresholds.similarity else Phase.IV_A


def largest_gap(values: Sequence[float]) -> float:
    """The middle of the largest gap between neighbours among `values`; below all of them where there is one only."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if len(ordered) < 2:
        return -math.inf
    place = int(np.diff(ordered).argmax())
    return float(ordered[place : place + 2].mean())


def label_phases(table: Mapping[str, Any], thresholds: Thresholds = DIGITS) -> list[str]:
    """The phase of each row of a landscape table, by its columns train_error, mc and cka.

    A row without mode connectivity is of networks that diverged: phase I.
    """
    columns = [np.asarray(table[name], dtype=np.float64) for name in ("train_error", "mc", "cka")]
    error, mc, cka = columns
    if thresholds.similarity is None:
        fourth = (error <= thresholds.error) & (mc >= -thresholds.connectivity)
        thresholds = thresholds._replace(similarity=largest_gap(cka[fourth].tolist()))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [
        Phase.I.label if math.isnan(connectivity) else phase_of(share, connectivity, similarity, thresholds).label
        for share, connectivity, similarity in rows
    ]


def phase_map(table: Mapping[str, Any], name: str = "phase-map") -> Figure:
    """The phases of a landscape table over width (load) and batch size (temperature)."""
    columns = {key: np.asarray(table[key]) for key in ("width", "batch_size", "phase", "test_accuracy")}
    return Figure(
        name,
        "Phases of trained networks",
        "The phase of each cell of a zoo by width and batch size, with its test accuracy. Small batches are hot, "
        "narrow networks heavily loaded.",
        columns,
        _draw_map,
        size=(6.4, 4.2),
    )


def _draw_map(axes: Any, data: Mapping[str, Any]) -> None:
    widths, sizes = (np.unique(np.asarray(data[name])) for name in ("width", "batch_size"))
    for width, size, phase, accuracy in zip(
        *(np.asarray(data[name]) for name in ("width", "batch_size", "phase", "test_accuracy")), strict=True
    ):
        x, y = int(np.searchsorted(widths, width)), int(np.searchsorted(sizes, size))
        colour = COLOURS[str(phase)]
        axes.bar(x, 0.96, bottom=y - 0.48, width=0.96, color=colour, alpha=0.45)
        axes.text(x, y, f"{phase}\n{accuracy:.2f}", ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(widths)), [str(width) for width in widths])
    axes.set_yticks(range(len(sizes)), [str(size) for size in sizes])
    axes.grid(False)
    axes.set(xlabel="width of the hidden layers", ylabel="batch size")
