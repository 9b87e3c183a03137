"""The pictures of the probe "conditioning"."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from corollary.evidence import PALETTE, Figure
from corollary.geometry.singular_values import ConditioningReport, ResidualBlock, condition_numbers, numeric_rank
from corollary.geometry.skips import SkipComparison

FLOOR = 1e-16
"""Zero has no place on a logarithmic axis: it is drawn at this share of the largest value."""


def bands_figure(report: ConditioningReport, top: Mapping[str, Tensor], plain: ConditioningReport) -> Figure:
    """Singular values by layer.

    Args:
        report: all values of some layers.
        top: the largest values of others.
        plain: values of the same weights without skip connections; empty if there are none.
    """
    names = [*report.values, *top]
    spectra = [*report.values.values(), *(values[None] for values in top.values())]
    whole = [name in report.values for name in names]  # of the others only the largest values are known
    unknown = np.full(3, np.nan)
    bands = np.array(
        [
            np.percentile(s.cpu().numpy(), (10, 50, 90)) if known else unknown
            for s, known in zip(spectra, whole, strict=True)
        ]
    ).T
    conditions = [condition_numbers(s, effective=True).log10().median() for s in spectra]
    data = {
        "layer": names,
        "low": bands[0],
        "median": bands[1],
        "high": bands[2],
        "largest": [float(s[:, 0].median()) for s in spectra],
        "log10_condition": [float(c) if known else np.nan for c, known in zip(conditions, whole, strict=True)],
        "rank": [float(numeric_rank(s).median()) if known else np.nan for s, known in zip(spectra, whole, strict=True)],
    }
    caption = (
        "Singular values of the map from each layer's output to the network's: 10, 50 and 90 % over samples and "
        "directions, and the largest (median over samples). Lost directions are drawn at 1e-16 of the largest."
    )
    if plain.values:
        data["median_without_skips"] = [
            float(plain.values[name].median()) if name in plain.values else np.nan for name in names
        ]
        caption += " Dotted: the medians of the same weights with the skip connections taken out."
    return Figure("layer-conditioning", "Singular values by layer", caption, data, _draw_bands)


def skips_figure(compared: SkipComparison | None, blocks: tuple[ResidualBlock, ...]) -> Figure:
    """The singular values with and without skip connections, beside the residual blocks with their bound.

    Either may be missing, but not both.
    """
    data: dict[str, Any] = {}
    parts = []
    if compared is not None:
        profiles = {"with": compared.with_skips, "without": compared.without_skips}
        data["index"] = np.arange(1, compared.with_skips.shape[1] + 1)
        for name, s in profiles.items():
            for level, values in zip(("low", "median", "high"), _quantiles(s), strict=True):
                data[f"{name}_{level}"] = values.numpy()
        parts.append(
            f"singular values of the map through all residual blocks to {compared.end}, as the network is and with the "
            "same weights but its skip connections taken out (lines: median over samples; bands: 10 to 90 %; lost "
            "directions at 1e-16 of the largest)"
        )
    if blocks:
        data["block"] = [block.name for block in blocks]
        data["block_condition"] = [float(block.condition.median()) for block in blocks]
        data["block_bound"] = [float(block.bound.median()) for block in blocks]
        parts.append(
            "condition numbers of the residual blocks, with the bound (1 + q) / (1 - q) from the norm q of their "
            "branch, which exists where q is below 1"
        )
    caption = f"Left: {parts[0]}. Right: {parts[1]}." if len(parts) == 2 else f"{parts[0].capitalize()}."
    draw = _draw_both if len(parts) == 2 else _draw_blocks if blocks else _draw_profiles
    size, panels = ((8.4, 3.8), (1, 2)) if len(parts) == 2 else ((6.4, 3.8), (1, 1))
    return Figure("skip-connections", "What the skip connections do", caption, data, draw, size=size, panels=panels)


def _quantiles(s: Float[Tensor, "n values"]) -> Float[Tensor, "3 values"]:
    return torch.quantile(s.cpu(), torch.tensor([0.1, 0.5, 0.9], dtype=s.dtype), dim=0)


def _draw_bands(axes: Any, data: Mapping[str, Any]) -> None:
    position = np.arange(len(data["layer"]))
    low, middle, high, largest = (np.asarray(data[name]) for name in ("low", "median", "high", "largest"))
    smallest = largest.max() * FLOOR
    axes.fill_between(position, low.clip(smallest), high.clip(smallest), color=PALETTE[0], alpha=0.2, lw=0)
    axes.plot(position, middle.clip(smallest), "o-", color=PALETTE[0], label="median")
    axes.plot(position, largest, "^--", color=PALETTE[1], label="largest")
    if "median_without_skips" in data:
        plain = np.asarray(data["median_without_skips"]).clip(smallest)
        axes.plot(position, plain, "s:", color=PALETTE[6], label="median, skips removed")
    axes.set(xlabel="layer", ylabel="singular value", yscale="log")
    _name_ticks(axes, data["layer"])
    axes.legend()


def _draw_both(axes: Any, data: Mapping[str, Any]) -> None:
    _draw_profiles(axes[0], data)
    _draw_blocks(axes[1], data)


def _draw_profiles(axes: Any, data: Mapping[str, Any]) -> None:
    floor = FLOOR * max(np.max(data["with_high"]), np.max(data["without_high"]))
    for name, label, style, colour in (
        ("with", "with skips", "-", PALETTE[0]),
        ("without", "skips removed", "--", PALETTE[1]),
    ):
        low, middle, high = (np.asarray(data[f"{name}_{level}"]).clip(floor) for level in ("low", "median", "high"))
        axes.fill_between(data["index"], low, high, color=colour, alpha=0.2, lw=0)
        axes.plot(data["index"], middle, style, color=colour, label=label)
    axes.set(xlabel="number of the singular value, from the largest", ylabel="singular value", yscale="log")
    axes.legend()


def _draw_blocks(axes: Any, data: Mapping[str, Any]) -> None:
    position = np.arange(len(data["block"]))
    condition, bound = np.asarray(data["block_condition"]), np.asarray(data["block_bound"])
    finite = np.isfinite(bound)
    axes.plot(position, condition, "o", color=PALETTE[0], label="measured")
    label = "bound" if finite.all() else f"bound (none for {np.sum(~finite)} of {len(bound)})"
    axes.plot(position, np.where(finite, bound, np.nan), "_", ms=14, mew=2, color=PALETTE[1], label=label)
    axes.set(xlabel="residual block", ylabel="condition number", yscale="log")
    axes.margins(0.15)
    _name_ticks(axes, data["block"])
    axes.legend()


def _name_ticks(axes: Any, names: list[str]) -> None:
    every = max(1, len(names) // 12)  # more names than that cannot be read
    axes.set_xticks(range(0, len(names), every), names[::every], rotation=45, ha="right")
