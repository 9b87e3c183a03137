"""The probe "adversarial": how answers change under small perturbations, and whether gradients can be believed."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corollary.base.errors import BadInput, NothingMeasured
from corollary.evidence import PALETTE, Coverage, Figure, Finding, Measurement, Need, Range, Subject, probe
from corollary.verify.adversarial_curve import Curve, PowerLaw, adversarial_error_curve, curve_from_critical
from corollary.verify.classifier import logits_of, predictions
from corollary.verify.logit_gaps import (
    CUBUK_2017,
    FEWEST_BELOW,
    GAPS,
    critical_epsilon,
    gap_exponents,
    sorted_gaps,
    tie_fraction,
)

MOST_ATTACKED = 2000
MOST_GAPS = 10_000
FEWEST = 20
SIZES = 25
STRONG_SHARES = (0.02, 0.05, 0.1)
"""Predicted errors at which the strong attack is compared with the fast one."""
PGD_PASSES = 2 * 21 * len(STRONG_SHARES)
"""Forward and backward passes that the strong attack takes for an input, at most."""
USUAL_EXPONENT = (0.8, 1.4)
FAR_BELOW = 0.5
"""The fast attack flips fewer than this share of what the strong one flips: its gradient points elsewhere."""


@dataclass(frozen=True)
class _Found:
    """What the attacks gave."""

    critical: Tensor
    fast: Curve | None
    law: PowerLaw | None
    predicted: Curve | None
    strong: Curve | None
    beside: Curve | None
    notes: tuple[str, ...]


@probe(
    "adversarial",
    room="verify",
    title="Adversarial error",
    question="How large a perturbation changes the network's answers, and does its gradient hide it?",
    needs=Need.GRADIENTS,
    data="inputs",
    sources=(CUBUK_2017,),
)
def adversarial(subject: Subject) -> Finding:
    """The law of adversarial error, the critical perturbations, the logit gaps, and signs of gradient masking."""
    x, y = subject.sample(MOST_GAPS)
    if subject.task == "regression" or not x.is_floating_point():
        raise NothingMeasured(
            "adversarial error is that of a classifier with floating inputs; "
            f"here the task is {subject.task} and the inputs are {x.dtype}"
        )
    labels = y if subject.task == "classification" else None
    logits = _logits(subject, x)
    gap_numbers = tuple(j for j in GAPS if j <= logits.shape[1])
    gaps = sorted_gaps(logits, gap_numbers)
    right = torch.ones(len(x), dtype=torch.bool) if labels is None else logits.argmax(1) == labels
    if int(right.sum()) < FEWEST:
        raise NothingMeasured(f"{int(right.sum())} of {len(x)} inputs are classified right: a curve needs {FEWEST}")
    attacked = x[right][: _affordable(subject, x[right])]
    found = _attack(subject, attacked)
    coverage = Coverage(len(attacked), int(right.sum()), "right answers" if labels is not None else "answers")
    measurements = [*_of_curve(found, coverage), *_of_masking(found, coverage), *_of_gaps(gaps, gap_numbers)]
    notes = [
        "Perturbations are measured in their largest entry (L-inf), in the units of the inputs, and may leave the "
        "range of the data.",
        *(
            []
            if labels is not None
            else ["The data has no labels: an answer counts as right if it is the network's own."]
        ),
        *found.notes,
    ]
    return Finding(tuple(measurements), _figures(found, gaps, gap_numbers), tuple(notes))


def _logits(subject: Subject, x: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            return torch.cat([logits_of(subject.module, some) for some in x.split(1024)])
    except BadInput as error:
        raise NothingMeasured(f"adversarial error needs a classifier: {error}") from error


def _affordable(subject: Subject, x: Tensor) -> int:
    """Inputs that critical perturbations and both attacks are done with in half of the time left."""
    few = x[:FEWEST]
    critical_epsilon(subject.module, few)  # the first pass pays for what is loaded and compiled
    start = time.perf_counter()
    critical_epsilon(subject.module, few)
    classes_pass = (time.perf_counter() - start) / len(few)
    start = time.perf_counter()
    predictions(subject.module, few)
    forward = (time.perf_counter() - start) / len(few)
    cost = classes_pass + (SIZES + 3 * PGD_PASSES) * forward
    return max(FEWEST, min(len(x), MOST_ATTACKED, int(0.5 * subject.budget.remaining() / cost)))


def _attack(subject: Subject, x: Tensor) -> _Found:
    critical = critical_epsilon(subject.module, x)
    finite = critical[critical.isfinite() & (critical > 0)]
    if len(finite) < FEWEST:
        return _Found(critical, None, None, None, None, None, ("The gradient vanishes at nearly every input.",))
    # From below the first flip to where nearly all have flipped, wherever this network's scale lies.
    low, high = finite.double().quantile(torch.tensor([0.5 / len(finite), 0.9], dtype=torch.float64)).log10()
    eps = torch.logspace(float(low) - 0.1, float(high), SIZES, dtype=torch.float64)
    fast = adversarial_error_curve(subject.module, x, None, eps, "fgsm", None)
    notes: tuple[str, ...] = ()
    law = None
    window = max(0.005, 2.5 / len(x))  # below this the error counts three inputs or fewer
    try:
        law = fast.fit(window, 0.15, seed=subject.seeds.integer("bootstrap") % 2**32)
    except BadInput as error:
        notes = (f"No law was fitted: {error}",)
    chosen = finite.double().quantile(torch.tensor(STRONG_SHARES, dtype=torch.float64)).unique()
    strong = adversarial_error_curve(subject.module, x, None, chosen, "margin_pgd", None)
    beside = adversarial_error_curve(subject.module, x, None, chosen, "fgsm", None)
    return _Found(critical, fast, law, curve_from_critical(critical, eps), strong, beside, notes)


def _of_curve(found: _Found, coverage: Coverage) -> list[Measurement]:
    median = float(found.critical.double().median())
    measurements = [
        Measurement(
            "median critical perturbation",
            median,
            "The perturbation at which half of the answers change, to first order: the gap to the nearest other class "
            "over the size of its gradient.",
            unit="input units",
            coverage=coverage,
        )
    ]
    if found.law is None:
        return measurements
    law = found.law
    spread = (law.ci[1] - law.ci[0]) / 2
    return [
        Measurement(
            "one percent of answers flip at",
            law.eps_at(0.01),
            "The size of an adversarial perturbation (one fast gradient step) at which, by the fitted law, one answer "
            "in a hundred changes.",
            unit="input units",
            coverage=coverage,
            headline=True,
        ),
        Measurement(
            "exponent of adversarial error",
            law.exponent,
            "The power of the perturbation with which adversarial error grows; about 1 for usual networks, whatever "
            "the data and the training.",
            error=spread,
            error_kind="half of the 95 % bootstrap interval over the inputs",
            reference=Range(*USUAL_EXPONENT, "the usual law"),
            coverage=coverage,
        ),
        Measurement(
            "amplitude of adversarial error",
            law.amplitude,
            "The factor A in error = A eps^exponent: one number by which networks on the same data can be compared.",
            coverage=coverage,
        ),
        Measurement(
            "fit of the law",
            law.r2,
            "Share of the variance of log error that the fitted line explains.",
            reference=Range(0.95, 1.0, "a power law"),
        ),
        *measurements,
    ]


def _of_masking(found: _Found, coverage: Coverage) -> list[Measurement]:
    """Signs that the gradient does not show how little it takes to change an answer."""
    vanished = float(found.critical.isinf().double().mean())
    measurements = [
        Measurement(
            "answers without a gradient",
            vanished,
            "Share of the inputs at which no other class has a gradient: an attack by gradient cannot move them.",
            reference=Range(0.0, 0.05, "attacks by gradient can be believed"),
            coverage=coverage,
        )
    ]
    signs = [f"no gradient at {vanished:.0%} of the inputs"] if vanished > 0.05 else []
    if found.strong is not None and found.beside is not None:
        fast, strong = float(found.beside.error.mean()), float(found.strong.error.mean())
        measurements.append(
            Measurement(
                "fast attack against strong attack",
                fast / strong if strong else math.nan,
                "Answers that one fast gradient step changes, as a share of those that projected gradient on the "
                "margin changes, at perturbations that should change 2, 5 and 10 percent.",
                reference=Range(FAR_BELOW, None, "the gradient points to where answers change"),
                coverage=coverage,
            )
        )
        if fast < FAR_BELOW * strong:
            signs.append("one gradient step changes less than half of what projected gradient does")
    if found.law is not None and (found.law.ci[1] < USUAL_EXPONENT[0] or found.law.ci[0] > USUAL_EXPONENT[1]):
        signs.append(f"the exponent, {found.law.exponent:.2f}, is far from 1")
    elif found.law is None:
        signs.append("the error follows no law")
    measurements.append(
        Measurement(
            "gradient masking",
            "; ".join(signs) or "no sign",
            "Whether the network looks more robust to attacks by gradient than it is: signs are a gradient that "
            "vanishes, a fast attack far behind a strong one, or an exponent far from 1.",
        )
    )
    return measurements


def _of_gaps(gaps: Tensor, numbers: tuple[int, ...]) -> list[Measurement]:
    """Exponents of the gap distributions, each with its expected value."""
    n = len(gaps)
    ties = float(tie_fraction(gaps).max())
    measurements = [
        Measurement(
            "median gap of the two largest logits",
            float(gaps[:, 0].double().median()),
            "How far the answer is ahead of the runner-up, in logits; wider gaps take larger perturbations.",
        ),
        Measurement(
            "tied logits",
            ties,
            "Share of inputs with exactly equal largest logits, as quantised and dead networks have.",
            reference=Range(0.0, 0.001, "no ties"),
        ),
    ]
    quantiles = (0.005, 0.02, 0.08) if n * 0.005 >= FEWEST_BELOW else (0.02, 0.05, 0.15)
    if n * quantiles[0] < FEWEST_BELOW:
        return measurements
    exponents = gap_exponents(gaps, quantiles)
    return measurements + [
        Measurement(
            f"exponent of gap {j}",
            float(exponent),
            f"How the share of inputs with a small gap to the logit of rank {j} grows with the gap; {j - 1} if logits "
            "behave like independent draws.",
            reference=Range(0.7 * (j - 1), 1.3 * (j - 1), "independent draws"),
        )
        for j, exponent in zip(numbers, exponents, strict=True)
    ]


def _figures(found: _Found, gaps: Tensor, numbers: tuple[int, ...]) -> tuple[Figure, ...]:
    width = float(gaps.double().quantile(0.99)) if gaps.numel() < 2**24 else float(gaps.max())
    edges = np.linspace(0, max(width, 1e-12), 41)
    histogram = {f"gap_{j}": np.histogram(gaps[:, i].double().cpu(), edges)[0] for i, j in enumerate(numbers)}
    shown = Figure(
        "logit-gaps",
        "Gaps to the largest logit",
        "How many inputs have their j-th largest logit this far below the largest. The gap to the runner-up (j = 2) is "
        "flat at zero: a fixed share of answers is always about to change.",
        {"gap": (edges[:-1] + edges[1:]) / 2, **histogram},
        _draw_gaps,
    )
    if found.fast is None or found.predicted is None:
        return (shown,)
    law = found.law
    eps = found.fast.eps.double().cpu().numpy()
    strong = found.strong
    curve = Figure(
        "adversarial-error",
        "Adversarial error",
        "Share of answers that a perturbation of this size changes. Points: one fast gradient step, and projected "
        "gradient on the margin; dashed: the prediction from gaps and gradients; line: the fitted law.",
        {
            "eps": eps,
            "fast": found.fast.error.cpu().numpy(),
            "predicted": found.predicted.error.cpu().numpy(),
            "law": np.full(len(eps), np.nan) if law is None else law.amplitude * eps**law.exponent,
            "strong_eps": np.array([]) if strong is None else strong.eps.double().cpu().numpy(),
            "strong": np.array([]) if strong is None else strong.error.cpu().numpy(),
        },
        _draw_curve,
    )
    return (curve, shown)


def _draw_curve(axes: Any, data: Mapping[str, Any]) -> None:
    eps, fast, predicted, law = (np.asarray(data[name]) for name in ("eps", "fast", "predicted", "law"))
    axes.plot(eps[predicted > 0], predicted[predicted > 0], "--", color=PALETTE[6], lw=1, label="predicted")
    axes.plot(eps[fast > 0], fast[fast > 0], "o", color=PALETTE[0], label="fast gradient step")
    drawn = law <= 0.3
    if drawn.any():
        axes.plot(eps[drawn], law[drawn], color=PALETTE[0], lw=1, label="fitted law")
    strong = np.asarray(data["strong"])
    axes.plot(np.asarray(data["strong_eps"])[strong > 0], strong[strong > 0], "^", color=PALETTE[1], ms=6,
              label="projected gradient")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="size of the perturbation (input units)", ylabel="adversarial error")
    axes.legend()


def _draw_gaps(axes: Any, data: Mapping[str, Any]) -> None:
    for place, name in enumerate(name for name in data if name.startswith("gap_")):
        axes.step(data["gap"], data[name], where="mid", color=PALETTE[place], label=f"j = {name.removeprefix('gap_')}")
    axes.set(xlabel="gap to the largest logit", ylabel="inputs", xlim=(0, None), ylim=(0, None))
    axes.legend()
