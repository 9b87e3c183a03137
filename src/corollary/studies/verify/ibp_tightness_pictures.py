"""The figures of the study `ibp-tightness`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from corollary.evidence import PALETTE, Data, Figure

METHODS = ("standard", "pgd", "sabr", "ibp")
SCORES = {"accuracy": "clean", "robust": "under attack", "certified": "certified by intervals"}


def figures(data: Data) -> tuple[Figure, ...]:
    """Tightness by method, at initialisation, and against radius and width."""
    runs = {name: np.asarray(column) for name, column in data["runs"].items()}
    compared = (runs["eps"] == 0.1) & (runs["width"] == 128)
    interval_trained = runs["method"] == "ibp"
    widths = {name: np.asarray(column) for name, column in data["widths"].items()}
    return (
        Figure(
            "tightness-by-method",
            "Tightness of interval bounds after training",
            "Left: local tightness on test samples, a mark for each seed. Right: what the same networks get right. "
            "Attacks find few errors in networks trained against attacks, and intervals prove nothing about them.",
            {name: column[compared] for name, column in runs.items()},
            _draw_methods,
            size=(8.6, 3.6),
            panels=(1, 2),
        ),
        Figure(
            "tightness-at-initialisation",
            "Tightness at Gaussian weights",
            "Optimal over interval radius of linear networks 50-d-20 with random weights, on the closed form; it falls "
            "as one over the root of the width.",
            {name: widths[name] for name in ("hidden", "ratio_of_means", "predicted")},
            _draw_initialisation,
            size=(5.4, 3.6),
        ),
        Figure(
            "radius-and-width",
            "Interval training at several radii and widths",
            "Left: a larger training radius gives tighter bounds. Right: wider networks certify more, at radius 0.1. A "
            "mark for each seed, lines through the means.",
            {name: column[interval_trained] for name, column in runs.items()},
            _draw_scans,
            size=(8.6, 3.6),
            panels=(1, 2),
        ),
    )


def _draw_methods(axes: Any, data: Mapping[str, Any]) -> None:
    left, right = axes
    methods = np.asarray(data["method"])
    shown = [method for method in METHODS if (methods == method).any()]
    for place, method in enumerate(shown):
        values = np.asarray(data["tightness"])[methods == method]
        left.bar(place, values.mean(), color=PALETTE[0], alpha=0.35, width=0.6)
        left.plot(np.full(len(values), place), values, "o", color=PALETTE[0], label="one seed" if place == 0 else None)
    left.set(ylabel="local tightness", xlabel="trained by", ylim=(0, 1))
    left.set_xticks(range(len(shown)), shown)
    left.legend(loc="upper left")
    for i, (name, label) in enumerate(SCORES.items()):
        means = [np.asarray(data[name])[methods == method].mean() for method in shown]
        right.bar(np.arange(len(shown)) + 0.27 * (i - 1), means, width=0.25, color=PALETTE[i], label=label)
    right.set(ylabel="share of test samples", xlabel="trained by", ylim=(0, 1))
    right.set_xticks(range(len(shown)), shown)
    right.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3)


def _draw_initialisation(axes: Any, data: Mapping[str, Any]) -> None:
    axes.plot(data["hidden"], data["predicted"], color=PALETTE[6], label="closed form")
    axes.plot(data["hidden"], data["ratio_of_means"], "o", color=PALETTE[0], label="drawn")
    axes.set(xscale="log", yscale="log", xlabel="width d of the hidden layer", ylabel="tightness")
    axes.set_xticks(data["hidden"], [str(width) for width in data["hidden"]])
    axes.set_yticks([0.05, 0.1, 0.2], ["0.05", "0.1", "0.2"])
    axes.minorticks_off()
    axes.legend()


def _draw_scans(axes: Any, data: Mapping[str, Any]) -> None:
    scans = (
        ("eps", "width", 128, "tightness", "training radius", "local tightness"),
        ("width", "eps", 0.1, "certified", "width", "certified accuracy"),
    )
    for i, (panel, (scanned, held, value, measured, xlabel, ylabel)) in enumerate(zip(axes, scans, strict=True)):
        chosen = np.asarray(data[held]) == value
        x, y = np.asarray(data[scanned])[chosen], np.asarray(data[measured])[chosen]
        places = np.unique(x)
        panel.plot(places, [y[x == place].mean() for place in places], color=PALETTE[i], alpha=0.5, label="mean")
        panel.plot(x, y, "o", color=PALETTE[i], label="one seed")
        panel.set(xscale="log", xlabel=xlabel, ylabel=ylabel, ylim=(0, 1))
        panel.set_xticks(places, [f"{place:g}" for place in places])
        panel.minorticks_off()
        panel.legend()
