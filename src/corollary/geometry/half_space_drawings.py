"""The pictures of the probe "half-spaces"."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from corollary.evidence import PALETTE, Figure
from corollary.geometry.half_spaces import LayerNormals, OverlapAlignment, principal_plane

COLUMNS = 3


def normals_figure(layers: Sequence[LayerNormals], points: Sequence[str], notes: Mapping[str, str], how: str) -> Figure:
    """Half-spaces' normals by layer, in the plane of their first two principal components.

    Args:
        points: what to call the samples at which local normals were taken.
        notes: by layer, a line for the title of its panel.
        how: sentences for the caption: which normals these are.
    """
    plane = principal_plane([layer.normals for layer in layers])
    flat = [(layer.normals @ plane.T).cpu() for layer in layers]
    sizes = [len(rows) for rows in flat]
    shown = [float(rows.square().sum(1).mean()) for rows in flat]
    data = {
        "layer": np.repeat([layer.name for layer in layers], sizes),
        "component_1": torch.cat(flat)[:, 0].numpy(),
        "component_2": torch.cat(flat)[:, 1].numpy(),
        "at_sample": np.concatenate(
            [np.array(["everywhere"] * size if layer.exact else [points[i] for i in layer.sample.tolist()])
             for layer, size in zip(layers, sizes, strict=True)]
        ),
        "panel": [layer.name for layer in layers],
        "panel_note": [notes.get(layer.name, "") for layer in layers],
        "squared_length_shown": shown,
    }  # fmt: skip
    columns = 2 if len(layers) == 4 else min(COLUMNS, len(layers))
    rows = math.ceil(len(layers) / columns)
    caption = (
        "Normals of the half-spaces in which units are on, of length 1, projected on the first two principal "
        f"components of all layers' normals. {how} The share of squared length that the two components show stands "
        "over each panel; a point on the circle is shown in full, one near its middle points elsewhere."
    )
    return Figure(
        "half-space-normals",
        "Half-spaces by layer",
        caption,
        data,
        _draw_normals,
        size=(0.6 + 2.9 * columns, 0.5 + 3.1 * rows),
        panels=(rows, columns),
    )


def _draw_normals(axes: Any, data: Mapping[str, Any]) -> None:
    panels = np.atleast_1d(axes).ravel()
    layer, place = np.asarray(data["layer"]), np.asarray(data["at_sample"])
    x, y = np.asarray(data["component_1"]), np.asarray(data["component_2"])
    turn = np.linspace(0, 2 * np.pi, 200)
    places = list(dict.fromkeys(place.tolist()))
    colours = dict(zip(places, PALETTE, strict=False))
    for panel, name, note, share in zip(
        panels, data["panel"], data["panel_note"], data["squared_length_shown"], strict=False
    ):
        panel.plot(np.cos(turn), np.sin(turn), color=PALETTE[6], lw=0.8)
        for where in places:
            rows = (layer == name) & (place == where)
            panel.scatter(x[rows], y[rows], s=11, color=colours[where], alpha=0.7, edgecolors="none")
        lines = [f"layer {name}" if str(name).isdigit() else str(name), f"{100 * share:.0f} % shown", str(note)]
        panel.set_title("\n".join(line for line in lines if line), fontsize=8)
        panel.set(aspect="equal", xlim=(-1.08, 1.08), ylim=(-1.08, 1.08), xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        panel.set(xlabel="component 1", ylabel="component 2")
    for panel in panels[len(data["panel"]) :]:
        panel.set_axis_off()
    if len(places) > 1:
        _legend(panels[0].figure, places, colours, np.atleast_2d(axes).shape[1] + 1)


def _legend(figure: Any, places: list[str], colours: Mapping[str, str], columns: int) -> None:
    from matplotlib.lines import Line2D

    names = {"everywhere": "exact, everywhere"}
    handles = [
        Line2D([], [], ls="none", marker="o", color=colours[p], label=names.get(p, f"local, {p}")) for p in places
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)))


def alignment_figure(found: OverlapAlignment, samples: int) -> Figure:
    """Alignment of overlap kernels with the targets, by layer."""
    return Figure(
        "overlap-alignment",
        "Do gates tell the targets apart?",
        "Centred alignment of overlap kernels (the share of units, or of paths, open at both of two samples) with the "
        f"kernel of the targets, over {samples:,} samples: 1 if gates are shared exactly by samples of like targets, "
        "near 0 if they know nothing of them (unbiased estimate). Grey: the inputs themselves.",
        {"layer": list(found.layers), "alone": found.alone, "through": found.through, "inputs": [found.inputs]},
        _draw_alignment,
    )


def _draw_alignment(axes: Any, data: Mapping[str, Any]) -> None:
    position = np.arange(len(data["layer"]))
    axes.plot(position, data["alone"], "o-", color=PALETTE[0], label="gates of the layer alone")
    axes.plot(position, data["through"], "s--", color=PALETTE[1], label="paths up to the layer")
    axes.axhline(data["inputs"][0], color=PALETTE[6], ls=":", label="inputs")
    every = max(1, len(position) // 12)  # more names than that cannot be read
    names = list(data["layer"])[::every]
    axes.set_xticks(position[::every], names, rotation=45 if max(map(len, names)) > 3 else 0, ha="right")
    axes.set(xlabel="layer of gates", ylabel="alignment with the targets")
    axes.legend()
