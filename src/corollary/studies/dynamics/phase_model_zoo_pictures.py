"""The figures of the study `phase-model-zoo`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from corollary.dynamics.phases import Phase, phase_map
from corollary.evidence import PALETTE, Data, Figure

AVERAGES = {
    "averaged_epochs": "average over late epochs",
    "averaged_runs": "average over runs",
    "averaged_aligned": "average over aligned runs",
}
METRICS = {
    "train_error": "training error",
    "lambda_max": "largest Hessian eigenvalue",
    "mc": "mode connectivity",
    "cka": "similarity of runs (CKA)",
}


def figures(data: Data) -> tuple[Figure, ...]:
    """The phases, the metrics behind them, paths over width, and averages of weights by phase."""
    zoo = {name: np.asarray(column) for name, column in data["zoo"].items()}
    place = ("width", "batch_size")
    return (
        phase_map(zoo),
        Figure(
            "metrics",
            "What the phases are told by",
            "Means over networks, or pairs of them, by width and batch size. The phase rule looks at training error, "
            "mode connectivity and similarity; the Hessian stands beside them.",
            {name: zoo[name] for name in (*place, *METRICS)},
            _draw_metrics,
            size=(9.0, 6.4),
            panels=(2, 2),
        ),
        Figure(
            "paths-and-sharpness",
            "Paths over width, sharpness over temperature",
            "Left: mode connectivity of trained curves and straight lines by width, a line for each batch size; below "
            "0 is a barrier. Right: the largest Hessian eigenvalue by batch size, a line for each width.",
            {name: zoo[name] for name in (*place, "mc", "straight_mc", "lambda_max")},
            _draw_lines,
            size=(9.0, 3.8),
            panels=(1, 2),
        ),
        Figure(
            "averages",
            "Averages of weights, by phase",
            "Mean test accuracy over the cells of a phase: of single networks, of averages over late epochs of one "
            "run, and over runs, plain and with hidden units aligned by weight matching.",
            {name: zoo[name] for name in ("phase", "test_accuracy", *AVERAGES)},
            _draw_averages,
            size=(7.4, 3.8),
        ),
    )


def _draw_metrics(axes: Any, data: Mapping[str, Any]) -> None:
    widths, sizes = (np.unique(np.asarray(data[name])) for name in ("width", "batch_size"))
    x, y = np.searchsorted(widths, data["width"]), np.searchsorted(sizes, data["batch_size"])
    for panel, (name, title) in zip(axes.flat, METRICS.items(), strict=True):
        values = np.full((len(sizes), len(widths)), np.nan)
        values[y, x] = data[name]
        shown = np.log10(values) if name == "lambda_max" else values
        panel.pcolormesh(np.arange(len(widths) + 1) - 0.5, np.arange(len(sizes) + 1) - 0.5, shown, alpha=0.6)
        for (row, column), value in np.ndenumerate(values):
            panel.text(column, row, "none" if np.isnan(value) else f"{value:.2g}", ha="center", va="center", fontsize=8)
        panel.set_xticks(range(len(widths)), [str(width) for width in widths])
        panel.set_yticks(range(len(sizes)), [str(size) for size in sizes])
        panel.grid(False)
        panel.set(xlabel="width", ylabel="batch size", title=title)


def _draw_lines(axes: Any, data: Mapping[str, Any]) -> None:
    left, right = axes
    width, size = np.asarray(data["width"]), np.asarray(data["batch_size"])
    for i, one in enumerate(np.unique(size)):
        here, colour = size == one, PALETTE[i % len(PALETTE)]
        left.plot(width[here], np.asarray(data["mc"])[here], "o-", color=colour, label=f"curve, batch {one}")
        left.plot(width[here], np.asarray(data["straight_mc"])[here], "s:", color=colour, alpha=0.5)
    left.plot([], [], "s:", color=PALETTE[6], label="straight line")
    left.set(xscale="log", xlabel="width", ylabel="mode connectivity")
    left.set_xticks(np.unique(width), [str(one) for one in np.unique(width)])
    left.minorticks_off()
    left.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, fontsize=7)
    for i, one in enumerate(np.unique(width)):
        here = width == one
        right.plot(
            size[here],
            np.asarray(data["lambda_max"])[here],
            "o-",
            color=PALETTE[i % len(PALETTE)],
            label=f"width {one}",
        )
    right.set(xscale="log", yscale="log", xlabel="batch size", ylabel="largest Hessian eigenvalue")
    right.set_xticks(np.unique(size), [str(one) for one in np.unique(size)])
    right.minorticks_off()
    right.legend(fontsize=7)


def _draw_averages(axes: Any, data: Mapping[str, Any]) -> None:
    phases = np.asarray(data["phase"]).astype(str)
    shown = [phase.label for phase in Phase if (phases == phase.label).any()]
    names = {"test_accuracy": "single networks", **AVERAGES}
    for i, (name, label) in enumerate(names.items()):
        values = np.asarray(data[name], dtype=np.float64)
        known = [values[(phases == phase) & ~np.isnan(values)] for phase in shown]
        means = [float(some.mean()) if len(some) else 0.0 for some in known]
        axes.bar(np.arange(len(shown)) + 0.2 * (i - 1.5), means, width=0.18, color=PALETTE[i], label=label)
    axes.set_xticks(range(len(shown)), shown)
    axes.set(xlabel="phase", ylabel="test accuracy", ylim=(0, 1))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
