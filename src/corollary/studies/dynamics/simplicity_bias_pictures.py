"""The figures of the study `simplicity-bias`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from corollary.evidence import PALETTE, Data, Figure

KINDS = {"auc": "nothing shuffled", "without_auc": "simple feature shuffled", "alone_auc": "all others shuffled"}


def figures(data: Data) -> tuple[Figure, ...]:
    """What is left after shuffling, the boundary in two coordinates, and the accuracy that the bias costs."""
    return (_shuffled(data), _boundary(data), _curves(data))


def _shuffled(data: Data) -> Figure:
    networks, ensemble, images = data["networks"], data["ensemble"], data["images"]
    names = np.asarray(networks["data"])
    columns: dict[str, list[Any]] = {"network": [], **{kind: [] for kind in KINDS}}
    for name in ("LMS-5", "MS-(5,7)", "noisy LMS-7"):
        for kind in KINDS:
            columns[kind].append(float(np.mean(np.asarray(networks[kind])[names == name])))
    for kind in KINDS:
        columns[kind].insert(1, float(np.asarray(ensemble[kind])[0]))
        name = {"without_auc": "without_top_auc", "alone_auc": "without_bottom_auc"}.get(kind, kind)
        columns[kind].append(float(np.mean(np.asarray(images[name]))))
    columns["network"] = ["LMS-5", "ensemble of LMS-5", "MS-(5,7)", "noisy LMS-7", "paired images"]
    return Figure(
        "simplicity-bias-auc",
        "What is left when features are shuffled",
        "AUC, mean over networks. Shuffling the simplest feature leaves chance; shuffling everything else changes "
        "nothing. In paired images the simple feature is the upper half.",
        columns,
        _draw_shuffled,
    )


def _boundary(data: Data) -> Figure:
    return Figure(
        "simplicity-bias-boundary",
        "The boundary ignores the slabs",
        "Share of inputs that a network trained on LMS-5 puts in class 1, over a linear coordinate and a five-slab "
        "one, the others as in test samples. Either would decide; the network looks along one of them.",
        data["boundary"],
        _draw_boundary,
        size=(4.8, 4.0),
    )


def _curves(data: Data) -> Figure:
    curves = {name: np.asarray(column) for name, column in data["curves"].items()}
    chosen = np.isin(curves["data"], ("noisy LMS-7", "MS-7"))
    return Figure(
        "simplicity-bias-cost",
        "What the bias costs",
        "Test accuracy over the updates. Beside a noisy linear coordinate, the seven-slab ones are not used, and "
        "accuracy stays at what the linear one allows (dotted); by themselves they are learned.",
        {name: column[chosen] for name, column in curves.items()},
        _draw_curves,
    )


def _draw_shuffled(axes: Any, data: Mapping[str, Any]) -> None:
    places = np.arange(len(data["network"]))
    for i, (kind, label) in enumerate(KINDS.items()):
        axes.bar(places + 0.27 * (i - 1), data[kind], width=0.25, color=PALETTE[(6, 1, 0)[i]], label=label)
    axes.axhline(0.5, color=PALETTE[6], linestyle=":", linewidth=1, label="chance")
    axes.set(ylabel="AUC", ylim=(0, 1.03))
    axes.set_xticks(places, data["network"])
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4)


def _draw_boundary(axes: Any, data: Mapping[str, Any]) -> None:
    places = np.unique(data["linear"])
    shares = np.asarray(data["class_1"]).reshape(len(places), len(places))
    mesh = axes.pcolormesh(places, places, shares.T, vmin=0, vmax=1, rasterized=True)
    axes.figure.colorbar(mesh, ax=axes, label="share in class 1")
    axes.set(xlabel="linear coordinate", ylabel="five-slab coordinate")
    axes.grid(visible=False)


def _draw_curves(axes: Any, data: Mapping[str, Any]) -> None:
    kinds, seeds = np.asarray(data["data"]), np.asarray(data["seed"])
    names = {"noisy LMS-7": "noisy linear and 49 seven-slab coordinates", "MS-7": "50 seven-slab coordinates"}
    for i, (name, label) in enumerate(names.items()):
        for seed in np.unique(seeds[kinds == name]):
            rows = (kinds == name) & (seeds == seed)
            axes.plot(
                data["step"][rows], data["test_accuracy"][rows], color=PALETTE[i], label=label if seed == 0 else None
            )
    axes.axhline(0.95, color=PALETTE[6], linestyle=":", label="the linear coordinate alone")
    axes.set(xlabel="update", ylabel="test accuracy", ylim=(0.45, 1.02))
    axes.legend(loc="lower right")
