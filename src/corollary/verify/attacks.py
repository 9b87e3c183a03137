"""Adversarial examples: fast and projected gradient, the step towards the least likely class, transfer to another net.

A classifier is any function from inputs to logits (log-probabilities serve as well). A module is attacked in evaluation
mode and is left as it was: gradients are taken by the inputs alone.

Cross-entropy is climbed by its log-odds: with $u = \\log\\sum_{j \\ne y} e^{h_j} - h_y$ the cross-entropy is
$\\log(1 + e^u)$, so both have the same points of ascent, but $u$ has a gradient left where the network is so sure that
the gradient of the cross-entropy rounds to zero.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.base.network import refuse_non_finite
from corollary.evidence import Source
from corollary.verify.classifier import Classifier, attackable, log_odds_against, logits_of, margin, predictions
from corollary.verify.reach import (
    Clip,
    Norm,
    Reach,
    Rows,
    column,
    ones_of,
    order_of,
    refuse_out_of_range,
    unit_step,
    within,
)
from corollary.verify.sets import Ball

AttackLoss: TypeAlias = Literal["cross-entropy", "margin"]

GOODFELLOW_2015 = Source(
    key="goodfellow2015explaining",
    authors=("Ian J. Goodfellow", "Jonathon Shlens", "Christian Szegedy"),
    title="Explaining and harnessing adversarial examples",
    year=2015,
    arxiv="1412.6572",
)
KURAKIN_2017 = Source(
    key="kurakin2017scale",
    authors=("Alexey Kurakin", "Ian Goodfellow", "Samy Bengio"),
    title="Adversarial machine learning at scale",
    year=2017,
    arxiv="1611.01236",
)
MADRY_2018 = Source(
    key="madry2018towards",
    authors=("Aleksander Madry", "Aleksandar Makelov", "Ludwig Schmidt", "Dimitris Tsipras", "Adrian Vladu"),
    title="Towards deep learning models resistant to adversarial attacks",
    year=2018,
    arxiv="1706.06083",
)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross-entropy": log_odds_against, "margin": margin}
"""What an attack climbs, by name: (logits, classes) -> one number a sample."""


def ascent_direction(
    model: Classifier,
    x: Float[Tensor, "batch *input"],
    y: Int[Tensor, "batch"],
    *,
    loss: AttackLoss = "cross-entropy",
    norm: Norm = math.inf,
    targeted: bool = False,
) -> Float[Tensor, "batch *input"]:
    """The step of length 1 in `norm` that raises the loss fastest (lowers it, if `targeted`) to first order.

    Entries whose gradient is zero do not move; a sample whose whole gradient is zero stays.
    """
    with attackable(model):
        gradient, _ = _slope(model, x, y, loss)
    return unit_step(-gradient if targeted else gradient, order_of(norm))


def fgsm(
    model: Classifier,
    x: Float[Tensor, "batch *input"],
    y: Int[Tensor, "batch"],
    radius: float | int | Tensor,
    *,
    loss: AttackLoss = "cross-entropy",
    norm: Norm = math.inf,
    clip: Clip | None = None,
    targeted: bool = False,
) -> Float[Tensor, "batch *input"]:
    r"""One step of the fast gradient sign method, $x + \epsilon\,\mathrm{sign}(\nabla_x \ell(h(x), y))$.

    Args:
        y: the classes to leave; if `targeted`, the classes to reach, and the step goes down the loss.
        radius: $\epsilon$, one number or one a sample (batch,).
        loss: "cross-entropy", or "margin" for $\max_{j \ne y} h_j - h_y$.
        norm: infinity, or 2 for $x + \epsilon \nabla / \lVert\nabla\rVert_2$.
        clip: the range that inputs have, such as (0, 1).
    Returns: the perturbed inputs, in the dtype and on the device of `x`.
    Raises: BadInput, for inputs out of range, labels or radii that do not fit, logits that are not finite or of fewer
        than two classes, or a model that autograd cannot see through.
    Source: Goodfellow, Shlens and Szegedy 2015, arXiv 1412.6572.
    """
    reach = _reach(x, y, radius, norm, clip)
    direction = ascent_direction(model, x, y, loss=loss, norm=norm, targeted=targeted)
    return within((direction * reach.radii).add_(x.detach()), clip)


def least_likely(model: Classifier, x: Float[Tensor, "batch *input"]) -> Int[Tensor, "batch"]:
    """The class with the lowest logit, for each input."""
    with attackable(model), torch.no_grad():
        return logits_of(model, x).argmin(1)


def step_least_likely(
    model: Classifier,
    x: Float[Tensor, "batch *input"],
    radius: float | int | Tensor,
    *,
    norm: Norm = math.inf,
    clip: Clip | None = None,
) -> Float[Tensor, "batch *input"]:
    r"""One step towards the class that the model finds least likely (step l.l.).

    $x - \epsilon\,\mathrm{sign}(\nabla_x \ell(h(x), y_{ll}))$ with $y_{ll} = \arg\min_j h_j(x)$ and the cross-entropy
    $\ell$. It needs no labels; adversarial training that uses it does not leak them.

    Args, Returns, Raises: as for `fgsm`.
    Source: Kurakin, Goodfellow and Bengio 2017, arXiv 1611.01236, section 2.
    """
    return fgsm(model, x, least_likely(model, x), radius, norm=norm, clip=clip, targeted=True)


def pgd(
    model: Classifier,
    x: Float[Tensor, "batch *input"],
    y: Int[Tensor, "batch"],
    radius: float | int | Tensor,
    *,
    steps: int = 20,
    step: float | int | Tensor | None = None,
    restarts: int = 1,
    loss: AttackLoss = "cross-entropy",
    norm: Norm = math.inf,
    clip: Clip | None = None,
    targeted: bool = False,
    keep: Literal["best", "last"] = "best",
    stop_early: bool = False,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch *input"]:
    r"""Projected gradient ascent, $x_{t+1} = \Pi\bigl(x_t + \alpha\,\mathrm{sign}(\nabla_x \ell(h(x_t), y))\bigr)$.

    $\Pi$ projects on the ball of radius $\epsilon$ around the input, and on the range `clip`. All restarts of all
    samples run as one batch.

    Args:
        y: the classes to leave; if `targeted`, the classes to reach.
        radius: $\epsilon$, one number or one a sample (batch,).
        step: $\alpha$, one number or one a sample; by default $\epsilon / 5$.
        restarts: starting points: the input itself, and for each further one a uniform draw from the ball.
        loss, norm, clip: as for `fgsm`.
        keep: "best" returns, of all points visited, the one with the greatest margin over (or for the target) `y`;
            "last" the last point (of the best restart), as most libraries do.
        stop_early: a sample rests as soon as it is misclassified (reaches its target): faster, with smaller margins.
        generator: for the restarts after the first.
    Returns: the perturbed inputs, in the dtype and on the device of `x`.
    Raises: BadInput, as for `fgsm`; for fewer than one step or start; for several starts without a generator.
    Source: Madry et al. 2018, arXiv 1706.06083, section 2.1.
    """
    if steps < 1 or restarts < 1:
        raise BadInput(f"projected gradient needs one step and one start or more, got {steps} and {restarts}")
    if restarts > 1 and generator is None:
        raise BadInput(f"{restarts} starts need a generator for the random ones: pass generator=torch.Generator()")
    order = order_of(norm)
    reach = _reach(x, y, radius, norm, clip).repeated(restarts)
    ones = ones_of(x)
    length = reach.radii / 5 if step is None else column(step, x).expand(len(x), *ones).repeat(restarts, *ones)
    remember = keep == "best" or restarts > 1 or stop_early
    climb = _Climb(model, y.repeat(restarts), reach, length, loss, order, targeted, stop_early, remember)
    start = reach.ball.center.clone()
    if generator is not None and restarts > 1:
        start[len(x) :] = reach.draw(generator)[len(x) :]
    with attackable(model):
        best, last, score = climb.run(start, steps)
    chosen = score.reshape(restarts, -1).argmax(0)
    points = (best if keep == "best" else last).reshape(restarts, *x.shape)
    return points[chosen, torch.arange(len(x), device=x.device)]


@final
@dataclass(frozen=True, eq=False)
class Transfer:
    """Adversarial examples made on one network and shown to another.

    Attributes:
        adversarial: the inputs, (batch, *input).
        eligible: which inputs both networks classified as `y` before the attack.
        fooled_source: which adversarial inputs the network they were made on no longer classifies as `y`.
        fooled_target: the same for the other network.
    """

    adversarial: Float[Tensor, "batch *input"]
    eligible: Bool[Tensor, "batch"]
    fooled_source: Bool[Tensor, "batch"]
    fooled_target: Bool[Tensor, "batch"]

    @property
    def source_rate(self) -> float:
        """Share of the eligible inputs that fool the network they were made on (white box)."""
        return float(self.fooled_source[self.eligible].double().mean())

    @property
    def target_rate(self) -> float:
        """Share of the eligible inputs that fool the other network (black box); NaN if no input is eligible."""
        return float(self.fooled_target[self.eligible].double().mean())


def transfer(
    source: Classifier,
    target: Classifier,
    x: Float[Tensor, "batch *input"],
    y: Int[Tensor, "batch"],
    radius: float | int | Tensor,
    *,
    attack: Callable[..., Tensor] = pgd,
    **options: Any,
) -> Transfer:
    """A black-box attack by transfer: examples are made on `source`, and `target` is only asked for its answer.

    Args:
        attack: called as `attack(source, x, y, radius, **options)`: `pgd`, `fgsm`, or your own.
    Raises: BadInput, as the attack does.
    Source: Cubuk, Zoph, Schoenholz and Le 2017, arXiv 1711.02846, on black-box attacks.
    """
    adversarial = attack(source, x, y, radius, **options)
    eligible = (predictions(source, x) == y) & (predictions(target, x) == y)
    return Transfer(adversarial, eligible, predictions(source, adversarial) != y, predictions(target, adversarial) != y)


@final
@dataclass(frozen=True, eq=False)
class _Climb:
    """Projected gradient ascent from given points, one row a start."""

    model: Classifier
    y: Tensor
    reach: Reach
    length: Tensor
    loss: AttackLoss
    order: float
    targeted: bool
    stop_early: bool
    remember: bool

    def run(self, start: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best and the last point of each row, and the score of the best: its margin, positive for success."""
        points, best = start, start.clone()
        score = torch.full_like(start.flatten(1)[:, 0], -math.inf)
        length = -self.length if self.targeted else self.length
        rows: Rows = slice(None)  # all, without copies, until the first one rests
        for _ in range(steps):
            gradient, logits = _slope(self.model, points[rows], self.y[rows], self.loss)
            if self.remember:
                self._keep(points, best, score, rows, logits)
            if self.stop_early:
                going = (score[rows] <= 0).nonzero().squeeze(1)
                rows = going if isinstance(rows, slice) else rows[going]
                gradient = gradient[going]
            if len(gradient) == 0:
                return best, points, score
            moved = unit_step(gradient, self.order).mul_(length[rows]).add_(points[rows])
            reached = self.reach.project(moved, rows)
            if isinstance(rows, Tensor):
                points[rows] = reached
            else:
                points = reached
        if self.remember:
            with torch.no_grad():
                self._keep(points, best, score, rows, logits_of(self.model, points[rows]))
        return best, points, score

    def _keep(self, points: Tensor, best: Tensor, score: Tensor, rows: Rows, logits: Tensor) -> None:
        """Remember those of the points in `rows` that are better than what `best` and `score` hold."""
        found = margin(logits, self.y[rows]).to(score.dtype)
        found = -found if self.targeted else found
        improved = (found > score[rows]).nonzero().squeeze(1)
        places = improved if isinstance(rows, slice) else rows[improved]
        best[places], score[places] = points[places], found[improved]


