"""The pictures of the study `sgd-noise-regimes`."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from corollary.evidence import PALETTE, Figure, Table


def perceptron_figure(table: Table) -> Figure:
    """Signal over noise and training time against the number of points, with the predicted slopes."""
    return Figure(
        "noise-perceptron",
        "A perceptron that must outgrow its noise",
        "Runs that fitted every point, and (lines) the predicted slopes through their geometric means. The thinner the "
        "data at the boundary (the larger chi), the less the signal has to outgrow the noise.",
        {name: np.asarray(column) for name, column in table.items()},
        _draw_perceptron,
        size=(8.4, 3.6),
        panels=(1, 2),
    )


def network_figure(table: Table, threshold: float) -> Figure:
    """Weight change and training time of the lazy networks against temperature, by training-set size."""
    return Figure(
        "noise-networks",
        "Hotter and larger: further and longer",
        "Lazy networks on the parity of digits, those that fitted every point. Left: the hotter SGD, and the more "
        "points there are, the further the weights move; the dashed line marks the change that defines the "
        "characteristic temperature. Right: training time.",
        {name: np.asarray(column) for name, column in table.items()},
        partial(_draw_networks, threshold=threshold),
        size=(8.4, 3.6),
        panels=(1, 2),
    )


def _draw_perceptron(axes: Any, data: Mapping[str, Any]) -> None:
    done = np.asarray(data["finished"], dtype=bool)
    chi, points = np.asarray(data["chi"])[done], np.asarray(data["points"])[done]
    values = (np.divide(data["w1"], data["w_perp"])[done], np.asarray(data["time"])[done])
    for number, depletion in enumerate(np.unique(chi)):
        here, colour = chi == depletion, PALETTE[number % len(PALETTE)]
        sizes = np.unique(points[here])
        for ax, value, exponent in zip(axes, values, (1 / (1 + depletion), 1 + 2 / (1 + depletion)), strict=True):
            ax.plot(points[here], value[here], "o", color=colour, alpha=0.6, label=f"chi = {depletion:g}")
            middle = np.log(value[here]).mean() - exponent * np.log(points[here]).mean()
            ax.plot(sizes, np.exp(middle) * sizes**exponent, "-", color=colour)
    axes[0].set(xlabel="training points", ylabel="signal over noise of the weights", xscale="log", yscale="log")
    axes[1].set(xlabel="training points", ylabel="training time", xscale="log", yscale="log")
    axes[0].legend()


def _draw_networks(axes: Any, data: Mapping[str, Any], threshold: float) -> None:
    done = np.asarray(data["finished"], dtype=bool)
    points, temperature = np.asarray(data["points"])[done], np.asarray(data["temperature"])[done]
    names = (("weight_change", "relative weight change"), ("time", "training time"))
    for ax, (name, label) in zip(axes, names, strict=True):
        values = np.asarray(data[name])[done]
        for number, size in enumerate(np.unique(points)):
            here, colour = points == size, PALETTE[number % len(PALETTE)]
            grid = np.unique(temperature[here])
            means = [np.exp(np.log(values[here & (temperature == t)]).mean()) for t in grid]
            ax.plot(temperature[here], values[here], "o", color=colour, alpha=0.5)
            ax.plot(grid, means, "-", color=colour, label=f"{size} points")
        ax.set(xlabel="temperature", ylabel=label, xscale="log", yscale="log")
    axes[0].axhline(threshold, linestyle="--", color=PALETTE[-1])
    axes[0].legend()
