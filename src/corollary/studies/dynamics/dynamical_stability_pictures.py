"""The pictures of the study `dynamical-stability`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from corollary.evidence import PALETTE, Data, Figure

COLOURS = {"SGD": PALETTE[0], "GD": PALETTE[1]}


def figures(data: Data) -> tuple[Figure, ...]:
    """Sharpness and test error by learning rate, and the balance of the layers over training."""
    return (
        Figure(
            "trace-and-test-error",
            "What stability makes of the minima",
            "Diagonal networks trained by SGD of batch size 1 and by gradient descent from the same weights. Left: the "
            "trace over what stability allows SGD (filled) and the largest eigenvalue over what it allows gradient "
            "descent (open); both stay below 1 where they must. Right: the test error, which follows the trace.",
            data["runs"],
            _draw_runs,
            size=(8.6, 3.6),
            panels=(1, 2),
        ),
        Figure(
            "balance",
            "SGD balances the layers",
            "The trace over the least it can be for the same linear map, from r = 8, over the share of the training: "
            "1 is balance. A line for each seed.",
            data["balance"],
            _draw_balance,
            size=(5.4, 3.6),
        ),
        Figure(
            "trace-bound",
            "The trace bound is necessary, not sufficient",
            "Learning rate at the exact threshold times the trace over 2B, and times the largest eigenvalue over 2, "
            "for random gradients: neither passes 1, and thresholds lie well below what the trace alone allows.",
            data["traces"],
            _draw_bound,
            size=(5.4, 3.6),
        ),
    )


def _draw_runs(axes: Any, data: Mapping[str, Any]) -> None:
    left, right = axes
    columns = {name: np.asarray(column) for name, column in data.items()}
    for method, colour in COLOURS.items():
        here = columns["method"] == method
        rate = columns["learning_rate"][here]
        left.plot(rate, rate * columns["trace"][here] / 2, "o", color=colour, label=f"{method}: trace")
        eigenvalue = rate * columns["largest_eigenvalue"][here] / 2
        left.plot(rate, eigenvalue, "o", color=colour, mfc="none", label=f"{method}: largest eigenvalue")
        right.plot(rate, columns["test_error"][here], "o", color=colour, label=method)
        rates = np.unique(rate)
        right.plot(rates, [columns["test_error"][here][rate == one].mean() for one in rates], color=colour, lw=1)
    left.axhline(1, color=PALETTE[6], lw=1, ls="--", label="edge of stability")
    left.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="learning rate × sharpness / 2")
    left.legend(fontsize=7)
    right.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="test error")
    right.legend()


def _draw_balance(axes: Any, data: Mapping[str, Any]) -> None:
    columns = {name: np.asarray(column) for name, column in data.items()}
    for method, colour in COLOURS.items():
        for seed in np.unique(columns["seed"]):
            here = (columns["method"] == method) & (columns["seed"] == seed)
            step = columns["step"][here]
            label = f"{method}, {step.max():,} steps" if seed == 0 else None
            axes.plot(step / step.max(), columns["balance"][here], color=colour, label=label)
    axes.axhline(1, color=PALETTE[6], lw=1, ls="--", label="balanced")
    axes.set(xlabel="share of the training", ylabel="imbalance r of the layers", yscale="log")
    axes.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.minorticks_off()
    axes.legend()


def _draw_bound(axes: Any, data: Mapping[str, Any]) -> None:
    bins = np.linspace(0, 1, 26)
    axes.hist(data["trace_share"], bins=bins, color=PALETTE[0], alpha=0.7, label="trace over 2B / rate")
    axes.hist(data["eigenvalue_share"], bins=bins, color=PALETTE[1], alpha=0.5, label="eigenvalue over 2 / rate")
    axes.axvline(1, color=PALETTE[6], lw=1, ls="--")
    axes.set(xlabel="share of what stability allows", ylabel="random draws")
    axes.legend()
