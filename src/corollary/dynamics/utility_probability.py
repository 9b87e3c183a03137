"""From utilities back to probabilities: transforms fitted on held-out outputs, and the decisions made with them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias, final

import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.base.network import Batch, Inputs
from corollary.dynamics.utility import Candidates, UtilityModel
from corollary.evidence import Source

MCFADDEN_1974 = Source(
    "mcfadden1974conditional",
    ("Daniel McFadden",),
    "Conditional logit analysis of qualitative choice behavior",
    1974,
    venue="Frontiers in Econometrics, 105-142",
)
GUO_2017 = Source(
    "guo2017calibration",
    ("Chuan Guo", "Geoff Pleiss", "Yu Sun", "Kilian Q. Weinberger"),
    "On calibration of modern neural networks",
    2017,
    arxiv="1706.04599",
)
ZADROZNY_2002 = Source(
    "zadrozny2002transforming",
    ("Bianca Zadrozny", "Charles Elkan"),
    "Transforming classifier scores into accurate multiclass probability estimates",
    2002,
    doi="10.1145/775047.775151",
)

LOG_BETA = (-8.0, 8.0)
"""Bounds of the logarithm of beta times the spread of the utilities."""
LOG_TEMPERATURE = (-3.0, 3.0)
"""Bounds of the logarithm of the factor on the logits of tokens."""
GAMMA = (0.0, 3.0)
"""Bounds of the power of the length; at 1 the utility is a mean over tokens."""
PRECISION = 1e-8

Quality: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(outputs, reference) -> quality of each, leading axes broadcast, such as `UtilityModel.same`."""


class Heldout(NamedTuple):
    """What a transform is fitted on.

    Fields:
        utility: the network.
        x, y: inputs and observed outputs, complete.
        candidates: of each input.
        chosen: `[n]`: which candidate was observed, -1 where none was.
    """

    utility: UtilityModel
    x: Inputs
    y: Tensor
    candidates: Candidates
    chosen: Tensor


class Fitted(NamedTuple):
    """A fitted transform.

    Fields:
        parameters: by name.
        share: candidates to probabilities `[n, k]`.
        model: the network that the transform is the softmax of; None where the transform knows candidates only.
    """

    parameters: Mapping[str, float]
    share: Callable[[Candidates], Tensor] | None = None
    model: UtilityModel | None = None


Transform: TypeAlias = Callable[[Heldout, bool], Fitted]
"""(held-out data, whether to fit the power of the length) -> the fitted transform; exactly one of `share`, `model`."""


@final
@dataclass(frozen=True)
class UtilityProbability:
    """Probabilities made of utilities, and the decision rules that need them.

    Attributes:
        utility: the network whose candidates are weighed.
        transform: its name.
        parameters: what was fitted.
        k: candidates of each input.
        observed, dropped: held-out outputs inside and outside of the candidates. Where the transform weighs only
            candidates, its probabilities are conditional on the output being one of them.
    """

    utility: UtilityModel
    transform: str
    fitted: Fitted
    k: int
    observed: int
    dropped: int

    @property
    def parameters(self) -> Mapping[str, float]:
        """Fitted parameters by name."""
        return self.fitted.parameters

    @property
    def closed(self) -> bool:
        """Whether all probability lies on the candidates."""
        return self.fitted.model is None

    def prob(self, x: Inputs) -> tuple[Candidates, Float[Tensor, "n k"]]:
        """The candidates, in the order of the network's own utility, and the probability of each.

        A row sums to one for a transform of candidates, and to their share of all outputs for a softmax over all.
        """
        candidates = self.utility.candidates(x, self.k)
        if self.fitted.model is not None:
            return candidates, self.fitted.model.log_probability(x, candidates.outputs).exp()
        assert self.fitted.share is not None  # a transform has one of the two
        return candidates, self.fitted.share(candidates)

    def argmax(self, x: Inputs) -> Int[Tensor, "n *tokens"]:
        """The most probable candidate; of equal ones that of larger utility."""
        candidates, p = self.prob(x)
        return picked(candidates.outputs, p.argmax(1))

    def sample(self, x: Inputs, draws: int = 1, generator: torch.Generator | None = None) -> Int[Tensor, "n draws *t"]:
        """Independent draws; from all outputs where the transform is a softmax over them all, else from candidates."""
        if self.fitted.model is not None:
            return self.fitted.model.sample(x, draws, generator)
        candidates, p = self.prob(x)
        places = torch.multinomial(p, draws, replacement=True, generator=generator)
        return candidates.outputs[torch.arange(len(p), device=p.device)[:, None], places]

    def mbr(self, x: Inputs, similarity: Quality | None = None) -> Int[Tensor, "n *tokens"]:
        r"""The candidate of least Bayes risk, $\arg\max_y \sum_{y'} P(y') \mathrm{sim}(y, y')$.

        Args: `similarity`: by default token agreement for sequences, equality for classes.
        """
        candidates, p = self.prob(x)
        return picked(candidates.outputs, least_risk(candidates.outputs, p, similarity or self.default_quality))

    @property
    def default_quality(self) -> Quality:
        """Token agreement for sequences, equality for classes."""
        return self.utility.token_agreement if self.utility.kind == "sequence" else self.utility.same


