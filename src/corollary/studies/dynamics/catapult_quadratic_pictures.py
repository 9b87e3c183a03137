"""The pictures of `catapult-quadratic`, from its stored tables."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from corollary.evidence import PALETTE, Data, Figure

SHOWN = (0.5, 1.9, 2.5, 3.5, 3.9, 4.1)
LABELS = {"zero": "ReLU, zero labels", "signs": "ReLU, labels +-1"}


def figures(data: Data) -> tuple[Figure, ...]:
    """Paths of the uv network, phases by rate, activity and Taylor models by rate."""
    return (
        Figure(
            "catapult-paths",
            "Loss and curvature on the way",
            "The uv network on one sample with target 0, first seed. Left: the loss over its start. Right: the "
            "learning rate times the top eigenvalue of the tangent kernel; a run settles once it is below 2, and "
            "flies apart where it starts above 4.",
            dict(data["paths"]),
            _draw_paths,
            size=(8.4, 3.8),
            panels=(1, 2),
        ),
        Figure(
            "catapult-phases",
            "Phases by learning rate",
            "Every run, by the learning rate times the initial top eigenvalue. Left: the highest loss over the first "
            "(divergent runs stand at the top edge). Right: the top eigenvalue after over before training. Shaded: the "
            "window from 2 to 4.",
            _phase_columns(data),
            _draw_phases,
            size=(8.4, 3.8),
            panels=(1, 2),
        ),
        Figure(
            "catapult-activity",
            "Sparser activations, and Taylor models",
            "Left: the share of (unit, sample) pairs that are active after training, of the runs that did not "
            "diverge. Right: the highest loss over the first for second-order Taylor models of a tanh network.",
            _activity_columns(data),
            _draw_activity,
            size=(8.4, 3.8),
            panels=(1, 2),
        ),
    )


def _phase_columns(data: Data) -> dict[str, Any]:
    uv, relu = data["uv"], data["relu"]
    names = ["uv network"] * len(uv["multiple"]) + [LABELS[kind] for kind in relu["labels"]]
    joined = {name: np.concatenate([uv[name], relu[name]]) for name in ("multiple", "peak", "kernel_ratio", "phase")}
    return {"model": np.array(names), **joined}


def _activity_columns(data: Data) -> dict[str, Any]:
    sparsity, taylor = data["sparsity"], data["taylor"]
    return {
        "multiple": np.asarray(sparsity["multiple"]),
        "active": np.asarray(sparsity["active"]),
        "taylor_multiple": np.asarray(taylor["multiple"]),
        "taylor_peak": np.asarray(taylor["peak"]),
    }


def _draw_paths(panels: Any, data: Mapping[str, Any]) -> None:
    left, right = panels
    multiple, step = np.asarray(data["multiple"]), np.asarray(data["step"])
    for index, level in enumerate(SHOWN):
        rows = multiple == level
        # Below the smallest loss worth showing nothing happens any more, and above it a divergent run is gone.
        left.plot(step[rows], np.asarray(data["loss"])[rows], color=PALETTE[index], label=f"{level:g}")
        right.plot(step[rows], np.asarray(data["edge"])[rows], color=PALETTE[index])
    left.set(xlabel="step", ylabel="loss over its start", yscale="log", ylim=(1e-12, 1e6))
    left.legend(title="multiple", ncols=2)
    for level in (2, 4):
        right.axhline(level, color=PALETTE[6], lw=1, ls="--")
    right.set(xlabel="step", ylabel="rate times top eigenvalue", ylim=(0, 5))


def _draw_phases(panels: Any, data: Mapping[str, Any]) -> None:
    left, right = panels
    model, multiple = np.asarray(data["model"]), np.asarray(data["multiple"])
    top = 1e5
    peak = np.where(np.asarray(data["phase"]) == "divergent", top, np.minimum(np.asarray(data["peak"]), top))
    ratio = np.where(np.asarray(data["phase"]) == "divergent", np.nan, np.asarray(data["kernel_ratio"]))
    for index, name in enumerate(dict.fromkeys(model.tolist())):
        rows = model == name
        shift = 0.03 * (index - 1)
        style = {"ls": "", "marker": "osv"[index], "color": PALETTE[index], "alpha": 0.8}
        left.plot(multiple[rows] + shift, peak[rows], label=name, **style)
        right.plot(multiple[rows] + shift, ratio[rows], label=name, **style)
    for axes in panels:
        axes.axvspan(2, 4, color=PALETTE[4], alpha=0.15, lw=0)
        axes.set(xlabel="rate times initial top eigenvalue")
    left.set(ylabel="peak loss over first", yscale="log", ylim=(0.5, 2 * top))
    left.legend(loc="upper left")
    right.set(ylabel="top eigenvalue, after over before", ylim=(0, None))


def _draw_activity(panels: Any, data: Mapping[str, Any]) -> None:
    left, right = panels
    multiple = np.asarray(data["multiple"])
    active = np.asarray(data["active"])
    survived = ~np.isnan(active)
    levels = np.unique(multiple[survived])
    left.plot(multiple, active, ls="", marker="o", color=PALETTE[0], alpha=0.6, label="one run")
    left.plot(
        levels, [active[survived & (multiple == level)].mean() for level in levels], color=PALETTE[0], label="mean"
    )
    left.set(xlabel="rate times initial top eigenvalue", ylabel="active share of pairs", ylim=(0, None))
    left.legend()
    right.plot(
        data["taylor_multiple"], data["taylor_peak"], ls="", marker="o", color=PALETTE[2], alpha=0.7, label="one run"
    )
    right.axhline(1.5, color=PALETTE[6], lw=1, ls="--", label="counted as a catapult")
    right.set(xlabel="rate times initial top eigenvalue", ylabel="peak loss over first", yscale="log")
    right.legend()
