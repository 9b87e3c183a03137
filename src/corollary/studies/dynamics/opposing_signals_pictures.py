"""The figures of the study `opposing-signals`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from corollary.evidence import PALETTE, Data, Figure

GROUPS = {"rising": "loss rose most", "falling": "loss fell most", "all": "all samples"}
COLOURS = (PALETTE[1], PALETTE[0], PALETTE[6])
COSINES = {
    "opposition": "groups by change of loss",
    "high_loss_opposition": "samples of highest loss",
    "random_opposition": "random groups",
}


def figures(data: Data) -> tuple[Figure, ...]:
    """Losses of the groups, the linear model's sharpness and spikes, and what planting does."""
    tables = {name: {key: np.asarray(column) for key, column in table.items()} for name, table in data.items()}
    traces, runs = tables["traces"], tables["runs"]
    first = traces["seed"] == traces["seed"][0]
    shown = {name: column[first] for name, column in traces.items() if name != "seed"}
    limits = {f"limit_{name}": tables["limit"][name] for name in ("alpha", "signal", "limit")}
    return (
        Figure(
            "opposing-groups",
            "Two groups of samples at and below the edge of stability",
            "Left and middle: mean losses of the samples whose loss rose most and fell most at one step, seed 0. At "
            "the larger learning rate the groups take turns; at the smaller one nothing alternates. Right: cosine of "
            "the two groups' mean gradients at the larger rate, a mark for each seed.",
            {**shown, **{f"run_{name}": runs[name] for name in ("rate", *COSINES)}},
            _draw_groups,
            size=(10.4, 3.6),
            panels=(1, 3),
        ),
        Figure(
            "opposing-linear-model",
            "The two-layer linear model",
            "Left: sharpness along the opposing weight under gradient flow, over its closed-form limit. Middle and "
            "right: gradient descent at three rates; dashed lines are 2 / rate. Above it the loss grows by alternating "
            "steps until it pushes the sharpness back under the line.",
            {**tables["path"], **limits, **{f"descent_{name}": column for name, column in tables["spikes"].items()}},
            _draw_model,
            size=(10.4, 3.6),
            panels=(1, 3),
        ),
        Figure(
            "planted-outliers",
            "Sharpness with and without planted outliers",
            "Top eigenvalue of the Hessian while a two-layer linear network is trained on samples of which 2 % carry "
            "the opposing coordinate, the curvature expected along it, and the same training without it.",
            tables["planted"],
            _draw_planted,
            size=(5.6, 3.6),
        ),
    )


def _draw_groups(axes: Any, data: Mapping[str, Any]) -> None:
    for panel, rate in zip(axes[:2], sorted(set(data["rate"].tolist()), reverse=True), strict=True):
        rows = data["rate"] == rate
        for place, (name, label) in enumerate(GROUPS.items()):
            panel.plot(data["step"][rows], data[name][rows], color=COLOURS[place], label=label, linewidth=1.2)
        panel.set(xlabel="step", ylabel="mean loss", ylim=(0, None), title=f"learning rate {rate:g}")
        panel.legend(loc="lower right", fontsize=7)
    edge = data["run_rate"] == data["run_rate"].max()
    for place, name in enumerate(COSINES):
        values = data[f"run_{name}"][edge]
        axes[2].bar(place, values.mean(), color=COLOURS[place], alpha=0.35, width=0.6)
        axes[2].plot(np.full(len(values), place), values, "o", color=COLOURS[place])
    axes[2].axhline(0, color=PALETTE[6], linewidth=0.8)
    axes[2].set(ylabel="cosine of mean gradients")
    axes[2].set_xticks(range(len(COSINES)), [label.replace(" of ", "\nof ") for label in COSINES.values()], fontsize=7)


def _draw_model(axes: Any, data: Mapping[str, Any]) -> None:
    left, middle, right = axes
    cases = list(zip(data["limit_alpha"], data["limit_signal"], data["limit_limit"], strict=True))
    for place, (alpha, signal, limit) in enumerate(cases):
        rows = (data["alpha"] == alpha) & (data["signal"] == signal)
        style = "-" if alpha == max(data["limit_alpha"]) else "--"
        label = rf"$\alpha$ {alpha:g}, $|\beta|$ {signal:g}"
        left.plot(data["time"][rows], data["sharpness"][rows] / limit, style, color=PALETTE[place % 3], label=label)
    left.set(xlabel="time", ylabel="sharpness / limit", xlim=(0, min(4.0, float(data["time"].max()))), ylim=(0, 1.05))
    left.legend(loc="lower right", fontsize=7)
    for place, rate in enumerate(sorted(set(data["descent_rate"].tolist()))):
        rows = data["descent_rate"] == rate
        step = data["descent_step"][rows]
        middle.plot(step, data["descent_sharpness"][rows], color=PALETTE[place], label=f"rate {rate:g}")
        if 2 / rate < 1.2 * data["descent_sharpness"].max():
            middle.axhline(2 / rate, color=PALETTE[place], linestyle="--", linewidth=0.9)
        right.plot(step, np.maximum(data["descent_loss"][rows], 1e-16), color=PALETTE[place], label=f"rate {rate:g}")
    middle.set(xlabel="step", ylabel="sharpness", xlim=(0, 150), title="gradient descent")
    right.set(xlabel="step", ylabel="loss (from 1e-16)", yscale="log", xlim=(0, 150), title="gradient descent")
    middle.legend(loc="lower right", fontsize=7)


def _draw_planted(axes: Any, data: Mapping[str, Any]) -> None:
    axes.plot(data["step"], data["with"], "o", color=PALETTE[1], label="with the outliers")
    axes.plot(data["step"], data["predicted"], color=PALETTE[6], label=r"share $\times\ \alpha c^2$")
    axes.plot(data["step"], data["without"], "s", color=PALETTE[0], label="without")
    axes.set(xlabel="step", ylabel="sharpness", ylim=(0, None))
    axes.legend(loc="center right")
