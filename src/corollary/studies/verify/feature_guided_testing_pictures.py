"""The pictures of the study `feature-guided-testing`, drawn from its tables."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from corollary.evidence import PALETTE, Data, Figure


def pictures(data: Data) -> tuple[Figure, ...]:
    """Success by queries, one image with what was changed, the guarantees, and the three opponents."""
    searches, guarantees = data["searches"], data["guarantees"]
    return (
        Figure(
            "first-adversarial",
            "Queries and pixels to the first adversarial image",
            "Share of searches that have found an adversarial image by so many queries (left) and with so many changed "
            "pixels (right), pixels chosen by features or uniformly, the algorithm otherwise the same.",
            {name: np.asarray(searches[name]) for name in ("guidance", "first_query", "first_pixels")},
            _draw_first,
            size=(8.4, 3.6),
            panels=(1, 2),
        ),
        Figure(
            "example",
            "One image, its saliency, and what was changed",
            "The image that needed fewest pixels: the original, the probability with which the game picks each pixel, "
            "and the adversarial image.",
            {name: np.asarray(column) for name, column in data["example"].items()},
            _draw_example,
            size=(8.4, 3.0),
            panels=(1, 3),
        ),
        Figure(
            "guarantees",
            "What a grid decides, by its step",
            "Left: share of balls proved safe or shown unsafe. Right: the distance to the nearest adversarial image, "
            "exact, and the two ends that the finest grid proves for it (Euclidean norm).",
            {n: np.asarray(guarantees[n]) for n in ("norm", "tau", "verdict", "exact", "lower", "upper")},
            _draw_guarantees,
            size=(8.4, 3.6),
            panels=(1, 2),
        ),
        Figure(
            "opponents",
            "Severity with search time, and the rewards of the game",
            "Left: pixels of the best image by the number of simulations, mean over images. Right: the mean "
            "reward of the first player, each image a line, by who the second player is.",
            {name: np.asarray(data["opponents"][name]) for name in ("opponent", "mean_reward")}
            | {f"progress_{name}": np.asarray(column) for name, column in data["progress"].items()},
            _draw_opponents,
            size=(8.4, 3.6),
            panels=(1, 2),
        ),
    )


def _draw_first(axes: Any, data: Mapping[str, Any]) -> None:
    for panel, name, label in ((axes[0], "first_query", "queries"), (axes[1], "first_pixels", "pixels changed")):
        for colour, guidance in zip(PALETTE, ("features", "uniform"), strict=False):
            values = np.sort(np.asarray(data[name])[np.asarray(data["guidance"]) == guidance])
            panel.step(values, np.arange(1, len(values) + 1) / len(values), where="post", color=colour, label=guidance)
        panel.set(xlabel=label, ylabel="share of searches", xlim=(0, None), ylim=(0, 1.02))
        panel.legend()


def _draw_example(axes: Any, data: Mapping[str, Any]) -> None:
    shape = (int(np.max(data["row"])) + 1, int(np.max(data["column"])) + 1)
    for panel, name in zip(axes, ("original", "saliency", "adversarial"), strict=True):
        panel.imshow(np.asarray(data[name]).reshape(shape), cmap="cividis" if name == "saliency" else "gray")
        panel.set(title=name, xlabel="column", ylabel="row")
        panel.grid(False)
    changed = np.asarray(data["original"]) != np.asarray(data["adversarial"])
    rows, columns = np.asarray(data["row"])[changed], np.asarray(data["column"])[changed]
    axes[2].plot(columns, rows, "s", mfc="none", color=PALETTE[1], label=f"{int(changed.sum())} changed pixels")
    axes[2].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_guarantees(axes: Any, data: Mapping[str, Any]) -> None:
    norm, tau, verdict = (np.asarray(data[name]) for name in ("norm", "tau", "verdict"))
    steps = np.unique(tau)
    for colour, k in zip(PALETTE, (2.0, math.inf), strict=False):
        shares = [float((verdict != "undecided")[(norm == k) & (tau == step)].mean()) for step in steps]
        axes[0].plot(steps, shares, "o-", color=colour, label=f"k = {'2' if k == 2 else 'inf'}")
    axes[0].set(xlabel="step tau", ylabel="share decided", ylim=(0, 1.02), xscale="log")
    axes[0].set_xticks(steps, [f"{step:g}" for step in steps])
    axes[0].minorticks_off()
    axes[0].legend()
    rows = (norm == 2) & (tau == steps[0])
    exact, lower, upper = (np.asarray(data[name])[rows] for name in ("exact", "lower", "upper"))
    ends = [0, float(exact.max())]
    axes[1].plot(ends, ends, color=PALETTE[6], lw=1, label="exact")
    axes[1].plot(exact, upper, ".", color=PALETTE[1], label="upper: nearest on the grid", rasterized=True)
    axes[1].plot(exact, lower, ".", color=PALETTE[0], label="lower: by the Lipschitz constant", rasterized=True)
    axes[1].set(xlabel="exact distance D*", ylabel="proved bounds", ylim=(0, 1.6 * float(lower.max())))
    axes[1].legend()


def _draw_opponents(axes: Any, data: Mapping[str, Any]) -> None:
    opponent, value = np.asarray(data["opponent"]), np.asarray(data["mean_reward"])
    names = list(dict.fromkeys(opponent.tolist()))
    whose, simulations, severity = (np.asarray(data[f"progress_{n}"]) for n in ("opponent", "simulations", "severity"))
    counts = np.unique(simulations)
    for colour, name in zip(PALETTE, names, strict=False):
        means = [severity[(whose == name) & (simulations == count)].mean() for count in counts]
        axes[0].plot(counts, means, "o-", color=colour, label=name)
    axes[0].set(xscale="log", xlabel="simulations", ylabel="pixels changed (mean)", ylim=(0, None))
    axes[0].set_xticks(counts, [str(count) for count in counts])
    axes[0].minorticks_off()
    axes[0].legend()
    axes[1].plot(range(len(names)), [value[opponent == name] for name in names], "o-", color=PALETTE[6], lw=0.6)
    means = [value[opponent == name].mean() for name in names]
    axes[1].plot(range(len(names)), means, "s", color=PALETTE[1], label="mean")
    axes[1].set_xticks(range(len(names)), names)
    axes[1].set(xlabel="second player", ylabel="mean reward (1 / pixels)", yscale="log")
    axes[1].legend()
