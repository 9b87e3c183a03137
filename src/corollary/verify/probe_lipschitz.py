"""The probe "lipschitz": how steep a network can be anywhere, and how far that keeps samples from another class."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from corollary.base.network import call
from corollary.evidence import PALETTE, Coverage, Figure, Finding, Measurement, Need, Subject, probe
from corollary.verify.lipschitz.bound import FAZLYAB, PAULI, LipschitzBound, lipschitz_bound
from corollary.verify.lipschitz.lower import lipschitz_lower
from corollary.verify.lipschitz.reading import system_of

WIDEST, WIDEST_INPUT = 300, 1024
"""Entries of all nonlinearities together, and of the input, up to which the semidefinite program is solved."""
MOST_SAMPLES, FEWEST_SAMPLES, WORK = 20_000, 256, 4e7
"""Inputs at which slopes are taken: fewer where samples times outputs times entries would exceed the last number."""
IMAGES = 1000


@probe(
    "lipschitz",
    room="verify",
    title="Lipschitz constant",
    question="How much can the output change for a small change of the input, anywhere?",
    needs=Need.PROGRAM,
    sources=(PAULI, FAZLYAB),
)
def lipschitz(subject: Subject) -> Finding:
    """A certified upper bound beside the largest slope found and the product of norms; radii of unchanged answers."""
    system = system_of(subject.graph)
    product = lipschitz_bound(system, method="product")
    small = system.hidden <= WIDEST and system.inputs <= WIDEST_INPUT
    bound = lipschitz_bound(system) if small else product
    too_large = (
        f"An input of {system.inputs:,} and nonlinearities of {system.hidden:,} entries are too many for a "
        f"semidefinite program in a report (at most {WIDEST_INPUT:,} and {WIDEST}): the bound is the product of norms."
    )
    work = len(system.output) * (system.hidden + system.inputs + 1)
    samples = max(FEWEST_SAMPLES, min(MOST_SAMPLES, int(WORK / work)))
    shape = [size for size in subject.graph.inputs[0].shape[1:] if isinstance(size, int)]
    found = lipschitz_lower(
        subject.module,
        samples=samples,
        refine=samples == MOST_SAMPLES,
        example=torch.zeros(1, *shape),
        generator=subject.seeds("slopes"),
    )
    measurements, figures = _of_constant(bound, product, found, samples), ()
    if subject.task == "classification" and len(system.output) > 1:
        radii, right = _radii(subject, bound.value)
        measurements.append(_of_radii(radii, subject))
        figures = (_figure(radii, right, bound),)
    return Finding(tuple(measurements), figures, () if small else (too_large,))


def _of_constant(bound: LipschitzBound, product: LipschitzBound, found: float, samples: int) -> list[Measurement]:
    proof = (
        "by norms of its layers" if bound.certificate is None else "by a semidefinite program, checked as a certificate"
    )
    measurements = [
        Measurement(
            "Lipschitz bound",
            bound.value,
            "No change of the input, anywhere, changes the output by more than this many times its length; proved "
            f"{proof}.",
            headline=True,
        ),
        Measurement(
            "largest slope found",
            found,
            f"The largest factor by which a small change was stretched at any of {samples:,} random inputs; the true "
            "Lipschitz constant lies between this and the bound.",
        ),
        Measurement(
            "product of norms",
            product.value,
            "The bound that multiplies the norms of the layers: what is known without regard to how they fit together.",
        ),
        Measurement(
            "bound over slope found",
            bound.value / found if found else math.inf,
            "How much of the bound may be slack: at 1 it is the Lipschitz constant itself.",
        ),
    ]
    if bound.lmi_min_eig is not None and bound.certificate is not None:
        measurements.append(
            Measurement(
                "certificate margin",
                bound.lmi_min_eig,
                "Smallest eigenvalue of the matrix whose positivity proves the bound; rounding can have changed it by "
                f"at most {bound.certificate.roundoff:.1e}.",
            )
        )
    return measurements


def _radii(subject: Subject, constant: float) -> tuple[np.ndarray, np.ndarray]:
    """For each sample and each output but the largest, the distance at which it may become so; and which are right."""
    x, y = subject.sample(IMAGES)
    with torch.no_grad():
        outputs = call(subject.module, x).flatten(1).double()
    ordered = outputs.sort(dim=1, descending=True).values
    right = outputs.argmax(1) == y if y is not None else torch.ones(len(x), dtype=torch.bool)
    return ((ordered[:, :1] - ordered[:, 1:]) / (math.sqrt(2) * constant)).numpy(), right.numpy()


def _of_radii(radii: np.ndarray, subject: Subject) -> Measurement:
    data = subject.data
    assert data is not None  # the task is a classification
    return Measurement(
        "median certified radius",
        float(np.median(radii[:, 0])),
        "Half of the samples keep their answer under every change of the input of at most this length.",
        coverage=Coverage(len(radii), len((data.test or data.train).x), "samples"),
    )


def _figure(radii: np.ndarray, right: np.ndarray, bound: LipschitzBound) -> Figure:
    return Figure(
        "margin-radii",
        "Certified margin radii",
        "How far each sample is, at least, from where another output becomes the largest: the nearest such output, for "
        "samples that the network gets right and wrong, and all other outputs. From the bound "
        f"{bound.value:.3g} ({bound.method}).",
        {"nearest": radii[:, 0], "right": right, "others": radii[:, 1:].ravel()},
        _draw,
    )


def _draw(axes: Any, data: Mapping[str, Any]) -> None:
    nearest, right, others = (np.asarray(data[name]) for name in ("nearest", "right", "others"))
    top = max(float(nearest.max()), float(others.max()) if others.size else 0.0, 1e-12)
    bins = np.linspace(0, top, 41)
    if others.size:
        share = np.full(len(others), len(nearest) / len(others))
        axes.hist(others, bins, weights=share, color=PALETTE[6], alpha=0.35, label="all further outputs (scaled)")
    axes.hist(
        [nearest[right], nearest[~right]], bins, stacked=True, color=PALETTE[:2],
        label=["nearest output, sample right", "nearest output, sample wrong"],
    )  # fmt: skip
    axes.set(xlabel="certified radius (Euclidean)", ylabel="samples")
    axes.legend(loc="upper right")
