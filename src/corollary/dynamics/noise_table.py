"""What a phase diagram of SGD noise found, cell by cell, and the temperature at which noise begins to matter."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from corollary.base.errors import BadInput
from corollary.evidence import PALETTE, Figure

Observable = Literal["weight_change", "kernel_change", "test_error", "time"]
SHOWN: dict[Observable, str] = {
    "weight_change": "relative weight change",
    "kernel_change": "relative kernel change",
    "test_error": "test error",
}


@dataclass(frozen=True)
class PhaseTable:
    r"""One row for each trained network.

    Attributes:
        points: P, size of its training set.
        alpha, temperature: scale of the output and temperature of its cell; `repeat` numbers the networks of a cell.
        steps: updates made, and `time` $= t$ in units in which one update takes $dt = T h B$.
        test_error: share of wrong answers on the samples it was not trained on; NaN where there are none.
        weight_change: $\lVert w - w_0 \rVert / \lVert w_0 \rVert$.
        kernel_change: $\lVert K - K_0 \rVert / \lVert K_0 \rVert$ of the tangent kernel on a few samples; NaN if not
            asked.
        finished: whether it fitted every training point. The others (too slow, or blown up) tell nothing of the end of
            training: leave them out of fits, and say how many they are.
        diverged: whether it blew up.
        width, batch_size: h and B, by which learning rates were made from temperatures.
    """

    points: np.ndarray
    alpha: np.ndarray
    temperature: np.ndarray
    repeat: np.ndarray
    steps: np.ndarray
    time: np.ndarray
    test_error: np.ndarray
    weight_change: np.ndarray
    kernel_change: np.ndarray
    finished: np.ndarray
    diverged: np.ndarray
    width: int
    batch_size: int

    def __len__(self) -> int:
        return len(self.points)

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Everything that has one entry per network, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, np.ndarray)}

    def where(self, keep: np.ndarray) -> "PhaseTable":
        """The rows for which `keep` is true."""
        kept = {name: column[keep] for name, column in self.columns.items()}
        return PhaseTable(**kept, width=self.width, batch_size=self.batch_size)

    def figure(self) -> Figure:
        """Test error, weight change and kernel change over temperature and scale; of one scale, over temperature."""
        return _figure(self)


def characteristic_temperature(
    table: PhaseTable, observable: Observable = "weight_change", factor: float = 2.0, *, threshold: float | None = None
) -> dict[int, float]:
    r"""The temperature $T_c$ at which noise begins to change the trained network, for each training-set size P.

    It is where the geometric mean of `observable` over the networks that finished rises through `threshold`,
    interpolated in logarithms.

    Args:
        factor: where no threshold is given, it is this many times the value at the lowest temperature of that size.
    Returns: $T_c$ by P; NaN where the observable does not cross the threshold within the temperatures measured.
    Raises: BadInput, if the table holds several scales, or no network that finished.
    """
    if len(scales := np.unique(table.alpha)) > 1:
        raise BadInput(f"a characteristic temperature is of one scale alpha, the table holds {scales.tolist()}")
    done = table.where(table.finished)
    if not len(done):
        raise BadInput(f"none of the {len(table)} networks finished: there is no end of training to compare")
    return {
        int(size): _crossing(done.where(done.points == size), observable, factor, threshold)
        for size in np.unique(done.points)
    }


def _crossing(done: PhaseTable, observable: Observable, factor: float, threshold: float | None) -> float:
    temperatures = np.unique(done.temperature)
    values = getattr(done, observable)
    if not (values > 0).all():
        raise BadInput(f"{observable} is averaged in logarithms and must be positive, got {float(values.min())}")
    means = np.array([np.log(values[done.temperature == t]).mean() for t in temperatures])
    wanted = math.log(threshold) if threshold is not None else means[0] + math.log(factor)
    crossings = np.flatnonzero((means[:-1] < wanted) & (means[1:] >= wanted))
    if not len(crossings):
        return math.nan
    i = crossings[0]
    share = (wanted - means[i]) / (means[i + 1] - means[i])
    low, high = np.log(temperatures[i : i + 2])
    return float(np.exp(low + share * (high - low)))


def cell_means(table: PhaseTable, observable: Observable) -> dict[str, np.ndarray]:
    """Mean of `observable` over the networks of each cell that finished, and how many did: columns by cell.

    The mean is geometric for what spans decades (changes and times) and arithmetic for the test error. NaN where none
    finished.
    """
    cells = np.unique(np.stack([table.points, table.alpha, table.temperature], axis=1), axis=0)
    values = getattr(table, observable)
    means, finished, of = [], [], []
    for size, alpha, temperature in cells:
        here = (table.points == size) & (table.alpha == alpha) & (table.temperature == temperature)
        done = values[here & table.finished]
        finished.append(len(done))
        of.append(int(here.sum()))
        if not len(done):
            means.append(math.nan)
        elif observable == "test_error":
            means.append(float(done.mean()))
        else:
            means.append(float(np.exp(np.log(np.maximum(done, np.finfo(float).tiny)).mean())))
    return {
        "points": cells[:, 0].astype(int),
        "alpha": cells[:, 1],
        "temperature": cells[:, 2],
        "mean": np.array(means),
        "finished": np.array(finished),
        "of": np.array(of),
    }


def _figure(table: PhaseTable) -> Figure:
    shown: list[Observable] = [name for name in SHOWN if np.isfinite(getattr(table, name)).any()]
    data: dict[str, Any] = {}
    for name in shown:
        means = cell_means(table, name)
        data |= {key: means[key] for key in ("points", "alpha", "temperature", "finished", "of")}
        data[name] = means["mean"]
    unfinished = int((~table.finished).sum())
    return Figure(
        "noise-phase-diagram",
        "Where SGD noise matters",
        f"Means over the networks of a cell that fitted every training point; {unfinished} of {len(table)} networks "
        "did not, and cells without any that did are left blank.",
        data,
        _draw_maps if len(np.unique(table.alpha)) > 1 else _draw_lines,
        size=(3.3 * len(shown), 3.2),
        panels=(1, len(shown)) if len(shown) > 1 else (1, 1),
    )


def _panels(axes: Any, data: Mapping[str, Any]) -> list[tuple[Any, Observable]]:
    return list(zip(np.atleast_1d(axes), (name for name in SHOWN if name in data), strict=True))


def _draw_maps(axes: Any, data: Mapping[str, Any]) -> None:
    """Scale against temperature, for the largest training set."""
    here = np.asarray(data["points"]) == np.max(data["points"])
    alphas, row = np.unique(np.asarray(data["alpha"])[here], return_inverse=True)
    temperatures, column = np.unique(np.asarray(data["temperature"])[here], return_inverse=True)
    for ax, name in _panels(axes, data):
        grid = np.full((len(alphas), len(temperatures)), math.nan)
        grid[row, column] = np.asarray(data[name], dtype=float)[here]
        shown = grid if name == "test_error" else np.log10(grid)
        mesh = ax.pcolormesh(range(len(temperatures)), range(len(alphas)), shown, shading="nearest", rasterized=True)
        ax.figure.colorbar(mesh, ax=ax, label=SHOWN[name] if name == "test_error" else f"log10 of {SHOWN[name]}")
        every = math.ceil(len(temperatures) / 5)
        ax.set_xticks(range(0, len(temperatures), every), [f"{t:.1g}" for t in temperatures[::every]])
        ax.set_yticks(range(len(alphas)), [f"{alpha:.3g}" for alpha in alphas])
        ax.set(xlabel="temperature", ylabel="output scale")
        ax.grid(False)


def _draw_lines(axes: Any, data: Mapping[str, Any]) -> None:
    """Temperature against each observable, a line for each training-set size."""
    points, temperature = np.asarray(data["points"]), np.asarray(data["temperature"])
    for ax, name in _panels(axes, data):
        for number, size in enumerate(np.unique(points)):
            here = points == size
            colour = PALETTE[number % len(PALETTE)]
            ax.plot(temperature[here], np.asarray(data[name])[here], "o-", color=colour, label=f"{size} points")
        ax.set(xscale="log", yscale="linear" if name == "test_error" else "log")
        ax.set(xlabel="temperature", ylabel=SHOWN[name])
        ax.legend()
