"""The pictures of the study `batch-size-learning-rate`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from corollary.dynamics.broadening import fit_broadening
from corollary.evidence import PALETTE, Data, Figure
from corollary.studies.dynamics.batch_size_learning_rate_setup import restored


def figures(data: Data) -> tuple[Figure, ...]:
    """The curve with its law, both extremes, the largest rates, and the contest."""
    curve = restored(data["curve"], data["whole"])
    return (fit_broadening(curve).figure(), curve.figure(), _rates(data), _contest(data))


def _rates(data: Data) -> Figure:
    table = data["rates"]
    return Figure(
        "largest-rates",
        "Largest learning rate that trains, against batch size",
        "All seeds reach a training loss below 1 in 200 steps. Dotted lines have slopes 1 and one half: SGD lies "
        "between them and then levels off, Adam follows the root.",
        {name: np.asarray(table[name]) for name in ("batch_size", "sgd", "adam")},
        _draw_rates,
    )


def _draw_rates(axes: Any, data: Mapping[str, Any]) -> None:
    sizes = np.asarray(data["batch_size"], dtype=float)
    for name, label, colour, slope in (("sgd", "SGD", PALETTE[0], 1.0), ("adam", "Adam", PALETTE[1], 0.5)):
        rates = np.asarray(data[name])
        axes.plot(sizes, rates, "o-", color=colour, label=label)
        axes.plot(sizes, rates[0] * (sizes / sizes[0]) ** slope, ":", color=colour, label=f"slope {slope:g}")
    axes.set(xlabel="batch size", ylabel="largest learning rate", xscale="log", yscale="log")
    axes.legend()


def _contest(data: Data) -> Figure:
    grid, runs = data["grid"], data["runs"]
    rows, mine = np.asarray(grid["batches"]) == "all", np.asarray(runs["batches"]) == "all"
    return Figure(
        "learner",
        "The learner against constant settings",
        "Training loss after equal numbers of gradient evaluations, all data a step: constant learning rates (first "
        "seed, one line a momentum; missing points diverged), and the learner on every seed (band).",
        {
            "rate": np.asarray(grid["learning_rate"])[rows],
            "momentum": np.asarray(grid["momentum"])[rows],
            "log_loss": np.asarray(grid["log_loss"], dtype=float)[rows],
            "learner": np.asarray(runs["log_loss"], dtype=float)[mine],
        },
        _draw_contest,
    )


def _draw_contest(axes: Any, data: Mapping[str, Any]) -> None:
    rate, momentum = np.asarray(data["rate"]), np.asarray(data["momentum"])
    loss, learner = np.asarray(data["log_loss"], dtype=float), np.asarray(data["learner"], dtype=float)
    for index, value in enumerate(np.unique(momentum)):
        chosen = (momentum == value) & np.isfinite(loss)
        axes.plot(
            rate[chosen], 10 ** loss[chosen], "o-", color=PALETTE[index % len(PALETTE)], label=f"momentum {value:g}"
        )
    if np.isfinite(learner).all():
        axes.axhspan(10 ** learner.min(), 10 ** learner.max(), color=PALETTE[6], alpha=0.4, label="learner")
        axes.axhline(10 ** learner.mean(), color=PALETTE[6])
    axes.set(xlabel="constant learning rate", ylabel="training loss", xscale="log", yscale="log", ylim=(None, 10))
    axes.legend(ncol=2)
