r"""Adversarial error against the size of the perturbation, and the power law it follows: $A\,\epsilon^a$, a near 1."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, final, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.base.progress import track
from corollary.verify.attacks import ascent_direction, least_likely, pgd
from corollary.verify.classifier import Classifier, attackable, logits_of, predictions
from corollary.verify.reach import Clip, Norm, order_of, refuse_out_of_range, within

CurveAttack: TypeAlias = Literal["fgsm", "step_ll", "pgd", "margin_pgd"]
SMALLEST, LARGEST, POINTS = 1e-4, 0.3, 25
ENTRIES_AT_ONCE = 2**24
"""Numbers in the perturbed inputs held at once: 64 MiB in float32."""
FEWEST_POINTS = 5


class PowerLaw(NamedTuple):
    r"""$\mathrm{error}(\epsilon) = A\,\epsilon^a$, fitted on log-log axes.

    Fields:
        exponent: a; amplitude: A.
        r2: share of the variance of log error that the line explains.
        ci: 95 % interval of the exponent, by bootstrap over the inputs.
        points: points of the curve in the window of the fit.
    """

    exponent: float
    amplitude: float
    r2: float
    ci: tuple[float, float]
    points: int

    def error_at(self, eps: float) -> float:
        """The adversarial error that the law gives at `eps`."""
        return self.amplitude * eps**self.exponent

    def eps_at(self, error: float) -> float:
        """The perturbation at which the law gives `error`."""
        return (error / self.amplitude) ** (1 / self.exponent)


@final
@dataclass(frozen=True, eq=False)
class Curve:
    """Which inputs change their class at which perturbation.

    Attributes:
        eps: sizes of the perturbation, ascending.
        flipped: (eps, input), for the inputs that were classified as wanted before the attack.
        attack: what perturbed them.
        given: inputs given, those misclassified from the start included.
    """

    eps: Float[Tensor, "eps"]
    flipped: Bool[Tensor, "eps sample"]
    attack: str
    given: int

    @property
    def error(self) -> Float[Tensor, "eps"]:
        """Share of the inputs that were right and are so no longer; the clean error is no part of it."""
        return self.flipped.double().mean(1)

    def fit(self, lo: float = 0.005, hi: float = 0.15, *, draws: int = 400, seed: int = 0) -> PowerLaw:
        r"""Fit $A\,\epsilon^a$ by least squares of log error on log eps, where lo < error < hi.

        Args:
            draws: bootstrap samples of the inputs behind the interval; `seed`: of those draws.
        Raises: BadInput, if fewer than 5 points of the curve lie in the window, saying where they lie.
        Source: Cubuk et al. 2017, arXiv 1711.02846, figures 1 to 3.
        """
        error = self.error.cpu().numpy()
        eps = self.eps.double().cpu().numpy()
        window = (error > lo) & (error < hi) & (eps > 0)
        if window.sum() < FEWEST_POINTS:
            raise BadInput(
                f"{int(window.sum())} of {len(eps)} points have an adversarial error between {lo:g} and {hi:g}; a fit "
                f"needs {FEWEST_POINTS}. The error runs from {error.min():.3g} to {error.max():.3g} for eps from "
                f"{eps.min():.3g} to {eps.max():.3g}: choose eps in between, or more of them"
                + (
                    ". It is zero everywhere: the gradient vanishes or the attack is too weak"
                    if not error.any()
                    else ""
                )
            )
        across, up = np.log(eps[window]), np.log(error[window])
        slope, offset = _line(across, up[None])
        explained = 1 - np.square(up - offset[0] - slope[0] * across).sum() / np.square(up - up.mean()).sum()
        low, high = self._interval(window, draws, seed)
        return PowerLaw(
            float(slope[0]), float(np.exp(offset[0])), float(explained), (float(low), float(high)), int(window.sum())
        )

    def _interval(self, window: np.ndarray, draws: int, seed: int) -> tuple[float, float]:
        """2.5 and 97.5 percent quantiles of the exponent over resampled inputs."""
        rows = self.flipped[torch.from_numpy(window).to(self.flipped.device)]
        # Inputs that flip at the same points are exchangeable: a resample is a multinomial count of those kinds.
        kinds, counts = torch.unique(rows, dim=1, return_counts=True)
        n = int(counts.sum())
        chosen = np.random.default_rng(seed).multinomial(n, (counts.double() / n).cpu().numpy(), size=draws)
        errors = chosen @ kinds.double().cpu().numpy().T / n
        across = np.log(self.eps.double().cpu().numpy()[window])
        slopes, _ = _line(across, np.log(np.maximum(errors, 0.5 / n)))
        low, high = np.quantile(slopes, (0.025, 0.975))
        return low, high


def adversarial_error_curve(
    model: Classifier,
    x: Float[Tensor, "sample *input"],
    y: Int[Tensor, "sample"] | None = None,
    eps: Float[Tensor, "eps"] | None = None,
    attack: CurveAttack = "fgsm",
    clip: Clip | None = (0, 1),
    *,
    norm: Norm = "linf",
    batch: int = 512,
) -> Curve:
    """The share of right answers that an attack changes, for a grid of perturbation sizes.

    Args:
        y: labels. Only inputs classified as `y` before the attack count; without labels all do, with y the prediction.
        eps: sizes of the perturbation; by default 25 from 1e-4 to 0.3, evenly spaced in the logarithm.
        attack: "fgsm", "step_ll" (one step towards the least likely class), "pgd" (20 steps of eps / 5 up the
            cross-entropy) or "margin_pgd" (the same up the margin).
        clip: range of the inputs; None to leave perturbed inputs as they are.
        batch: inputs at a time; of each batch as many sizes at once as fit into memory.
    Raises: BadInput, for fewer than two classes, logits that are not finite, inputs outside of `clip`, or if no input
        is classified as labelled.
    Source: Cubuk et al. 2017, arXiv 1711.02846, figures 1 to 3.
    """
    if attack not in get_args(CurveAttack):
        raise BadInput(f"an attack is one of {', '.join(get_args(CurveAttack))}, got {attack!r}")
    sizes = torch.logspace(np.log10(SMALLEST), np.log10(LARGEST), POINTS, dtype=torch.float64) if eps is None else eps
    sizes = sizes.to(x.device).sort().values
    refuse_out_of_range(x, clip)
    predicted = predictions(model, x, batch=batch)
    if y is not None and len(y) != len(x):
        raise BadInput(f"{len(x)} inputs but {len(y)} labels were given: one label an input")
    right = torch.ones_like(predicted, dtype=torch.bool) if y is None else predicted == y
    if not right.any():
        raise BadInput(f"none of {len(x)} inputs is classified as labelled: there is no right answer to attack")
    eligible, wanted = x[right], predicted[right]
    flips = [
        _flips(model, eligible[i : i + batch], wanted[i : i + batch], sizes, attack, clip, norm)
        for i in track(range(0, len(eligible), batch), f"adversarial error by {attack}")
    ]
    return Curve(sizes, torch.cat(flips, dim=1), attack, len(x))


def curve_from_critical(critical: Float[Tensor, "sample"], eps: Float[Tensor, "eps"]) -> Curve:
    """The curve that linear response predicts: the cumulative distribution of the critical perturbations."""
    sizes = eps.to(critical.device).sort().values
    return Curve(sizes, critical[None] <= sizes[:, None].to(critical.dtype), "linear response", len(critical))


def _flips(
    model: Classifier, x: Tensor, y: Tensor, eps: Tensor, attack: CurveAttack, clip: Clip | None, norm: Norm
) -> Tensor:
    """(eps, input): whether the attack changes the class."""
    together = max(1, ENTRIES_AT_ONCE // max(1, x.numel()))
    direction = _direction(model, x, y, attack, norm) if attack in ("fgsm", "step_ll") else None
    found = []
    for some in eps.to(x.dtype).split(together):
        if direction is not None:
            reached = within((x + some.reshape(-1, *(1,) * x.ndim) * direction).flatten(0, 1), clip)
        else:
            many, radii = x.repeat(len(some), *(1,) * (x.ndim - 1)), some.repeat_interleave(len(x))
            loss = "margin" if attack == "margin_pgd" else "cross-entropy"
            reached = pgd(model, many, y.repeat(len(some)), radii, loss=loss, norm=norm, clip=clip, stop_early=True)
        with attackable(model), torch.no_grad():
            answers = logits_of(model, reached).argmax(1)
        found.append(answers.reshape(len(some), -1) != y)
    return torch.cat(found)


def _direction(model: Classifier, x: Tensor, y: Tensor, attack: CurveAttack, norm: Norm) -> Tensor:
    """The step of a single-step attack, which is the same for all sizes of the perturbation."""
    order = order_of(norm)
    if attack == "step_ll":
        return ascent_direction(model, x, least_likely(model, x), norm=order, targeted=True)
    return ascent_direction(model, x, y, norm=order)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and offsets of the least-squares lines of each row of `y` (rows, points) on `x` (points,)."""
    centred = x - x.mean()
    slopes = y @ centred / np.square(centred).sum()
    return slopes, y.mean(1) - slopes * x.mean()
