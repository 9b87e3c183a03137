"""The probe "utility": does a classifier order the classes well, and are its probabilities worth deciding by?"""

import math
import time
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corollary.base.errors import NothingMeasured
from corollary.base.network import call
from corollary.dynamics.decisions import ProbabilityScores, probability_scores, reliability
from corollary.dynamics.utility import HUANG_2023, UtilityModel
from corollary.dynamics.utility_probability import (
    GUO_2017,
    ZADROZNY_2002,
    UtilityProbability,
    fit_utility_probability,
    place_among,
)
from corollary.evidence import PALETTE, Coverage, Figure, Finding, Measurement, Need, Range, Subject, probe

SAMPLES = 10_000
TRIED = 64
"""Samples on which the time of a pass is measured."""
PASSES = 10
"""Passes over the samples, at most, that the fits and scores below make."""
FEWEST = 20
TRANSFORMS = ("softmax", "temperature", "isotonic")


@probe(
    "utility",
    room="dynamics",
    title="Order and probability",
    question="Does the network rank the classes well, and can its probabilities be used for decisions?",
    needs=Need.FORWARD,
    data="targets",
    sources=(HUANG_2023, GUO_2017, ZADROZNY_2002),
)
def utility(subject: Subject) -> Finding:
    """Order accuracy, and the quality of three probabilities made of the same utilities, fitted on other samples."""
    if subject.task != "classification" or subject.data is None:
        raise NothingMeasured("utilities are of classifiers on labelled data: give inspect such a data set (--data)")
    x, y, coverage = _samples(subject)
    model = UtilityModel(subject.module)
    with warnings.catch_warnings(record=True) as caught:  # outputs that are probabilities are noted, not printed
        warnings.simplefilter("always")
        order = model.candidates(x, 3)
        rows = torch.randperm(len(x), generator=subject.seeds("utility halves"))
        fitting, judging = rows[: len(x) // 2], rows[len(x) // 2 :]
        classes = torch.iinfo(torch.int32).max  # all of them
        fitted = {
            name: fit_utility_probability(model, (x[fitting], y[fitting]), name, k=classes) for name in TRANSFORMS
        }
        weighed = {name: _weighed(probability, x[judging], y[judging]) for name, probability in fitted.items()}
    scores = {name: probability_scores(p, chosen) for name, (p, chosen) in weighed.items()}
    places = place_among(model, order, y)
    measurements = (
        *_of_order(places, coverage),
        *_of_probabilities(scores, fitted, len(judging)),
        *_of_sampling(weighed),
    )
    notes = [
        f"Temperature and isotonic map were fitted on {len(fitting)} samples and judged, with the softmax, on "
        f"{len(judging)} others, all from the {'test' if subject.data.test is not None else 'training'} data.",
        *dict.fromkeys(str(warning.message) for warning in caught),
    ]
    return Finding(measurements, (_figure(weighed),), tuple(notes))


def _samples(subject: Subject) -> tuple[Tensor, Tensor, Coverage]:
    """Samples, as many as can be run through the network in half of the budget."""
    x, y = subject.sample(SAMPLES)
    assert subject.data is not None
    assert y is not None  # classification has labels
    device = next(subject.module.parameters(), x).device
    with torch.no_grad():
        call(subject.module, x[:TRIED].to(device))  # the first pass sets things up
        start = time.perf_counter()
        call(subject.module, x[:TRIED].to(device))
    each = (time.perf_counter() - start) / min(TRIED, len(x))
    count = min(len(x), max(2 * TRIED, int(subject.budget.remaining() / 2 / PASSES / each)))
    if count < FEWEST:
        raise NothingMeasured(f"{count} samples are too few to fit a probability on one half and judge it on the other")
    part = subject.data.train if subject.data.test is None else subject.data.test
    return x[:count].to(device), y[:count].to(device), Coverage(count, len(part.x), "samples")


def _weighed(probability: UtilityProbability, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of the classes, the best first, and the place of the right one."""
    candidates, p = probability.prob(x)
    return p, place_among(probability.utility, candidates, y)


def _of_order(places: Tensor, coverage: Coverage) -> list[Measurement]:
    first, third = (float(((places >= 0) & (places < best)).double().mean()) for best in (1, 3))
    return [
        Measurement(
            f"order accuracy, {name}",
            share,
            f"Share of samples whose right class is {where} by logit. Needs only the order of the logits, which any "
            "increasing map of them leaves as it is.",
            error=_standard_error(share, len(places)),
            error_kind=f"standard error over {len(places)} samples",
            coverage=coverage,
        )
        for name, share, where in (("top-1", first, "first"), ("top-3", third, "among the first three"))
    ]


def _of_probabilities(
    scores: Mapping[str, ProbabilityScores], fitted: Mapping[str, UtilityProbability], count: int
) -> list[Measurement]:
    coverage = Coverage(count, count, "samples the fits have not seen")
    measured = []
    for name, score in scores.items():
        measured.append(
            Measurement(
                f"calibration error, {name}",
                score.ece,
                f"Mean distance between confidence and accuracy ({name} probabilities, 15 bins of confidence): at 0 "
                "the confidence of an answer is its chance to be right.",
                reference=Range(text="well trained small networks: 0.01 to 0.05 by chance of the sample alone"),
                coverage=coverage,
                headline=name == "softmax",
            )
        )
        measured.append(
            Measurement(
                f"negative log-likelihood, {name}",
                score.nll,
                f"Mean of minus the logarithm of the {name} probability given to the right class: what a wrong "
                "probability costs on average.",
                coverage=coverage,
            )
        )
    beta = fitted["temperature"].parameters["beta"]
    measured.append(
        Measurement(
            "fitted factor on the logits",
            beta,
            "One over the temperature of the best fit: below 1 the softmax is too sure of itself, above 1 it is not "
            "sure enough.",
            coverage=Coverage(fitted["temperature"].observed, fitted["temperature"].observed, "fitting samples"),
        )
    )
    return measured


def _of_sampling(weighed: Mapping[str, tuple[Tensor, Tensor]]) -> list[Measurement]:
    p, chosen = weighed["softmax"]
    best = float((chosen == 0).double().mean())
    measured = [
        Measurement(
            "accuracy of the best class",
            best,
            "On the samples that the fits have not seen; the same under every one of the probabilities.",
            error=_standard_error(best, len(chosen)),
            error_kind=f"standard error over {len(chosen)} samples",
        )
    ]
    for name, (p, chosen) in weighed.items():
        right = p.gather(1, chosen[:, None]).double()
        measured.append(
            Measurement(
                f"accuracy of a draw, {name}",
                float(right.mean()),
                f"Chance that a class drawn from the {name} probabilities is the right one, exactly. Where they are "
                "calibrated it is also their mean confidence in a draw; it cannot pass the best class by much.",
                error=float(right.std() / math.sqrt(len(right))),
                error_kind=f"standard error over {len(right)} samples",
            )
        )
    return measured


def _standard_error(share: float, count: int) -> float:
    return math.sqrt(share * (1 - share) / count)


def _figure(weighed: Mapping[str, tuple[Tensor, Tensor]]) -> Figure:
    rows = []
    for name, (p, chosen) in weighed.items():
        curve = reliability(p[:, 0].clamp(max=1), chosen == 0)
        rows += [(name, *values) for values in zip(*curve, strict=True)]
    names = ("transform", "confidence", "accuracy", "count")
    return Figure(
        "reliability",
        "Reliability before and after",
        "Accuracy against confidence on samples that the fits have not seen, in bins of confidence; the area of a mark "
        "grows with its samples. On the line, confidence is the chance to be right; below it, the network is too sure.",
        dict(zip(names, map(np.asarray, zip(*rows, strict=True)), strict=True)),
        _draw,
        size=(5.4, 4.2),
    )


def _draw(axes: Any, data: Mapping[str, Any]) -> None:
    columns = {name: np.asarray(column) for name, column in data.items()}
    axes.plot([0, 1], [0, 1], color=PALETTE[6], lw=1, ls="--", label="calibrated")
    for i, name in enumerate(dict.fromkeys(columns["transform"].tolist())):
        own = columns["transform"] == name
        share = columns["count"][own] / columns["count"][own].sum()
        x, y = columns["confidence"][own], columns["accuracy"][own]
        axes.plot(x, y, color=PALETTE[i], lw=1, label=name)
        axes.scatter(x, y, s=8 + 160 * share, color=PALETTE[i], alpha=0.7, lw=0)
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.03), ylim=(-0.02, 1.05))
    axes.legend(loc="upper left")