def picked(outputs: Int[Tensor, "n k *tokens"], place: Int[Tensor, "n"]) -> Int[Tensor, "n *tokens"]:
    """One candidate of each input."""
    return outputs[torch.arange(len(place), device=place.device), place]


def least_risk(outputs: Int[Tensor, "n k *tokens"], p: Float[Tensor, "n k"], similarity: Quality) -> Int[Tensor, "n"]:
    """Place of the candidate with the largest expected similarity to a draw from `p`."""
    pairs = similarity(outputs[:, :, None], outputs[:, None]).to(p)
    return torch.einsum("nij,nj->ni", pairs, p).argmax(1)


def fit_utility_probability(
    utility: UtilityModel,
    heldout: Batch,
    transform: str | Transform = "choice",
    k: int = 10,
    fit_length: bool = False,
) -> UtilityProbability:
    r"""Fit a transform of utilities to probabilities by the likelihood of held-out outputs.

    * "softmax": $\sigma(y|x) \propto e^{u}$ over all outputs, nothing fitted.
    * "temperature": $\sigma_\beta$: logits times $\beta$, of the class or (for sequences, where a sum over all outputs
      cannot be had) of each next token. The order of sequences may then change; under the others it does not.
    * "choice": the conditional logit $P(y|x) \propto \exp(\beta\, u(y)/|y|^\gamma)$ over the k candidates; $\gamma = 0$
      unless `fit_length`.
    * "length": the same with $\beta = 1$ and $\gamma$ fitted.
    * "isotonic": a monotone map from the margin $u(y) - \max_{y' \ne y} u(y')$ to the chance that y is the one
      observed (pool adjacent violators), brought to sum one over the candidates.

    Held-out outputs should be as noisy as those the network was trained on: on clean ones $\beta$ comes out too large.
    It ends at its upper bound where the observed output always comes first.

    Args:
        heldout: (inputs, observed outputs), none of them trained on.
        transform: a name, or a function of your own.
        k: candidates of each input, at least 2; as many as there are outputs where these are fewer.
        fit_length: also fit the power $\gamma$ of the length, which may change the order.
    Returns: the probabilities, with how many held-out outputs were among the candidates and how many were dropped.
    Raises: BadInput, for k < 2, an unknown transform, utilities that are not finite, a warped network, or if no
        held-out output is among its candidates.
    Source: McFadden 1974 (conditional logit); Guo et al. 2017 (temperature); Zadrozny and Elkan 2002 (isotonic).
        Huang and Yuan 2023 call for such a transform; none of these is theirs.
    """
    if k < 2:
        raise BadInput(f"a choice is between at least two candidates, got k={k}")
    if utility.warp is not None:
        raise BadInput("a transform is fitted to the utilities as they are; give the network without a warp")
    if isinstance(transform, str) and transform not in TRANSFORMS:
        raise BadInput(f"no transform is called {transform!r}; there are {', '.join(TRANSFORMS)}, or a function")
    x, y = heldout
    y = utility.complete(y) if utility.kind == "sequence" else y
    candidates = utility.candidates(x, k)
    chosen = place_among(utility, candidates, y)
    observed = int((chosen >= 0).sum())
    if observed == 0:
        raise BadInput(
            f"none of {len(y)} held-out outputs is among the {k} best of its input: raise k, or check that the outputs "
            "belong to these inputs and this network"
        )
    name, function = (transform, TRANSFORMS[transform]) if isinstance(transform, str) else ("own", transform)
    fitted = function(Heldout(utility, x, y, candidates, chosen), fit_length)
    return UtilityProbability(utility, name, fitted, k, observed, len(y) - observed)


def place_among(utility: UtilityModel, candidates: Candidates, y: Tensor) -> Int[Tensor, "n"]:
    """Which candidate each output is, -1 where it is none of them."""
    equal = utility.same(candidates.outputs, y[:, None]) > 0
    return torch.where(equal.any(1), equal.int().argmax(1), -1)


# --------------------------------------------------------------------------------------------------------- transforms


def _softmax(heldout: Heldout, fit_length: bool) -> Fitted:
    return Fitted({}, model=heldout.utility)