def _reach(x: Tensor, y: Tensor, radius: float | int | Tensor, norm: Norm, clip: Clip | None) -> Reach:
    """Check what is given at the door of every attack."""
    if len(x) == 0:
        raise BadInput("there is nothing to attack: x is empty")
    if not bool(x.sum().isfinite()):  # much faster than to look at every number, as is done once this fails
        refuse_non_finite(x, "the input x")
    if len(y) != len(x):
        raise BadInput(f"{len(x)} inputs but {len(y)} labels were given: one label an input")
    refuse_out_of_range(x, clip)
    if not bool(torch.isfinite(torch.as_tensor(radius)).all()):
        raise BadInput("a radius is not finite: an attack needs a bounded ball")
    return Reach(Ball(x.detach(), radius, order_of(norm)), clip)


def _slope(model: Classifier, x: Tensor, y: Tensor, loss: AttackLoss) -> tuple[Tensor, Tensor]:
    """The gradient of each sample's loss by its own input, and the logits."""
    if loss not in LOSSES:
        raise BadInput(f"the loss of an attack is one of {', '.join(LOSSES)}, got {loss!r}")
    point = x.detach().requires_grad_()
    logits = logits_of(model, point)
    if not logits.requires_grad:
        raise BadInput(
            "the model's outputs carry no gradient by its inputs: it detaches them, or computes outside of autograd. "
            "Attack a differentiable stand-in and use `transfer`"
        )
    outside = (y < 0) | (y >= logits.shape[1])
    if outside.any():
        raise BadInput(f"label {int(y[outside][0])} is not one of the model's {logits.shape[1]} classes, from 0 on")
    (gradient,) = torch.autograd.grad(LOSSES[loss](logits, y).sum(), point)
    return gradient, logits.detach()
