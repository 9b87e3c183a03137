"""The figures of the study `utility-duality`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from corollary.evidence import PALETTE, Data, Figure


def figures(data: Data) -> tuple[Figure, ...]:
    """What a draw is worth, what monotone maps change, the two sides of the duality, and order against law."""
    return (
        Figure(
            "decisions",
            "What one draw is worth under each probability",
            "Toy translation: quality of one draw. The network and its candidates are the same for all rows; dashed, "
            "the exact match of the best output of the beam.",
            {**dict(data["report"]), "beam_match": data["translation"]["beam_match"]},
            _draw_decisions,
            size=(7.6, 3.8),
        ),
        Figure(
            "monotone-maps",
            "Increasing maps of utilities",
            "Digits with noisy labels. Left: negative log-likelihood of noisy test labels under the softmax and after "
            "a fitted temperature; all maps leave the order of classes as it is. Right: accuracy against confidence "
            "for the unmapped network; the area of a mark grows with its samples.",
            {
                **{f"map_{name}": column for name, column in data["maps"].items()},
                **dict(data["reliability"].items()),
            },
            _draw_maps,
            size=(8.6, 3.8),
            panels=(1, 2),
        ),
        Figure(
            "telescoping",
            "Frequency, softmax and utility",
            "A tabular utility of four outputs: how often each was observed so far (lines), the average softmax so far "
            "(dotted), and this plus the utility gained per unit step (circles), which is on the line.",
            dict(data["telescoping"]),
            _draw_telescoping,
        ),
        Figure(
            "order-and-law",
            "Utility against the law of the data",
            "Left: the 50 most likely sequences of the first grammar, 300 training sentences (fewer at small scale); "
            "the line is equality. Right: agreement of the order, and total variation, for each seed and size.",
            {
                **{f"sequence_{name}": column for name, column in data["likely"].items()},
                **dict(data["grammar"].items()),
            },
            _draw_order,
            size=(8.6, 3.8),
            panels=(1, 2),
        ),
    )


def _draw_decisions(axes: Any, data: Mapping[str, Any]) -> None:
    columns = {name: np.asarray(column) for name, column in data.items()}
    own = columns["rule"] == "sample"
    order = np.argsort(columns["exact match"][own])
    places = np.arange(len(order))
    for i, name in enumerate(("exact match", "token accuracy")):
        values = columns[name][own][order]
        axes.barh(places + 0.2 - 0.4 * i, values, height=0.38, color=PALETTE[i], label=name)
    axes.axvline(columns["beam_match"].item(), color=PALETTE[0], ls="--", lw=1)
    axes.set_yticks(places, columns["transform"][own][order])
    axes.set(xlabel="expected quality of one draw", xlim=(0, 1.02))
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _draw_maps(axes: Any, data: Mapping[str, Any]) -> None:
    left, right = axes
    columns = {name: np.asarray(column) for name, column in data.items()}
    places = np.arange(len(columns["map_map"]))
    for i, (transform, label) in enumerate((("softmax", "softmax"), ("temperature", "after temperature"))):
        left.bar(places + 0.4 * i - 0.2, columns[f"map_{transform}_nll"], width=0.38, color=PALETTE[i], label=label)
        own = (columns["transform"] == transform) & (columns["map"] == "u")
        confidence, accuracy, count = (columns[name][own] for name in ("confidence", "accuracy", "count"))
        right.plot(confidence, accuracy, color=PALETTE[i], lw=1, label=label)
        right.scatter(confidence, accuracy, s=8 + 160 * count / count.sum(), color=PALETTE[i], alpha=0.7, lw=0)
    left.set_xticks(places, columns["map_map"])
    left.set(xlabel="map of the utilities u", ylabel="negative log-likelihood")
    left.grid(axis="x", visible=False)
    left.legend()
    right.plot([0, 1], [0, 1], color=PALETTE[6], lw=1, ls="--", label="calibrated")
    right.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    right.legend()


def _draw_telescoping(axes: Any, data: Mapping[str, Any]) -> None:
    columns = {name: np.asarray(column) for name, column in data.items()}
    for output in range(int(columns["output"].max()) + 1):
        own = columns["output"] == output
        step, average = columns["step"][own], columns["softmax_average"][own]
        colour = PALETTE[output]
        axes.plot(step, columns["frequency"][own], color=colour, label=f"output {output}")
        axes.plot(step, average, color=colour, ls=":")
        axes.plot(step[::3], (average + columns["drift"][own])[::3], "o", mfc="none", color=colour)
    axes.set(xlabel="steps", ylabel="share of the steps", xscale="log")
    axes.legend()


def _draw_order(axes: Any, data: Mapping[str, Any]) -> None:
    left, right = axes
    columns = {name: np.asarray(column) for name, column in data.items()}
    law = columns["sequence_log_probability"]
    left.plot(law, columns["sequence_utility"], "o", color=PALETTE[0])
    left.plot([law.min(), law.max()], [law.min(), law.max()], color=PALETTE[6], lw=1, ls="--")
    left.set(xlabel="log probability", ylabel="utility of the network")
    for i, (name, label) in enumerate((("tau", "Kendall tau"), ("variation", "total variation"))):
        right.plot(columns["samples"], columns[name], "o", color=PALETTE[i], label=label)
    right.set_xticks(np.unique(columns["samples"]))
    right.set(xlabel="training sentences", ylim=(0, 1))
    right.legend()