def _temperature(heldout: Heldout, fit_length: bool) -> Fitted:
    """One factor on all logits, fitted to every held-out output: none is dropped."""
    utility, x, y = heldout.utility, heldout.x, heldout.y

    def loss(log_beta: float) -> float:
        return -float(_scaled(utility, math.exp(log_beta)).log_probability(x, y).double().mean())

    if utility.kind == "classifier":  # the logits are all there is, so they are computed once
        every = utility.candidates(x, torch.iinfo(torch.int32).max)
        place = place_among(utility, every, y)
        if bool((place < 0).any()):
            raise BadInput(
                f"held-out classes are 0 to {every.utility.shape[1] - 1}, got {int(y.min())} to {int(y.max())}"
            )
        beta = _best_beta(every.utility, place)[0]
    else:
        beta = math.exp(_minimum(loss, LOG_TEMPERATURE, 1e-3))  # each trial runs the decoder over all sequences
    return Fitted({"beta": beta}, model=_scaled(utility, beta))


def _scaled(utility: UtilityModel, beta: float) -> UtilityModel:
    return utility.warped(lambda logits: beta * logits)


def _choice(heldout: Heldout, fit_length: bool) -> Fitted:
    inside, chosen = _covered(heldout)
    gamma = 0.0
    if fit_length:
        gamma = _minimum(lambda g: _best_beta(inside.utility / inside.lengths**g, chosen)[1], GAMMA)
    beta = _best_beta(inside.utility / inside.lengths**gamma, chosen)[0]
    return Fitted({"beta": beta, "gamma": gamma}, share=lambda c: _conditional_logit(c, beta, gamma))


def _length(heldout: Heldout, fit_length: bool) -> Fitted:
    inside, chosen = _covered(heldout)
    gamma = _minimum(lambda g: _choice_loss(inside.utility / inside.lengths**g, chosen, 1.0), GAMMA)
    return Fitted({"beta": 1.0, "gamma": gamma}, share=lambda c: _conditional_logit(c, 1.0, gamma))


def _isotonic(heldout: Heldout, fit_length: bool) -> Fitted:
    inside, chosen = _covered(heldout)
    hit = torch.zeros_like(inside.utility).scatter(1, chosen[:, None], 1)
    # Half an observation is the least that n of them can tell from none, and keeps every likelihood finite.
    least = 0.5 / len(chosen)
    curve = IsotonicRegression(y_min=least, y_max=1.0, out_of_bounds="clip")
    curve.fit(_margins(inside.utility).flatten().cpu().numpy(), hit.flatten().cpu().numpy())

    def share(candidates: Candidates) -> Tensor:
        margins = _margins(candidates.utility)
        chance = torch.from_numpy(curve.predict(margins.flatten().cpu().numpy())).reshape(margins.shape)
        return (chance / chance.sum(1, keepdim=True)).to(margins)

    return Fitted({"steps": float(len(curve.X_thresholds_))}, share=share)


TRANSFORMS: Mapping[str, Transform] = MappingProxyType(
    {
        "choice": _choice,
        "temperature": _temperature,
        "isotonic": _isotonic,
        "softmax": _softmax,
        "length": _length,
    }
)
"""Transforms by name."""


def _covered(heldout: Heldout) -> tuple[Candidates, Tensor]:
    inside = heldout.chosen >= 0
    candidates = heldout.candidates
    kept = Candidates(candidates.outputs[inside], candidates.utility[inside].double(), candidates.lengths[inside])
    return kept, heldout.chosen[inside]


def _conditional_logit(candidates: Candidates, beta: float, gamma: float) -> Tensor:
    return (beta * candidates.utility / candidates.lengths**gamma).softmax(1)


def _margins(utility: Tensor) -> Tensor:
    """Utility minus the best of the others; columns are sorted."""
    best, second = utility[:, :1], utility[:, 1:2]
    return torch.cat([best - second, utility[:, 1:] - best], 1).double()


def _choice_loss(utility: Tensor, chosen: Tensor, beta: float) -> float:
    scores = (beta * utility.double()).log_softmax(1)
    return -float(scores.gather(1, chosen[:, None]).mean())


def _best_beta(utility: Tensor, chosen: Tensor) -> tuple[float, float]:
    """The factor of largest likelihood and its mean negative log-likelihood, which is convex in it."""
    spread = float((utility.amax(1) - utility.mean(1)).mean().clamp_min(torch.finfo(torch.float32).tiny))
    # In units of the spread, so that utilities times a constant give exactly the same probabilities.
    log_beta = _minimum(lambda b: _choice_loss(utility / spread, chosen, math.exp(b)), LOG_BETA)
    return math.exp(log_beta) / spread, _choice_loss(utility / spread, chosen, math.exp(log_beta))


def _minimum(loss: Callable[[float], float], bounds: tuple[float, float], precision: float = PRECISION) -> float:
    found: Any = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": precision})
    return float(found.x)
