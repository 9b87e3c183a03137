"""The probe "spectrum": the eigenvalues of the loss's Hessian at the network's weights."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from corollary.base.errors import BadInput, NothingMeasured
from corollary.base.network import batches
from corollary.dynamics.batch_curvature import GRANZIOL_2022
from corollary.dynamics.hessian_spectrum import OutliersAndBulk, outliers_and_bulk
from corollary.evidence import PALETTE, Coverage, Figure, Finding, Measurement, Need, Range, Source, Subject, probe
from corollary.linalg import Operator, hessian

GHORBANI_2019 = Source(
    "ghorbani2019investigation",
    ("Behrooz Ghorbani", "Shankar Krishnan", "Ying Xiao"),
    "An Investigation into Neural Net Optimization via Hessian Eigenvalue Density",
    2019,
    arxiv="1901.10159",
    venue="International Conference on Machine Learning",
)
MOST_SAMPLES = 4000
AT_ONCE = 1024
OUTLIERS, SEARCH, STEPS, PROBES = 12, 60, 20, 5
"""Eigenvalues found one by one, Lanczos steps for them, then Lanczos steps and probes for the rest."""
BASIS_BYTES = 2**29
"""What the Lanczos basis may take: networks of many parameters get fewer steps."""
MOST_STRETCH = 3
"""The picture reaches so many times as far as the eigenvalues, to show where steps stop being stable."""
FLAT = 1e-3
"""Eigenvalues below this share of the largest count as flat directions."""


@dataclass(frozen=True)
class _Measured:
    """The spectrum, and of how much data it is."""

    spectrum: OutliersAndBulk
    samples: int
    of: int


@probe(
    "spectrum",
    room="dynamics",
    title="Spectrum of the Hessian",
    question="How curved is the loss at these weights: how sharp, how flat, and is it a minimum?",
    needs=Need.GRADIENTS,
    data="targets",
    sources=(GHORBANI_2019, GRANZIOL_2022),
)
def spectrum_probe(subject: Subject) -> Finding:
    """Outlying eigenvalues, the density of the rest, trace and negative share, against 2 over the learning rate."""
    measured = _measure(subject)
    rate, momentum = subject.training.learning_rate, subject.training.momentum
    limit = None
    if rate is not None and subject.training.optimizer == "sgd":
        limit = 2 * (1 + momentum) / rate - subject.training.weight_decay
    notes = [
        f"The loss is the mean over {measured.samples} of {measured.of} training samples, in evaluation mode; "
        f"{measured.spectrum.products} Hessian-vector products."
    ]
    if limit is None:
        why = "the rate" if rate is None else "a limit for it"
        notes.append(
            f"Where gradient steps stop being stable is not marked: {why} is not known (--learning-rate, SGD)."
        )
    return Finding(_measurements(measured, limit), (_figure(measured.spectrum, limit),), tuple(notes))


def _measure(subject: Subject) -> _Measured:
    """As many samples and Lanczos steps as the budget allows, by the time of one product."""
    x, y = subject.sample(MOST_SAMPLES, "train")
    assert subject.data is not None  # the probe asks for targets
    if y is None:
        raise NothingMeasured("the Hessian is of a loss: it needs targets")
    of = len(subject.data.train.x)
    budget = subject.budget.remaining()
    few = min(len(x), 256)
    seconds, size = _time_of_product(subject, x[:few], y[:few])
    if size < 2:
        raise NothingMeasured("the network has one parameter: its Hessian is one number")
    outliers, search, steps, probes = _plan(size, x.dtype.itemsize)
    products = search + outliers + steps * probes
    samples = int(min(len(x), max(few, 0.7 * budget / (seconds / few * products))))
    x, y = x[:samples], y[:samples]
    op = _operator(subject, x, y)
    found = outliers_and_bulk(op, outliers, steps, probes, search_steps=search, generator=subject.seeds("spectrum"))
    return _Measured(found, samples, of)


def _plan(size: int, bytes_each: int) -> tuple[int, int, int, int]:
    """Outliers, Lanczos steps for them, steps and probes for the rest, within the size and the memory."""
    room = max(6, BASIS_BYTES // (size * bytes_each))
    outliers = max(1, min(OUTLIERS, size // 4, room // 4))
    return outliers, min(SEARCH, size, room), min(STEPS, size, room), PROBES


def _operator(subject: Subject, x: torch.Tensor, y: torch.Tensor) -> Operator:
    try:
        return hessian(subject.module, subject.loss, batches((x, y), AT_ONCE))
    except BadInput as error:
        raise NothingMeasured(f"the Hessian of this network could not be had.\n{error}") from error


def _time_of_product(subject: Subject, x: torch.Tensor, y: torch.Tensor) -> tuple[float, int]:
    op = _operator(subject, x, y)
    vector = torch.ones(op.shape[0], dtype=op.dtype, device=op.device)
    _ = op @ vector  # the first product builds the graph
    start = time.perf_counter()
    _ = float((op @ vector)[0])
    return time.perf_counter() - start, op.shape[0]


def _measurements(measured: _Measured, limit: float | None) -> tuple[Measurement, ...]:
    spectrum = measured.spectrum
    low, high = spectrum.edges()
    total, size = spectrum.trace(), spectrum.trace(torch.abs)
    negative = spectrum.trace(lambda x: (-x).clamp(min=0)).value / size.value if size.value > 0 else 0.0
    flat = spectrum.trace(lambda x: (x.abs() <= FLAT * max(high, -low)).double()).value / spectrum.size
    coverage = Coverage(measured.samples, measured.of, "samples")
    residual = float(spectrum.outliers.residuals.max())
    measurements = [
        Measurement(
            "largest eigenvalue",
            high,
            "Curvature of the loss in its sharpest direction: plain gradient steps are stable there with learning "
            f"rates up to 2 over it, {2 / high:.3g}."
            if high > 0
            else "No direction in which the loss curves upwards was found.",
            error=residual,
            error_kind="largest residual of the eigenvalues found one by one",
            reference=None
            if limit is None
            else Range(high=limit, text="2 (1 + momentum) / learning rate, stable below"),
            coverage=coverage,
        ),
        Measurement(
            "smallest eigenvalue",
            low,
            "Curvature in the direction in which the loss curves downwards most; far below 0 the weights are at a "
            "saddle, not at a minimum.",
            error=residual,
            error_kind="largest residual of the eigenvalues found one by one",
        ),
        Measurement(
            "trace",
            total.value,
            "Sum of all curvatures: twice the loss that a random unit of noise on every weight costs, to second order.",
            error=total.standard_error if math.isfinite(total.standard_error) else None,
            error_kind=f"standard error over {len(spectrum.bulk.nodes)} probes of what the outliers leave",
        ),
        Measurement(
            "negative share of the curvature",
            negative,
            "Sum of the negative curvatures over the sum of all magnitudes: 0 at a minimum, one half for noise.",
            reference=Range(0.0, 0.5),
        ),
        Measurement(
            "flat directions",
            flat,
            f"Share of directions whose curvature is within {FLAT:g} of 0, relative to the largest.",
        ),
    ]
    if limit is not None:
        above = int((spectrum.values > limit).sum())
        measurements.append(
            Measurement(
                "directions beyond stability",
                above,
                "Eigenvalues, of those found one by one, above 2 (1 + momentum) / learning rate: along them gradient "
                "descent on all data with these settings would diverge; training with them ended elsewhere, or hovers.",
                reference=Range(0, 0),
            )
        )
    return tuple(measurements)


def _figure(spectrum: OutliersAndBulk, limit: float | None) -> Figure:
    low, high = spectrum.edges()
    scale = max(high, -low, 1e-300)
    grid = torch.linspace(1.08 * min(low, -0.05 * scale), 1.08 * max(high, 0.05 * scale), 800, dtype=torch.float64)
    width = 0.006 * float(grid[-1] - grid[0])
    data = {
        "curvature": grid.numpy(),
        "density": spectrum.pdf(grid, width).numpy(),
        "outlier": spectrum.values.numpy(),
        "limit": [] if limit is None else [limit],
        "size": [spectrum.size],
    }
    marked = ""
    if limit is not None:
        seen = limit <= MOST_STRETCH * float(grid[-1])
        marked = f" Gradient steps stop being stable at {limit:.3g}, " + ("dashed." if seen else "beyond the picture.")
    return Figure(
        "hessian-spectrum",
        "Eigenvalues of the Hessian",
        f"Density of all {spectrum.size:,} eigenvalues, smoothed with a standard deviation of {width:.2g}; ticks are "
        f"the {len(spectrum.values)} of largest magnitude, found one by one.{marked}",
        data,
        _draw,
    )


def _draw(axes: Any, data: Mapping[str, Any]) -> None:
    curvature, density = np.asarray(data["curvature"]), np.asarray(data["density"])
    # A single eigenvalue, smoothed, stands well above this floor: nothing that was measured is cut off.
    width = 0.006 * (curvature[-1] - curvature[0])
    floor = 0.02 / (width * float(data["size"][0]))
    axes.fill_between(curvature, floor, np.maximum(density, floor), color=PALETTE[0], alpha=0.35, linewidth=0)
    axes.plot(curvature, np.maximum(density, floor), color=PALETTE[0], label="density of all eigenvalues")
    axes.plot(data["outlier"], np.full(len(data["outlier"]), floor * 1.6), "|", color=PALETTE[1], markersize=9,
              label="found one by one")  # fmt: skip
    for limit in data["limit"]:
        if limit <= MOST_STRETCH * curvature[-1]:
            axes.axvline(limit, color=PALETTE[2], linestyle="--", label="2 (1 + momentum) / learning rate")
    axes.set(xlabel="eigenvalue", ylabel="density", yscale="log", ylim=(floor, None))
    axes.legend()
