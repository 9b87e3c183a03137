"""The figures of the study `square-loss-collapse`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from corollary.evidence import PALETTE, Data, Figure

SIGNS = {"nc1": "NC1", "nc2_angle": "NC2 angle", "nc3": "NC3", "nc4": "NC4"}


def figures(data: Data) -> tuple[Figure, ...]:
    """The scale on its way, spectra and ranks, the four signs of collapse, and the steps that stay."""
    return (
        Figure(
            "scale",
            "The scale and its equilibrium",
            "Left: the product of the layers' norms under two penalties, one of them from two starts; dashed, the "
            "value that would stand still for the directions of that step. Right: the spread of the margins.",
            dict(data["scale"]),
            _draw_scale,
            size=(8.6, 3.6),
            panels=(1, 2),
        ),
        Figure(
            "low-rank",
            "Rank under weight decay",
            "Left: singular values of the second layer at the end of training. Right: participation of the middle "
            "layers (mean) over the steps.",
            {
                **{f"spectrum_{name}": column for name, column in data["spectra"].items()},
                **dict(data["collapse"].items()),
            },
            _draw_ranks,
            size=(8.6, 3.6),
            panels=(1, 2),
        ),
        Figure(
            "collapse",
            "The four signs of neural collapse",
            "Each is 0 at full collapse. Learning rate 0.1; NC4 is drawn where it is above 0.",
            dict(data["collapse"]),
            _draw_collapse,
            size=(8.6, 5.4),
            panels=(2, 2),
        ),
        Figure(
            "noise-floor",
            "Steps that do not vanish",
            "Left: mean step over norm of the weights in the last steps, at learning rate 0.1. Right: second moment of "
            "the per-sample gradients, and the floor that decay puts under it.",
            {**dict(data["noise"]), "relative_step": data["steps"]["relative_step"]},
            _draw_noise,
            size=(8.6, 3.6),
            panels=(1, 2),
        ),
    )


def _draw_scale(axes: Any, data: Mapping[str, Any]) -> None:
    left, right = axes
    columns = {name: np.asarray(column) for name, column in data.items()}
    runs = list(dict.fromkeys(zip(columns["penalty"].tolist(), columns["start"].tolist(), strict=True)))
    for i, (penalty, start) in enumerate(runs):
        own = (columns["penalty"] == penalty) & (columns["start"] == start)
        label = f"penalty {penalty:g}" + ("" if start == "as drawn" else f", {start} start")
        step = columns["step"][own]
        left.plot(step, columns["rho"][own], color=PALETTE[i], label=label)
        left.plot(step[1:], columns["equilibrium"][own][1:], color=PALETTE[i], ls="--", lw=1)
        spread = np.abs(columns["margin_std"] / columns["margin_mean"])[own]
        right.plot(step[1:], spread[1:], color=PALETTE[i], label=label)
    left.set(xlabel="step", ylabel="scale ρ")
    right.set(xlabel="step", ylabel="standard deviation / mean of margins", yscale="log")
    right.legend()


def _draw_ranks(axes: Any, data: Mapping[str, Any]) -> None:
    left, right = axes
    columns = {name: np.asarray(column) for name, column in data.items()}
    for i, (rate, decay) in enumerate(_runs(columns)):
        label = f"rate {rate:g}, decay {decay:g}"
        own = (columns["spectrum_learning_rate"] == rate) & (columns["spectrum_weight_decay"] == decay)
        left.plot(columns["spectrum_index"][own], columns["spectrum_relative"][own], color=PALETTE[i], label=label)
        own = (columns["learning_rate"] == rate) & (columns["weight_decay"] == decay)
        right.plot(columns["step"][own], columns["participation"][own], "o-", color=PALETTE[i], label=label)
    left.set(xlabel="index", ylabel="singular value / largest", yscale="log", ylim=(1e-4, 1.5))
    right.set(xlabel="step", ylabel="participation", xscale="log", ylim=(0, None))
    left.legend()


def _draw_collapse(axes: Any, data: Mapping[str, Any]) -> None:
    columns = {name: np.asarray(column) for name, column in data.items()}
    for panel, (name, title) in zip(axes.flat, SIGNS.items(), strict=True):
        for i, (rate, decay) in enumerate(run for run in _runs(columns) if run[0] == 0.1):
            own = (columns["learning_rate"] == rate) & (columns["weight_decay"] == decay)
            own &= columns[name] > 0
            panel.plot(columns["step"][own], columns[name][own], "o-", color=PALETTE[i], label=f"decay {decay:g}")
        panel.set(ylabel=title, yscale="log", xlabel="step", xscale="log")
    axes.flat[0].legend()


def _draw_noise(axes: Any, data: Mapping[str, Any]) -> None:
    left, right = axes
    columns = {name: np.asarray(column) for name, column in data.items()}
    own = columns["learning_rate"] == 0.1
    decay = columns["weight_decay"][own]
    left.plot(decay, columns["relative_step"][own], "o-", color=PALETTE[0])
    left.set(xlabel="weight decay", ylabel="step / norm of weights", ylim=(0, None))
    right.plot(decay, columns["second_moment"][own], "o-", color=PALETTE[0], label="second moment")
    floor = columns["floor"][own]
    right.plot(decay[floor > 0], floor[floor > 0], "s-", color=PALETTE[1], label="floor")
    right.set(xlabel="weight decay", ylabel="squared norm of gradients", yscale="log")
    right.legend()


def _runs(columns: Mapping[str, np.ndarray]) -> list[tuple[float, float]]:
    pairs = zip(columns["learning_rate"].tolist(), columns["weight_decay"].tolist(), strict=True)
    return list(dict.fromkeys(pairs))
