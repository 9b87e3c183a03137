"""The pictures of `benign-oscillation`, from its stored tables."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from corollary.evidence import PALETTE, Data, Figure

SHOWN = (0.3, 1.0, 1.05, 1.2, 1.4, 1.6)


def figures(data: Data) -> tuple[Figure, ...]:
    """By rate, over the steps, and for one sample."""
    runs = data["runs"]
    return (
        Figure(
            "oscillation-by-rate",
            "Accuracy on weak samples, and oscillation, by learning rate",
            "Every run, by the learning rate over the edge of stability m / 2U^2, with means. Left: accuracy on test "
            "samples without the strong feature, with the value 0.85 at which the crossing is read. Right: the share "
            "of late steps at which an output is more than 0.1 off its label.",
            {name: np.asarray(runs[name]) for name in ("strong", "multiple", "weak_accuracy", "oscillation")},
            _draw_rates,
            size=(8.4, 3.8),
            panels=(1, 2),
        ),
        Figure(
            "weak-feature-over-steps",
            "The weak feature over the steps",
            "What the weak feature alone contributes to the margin y f, mean over seeds, by learning rate over the "
            "edge: up to the edge it hardly grows, as the strong feature fits the samples and leaves no residual.",
            dict(data["margins"]),
            _draw_margins,
        ),
        Figure(
            "one-sample",
            "One sample at 1.3 of the edge",
            "Left: the output around its label 1, and the part of it that the weak feature carries. Right: the sum of "
            "the residuals 1 - f, which feeds the weak feature, rises as long as the output oscillates.",
            dict(data["path"]),
            _draw_single,
            size=(8.4, 3.6),
            panels=(1, 2),
        ),
    )


def _draw_rates(panels: Any, data: Mapping[str, Any]) -> None:
    strong, multiple = np.asarray(data["strong"]), np.asarray(data["multiple"])
    for axes, name, label in zip(
        panels, ("weak_accuracy", "oscillation"), ("accuracy on weak samples", "oscillating steps, share"), strict=True
    ):
        values = np.asarray(data[name])
        for index, level in enumerate(np.unique(strong)):
            rows = (strong == level) & np.isfinite(values)
            axes.plot(multiple[rows], values[rows], ls="", marker="os"[index], color=PALETTE[index], alpha=0.35)
            rates = np.unique(multiple[rows])
            means = [values[rows & (multiple == rate)].mean() for rate in rates]
            axes.plot(rates, means, color=PALETTE[index], label=f"strong feature {level:g}")
        axes.axvline(1, color=PALETTE[6], lw=1, ls="--", label="edge of stability")
        axes.set(xlabel="learning rate over the edge", ylabel=label, ylim=(None, 1.03))
    panels[0].axhline(0.85, color=PALETTE[6], lw=1, ls=":")
    panels[0].legend(loc="lower right")


def _draw_margins(axes: Any, data: Mapping[str, Any]) -> None:
    multiple = np.asarray(data["multiple"])
    for index, level in enumerate(SHOWN):
        rows = multiple == level
        axes.plot(
            np.asarray(data["step"])[rows], np.asarray(data["weak"])[rows], color=PALETTE[index], label=f"{level:g}"
        )
    axes.set(xlabel="step", ylabel="margin from the weak feature alone")
    axes.legend(title="rate over the edge", loc="upper left", bbox_to_anchor=(1, 1))


def _draw_single(panels: Any, data: Mapping[str, Any]) -> None:
    left, right = panels
    left.plot(data["step"], data["output"], color=PALETTE[0], ls="", marker=".", markersize=2, label="output")
    left.plot(data["step"], data["weak"], color=PALETTE[1], label="part of the weak feature")
    left.axhline(1, color=PALETTE[6], lw=1, ls="--", label="label")
    left.set(xlabel="step", ylabel="output")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    right.plot(data["step"], data["sum"], color=PALETTE[2])
    right.set(xlabel="step", ylabel="sum of residuals")
