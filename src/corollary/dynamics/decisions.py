"""What decisions are worth under one probability or another, and how good the probabilities and the order are."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from scipy.stats import kendalltau
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.base.network import Batch
from corollary.dynamics.utility import Candidates
from corollary.dynamics.utility_probability import Quality, UtilityProbability, least_risk, picked, place_among
from corollary.evidence.study import Table

RULES = ("argmax", "sample", "mbr")
BINS = 15


class Reliability(NamedTuple):
    """Samples in bins of confidence.

    Fields:
        confidence, accuracy: means in each bin that holds samples.
        count: samples in it.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error: the mean distance of confidence and accuracy, over samples."""
        return float((self.count * np.abs(self.confidence - self.accuracy)).sum() / self.count.sum())


def reliability(confidence: Float[Tensor, "n"], correct: Bool[Tensor, "n"], bins: int = BINS) -> Reliability:
    """Confidence against accuracy in `bins` bins of equal width.

    Raises: BadInput, without samples, or for confidences outside [0, 1].
    Source: Guo et al. 2017, eqs. 2 and 3.
    """
    if len(confidence) == 0 or not bool(((confidence >= 0) & (confidence <= 1 + 1e-6)).all()):
        raise BadInput(f"confidences are probabilities of at least one sample, got {len(confidence)} of them")
    places = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1  # a bin holds its upper end
    columns = torch.stack([torch.ones_like(confidence).double(), confidence.double(), correct.double()])
    sums = torch.zeros(3, bins, dtype=torch.float64, device=confidence.device).index_add(1, places, columns)
    count, conf, hit = sums[:, sums[0] > 0].cpu().numpy()
    return Reliability(conf / count, hit / count, count)


class ProbabilityScores(NamedTuple):
    """How good probabilities are.

    Fields:
        nll: mean negative log-likelihood of the references that have a probability.
        ece: expected calibration error of the most probable candidate, 15 bins.
        covered: share of the references that have a probability.
    """

    nll: float
    ece: float
    covered: float


def probability_scores(p: Float[Tensor, "n k"], chosen: Int[Tensor, "n"]) -> ProbabilityScores:
    """Scores of the probabilities of candidates.

    Args:
        p: of each candidate.
        chosen: which candidate is the reference, -1 where it is none of them.
    """
    inside = chosen >= 0
    nll = -p[inside].gather(1, chosen[inside, None]).double().log().mean()
    confidence, best = p.max(1)
    error = reliability(confidence.clamp(max=1), best == chosen).error
    return ProbabilityScores(float(nll), error, float(inside.double().mean()))


def decision_report(
    transforms: Mapping[str, UtilityProbability],
    data: Batch,
    rules: Sequence[str] = RULES,
    quality: Mapping[str, Quality] | None = None,
    *,
    draws: int = 20,
    seed: int = 0,
) -> Table:
    """What each decision rule earns under each probability, with the scores of the probability itself.

    Args:
        transforms: fitted probabilities by the name to report them under.
        data: (inputs, reference outputs), neither trained nor fitted on.
        rules: of "argmax", "sample" (the expected quality of one draw) and "mbr" (for the similarity of its default).
        quality: by name; by default equality, and for sequences token agreement.
        draws: draws of each input where the expectation cannot be summed over candidates.
        seed: of those draws.
    Returns: a table with columns transform, rule, nll, ece, covered and one for each quality.
    Raises: BadInput, for an unknown rule.
    """
    if unknown := [rule for rule in rules if rule not in RULES]:
        raise BadInput(f"no decision rule is called {unknown[0]!r}; there are {', '.join(RULES)}")
    rows = []
    for name, probability in transforms.items():
        utility = probability.utility
        reference = utility.complete(data[1]) if utility.kind == "sequence" else data[1]
        candidates, p = probability.prob(data[0])
        scores = probability_scores(p, place_among(utility, candidates, reference))._asdict()
        qualities = quality or default_qualities(probability)
        for rule in rules:
            values = _earned(probability, rule, data, reference, (candidates, p), qualities, draws, seed)
            rows.append({"transform": name, "rule": rule, **scores, **values})
    return {column: [row[column] for row in rows] for column in (rows[0] if rows else ())}


def default_qualities(probability: UtilityProbability) -> dict[str, Quality]:
    """Equality, and for sequences token agreement."""
    utility = probability.utility
    tokens = {"token accuracy": utility.token_agreement} if utility.kind == "sequence" else {}
    return {"exact match": utility.same, **tokens}


def _earned(
    probability: UtilityProbability,
    rule: str,
    data: Batch,
    reference: Tensor,
    weighed: tuple[Candidates, Tensor],
    qualities: Mapping[str, Quality],
    draws: int,
    seed: int,
) -> dict[str, float]:
    candidates, p = weighed
    if rule == "sample" and not probability.closed:
        outputs = probability.sample(data[0], draws, torch.Generator(p.device).manual_seed(seed))
        return {name: float(of(outputs, reference[:, None]).mean()) for name, of in qualities.items()}
    if rule == "sample":
        each = {name: of(candidates.outputs, reference[:, None]) for name, of in qualities.items()}
        return {name: float((p * values).sum(1).mean()) for name, values in each.items()}
    place = p.argmax(1) if rule == "argmax" else least_risk(candidates.outputs, p, probability.default_quality)
    chosen = picked(candidates.outputs, place)
    return {name: float(of(chosen, reference).mean()) for name, of in qualities.items()}


def ordinal_agreement(utility: ArrayLike, reference: ArrayLike) -> float:
    """Kendall's tau-b between the order of utilities and that of a reference, the mean over rows.

    Args: `utility`, `reference`: `[outputs]` or `[rows, outputs]`, of equal shape.
    Raises: BadInput, for unequal shapes, fewer than two outputs, NaN, or a row in which all values are equal.
    """
    ours, theirs = np.atleast_2d(np.asarray(utility, float)), np.atleast_2d(np.asarray(reference, float))
    if ours.shape != theirs.shape or ours.ndim != 2 or ours.shape[1] < 2:
        given = f"{ours.shape} and {theirs.shape}"
        raise BadInput(f"an order is compared over two or more outputs of equal shape, got {given}")
    found: list[Any] = [kendalltau(a, b) for a, b in zip(ours, theirs, strict=True)]
    taus = [float(each.statistic) for each in found]
    if not np.isfinite(taus).all():
        raise BadInput("the order is not defined: a row holds NaN, or all of its values are equal")
    return float(np.mean(taus))
