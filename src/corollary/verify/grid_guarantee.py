"""All images of a finite grid around one: the nearest adversarial one, and what a Lipschitz constant adds to that."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.verify.black_box import BlackBox, Predict, black_box
from corollary.verify.manipulations import Norm, refuse_norm, refuse_step, severity
from corollary.verify.saliency import refuse_unlike_images

MOST_POINTS = 5_000_000
AT_A_TIME = 2**16
SLACK = 1e-9
"""Relative room for rounding in distances: a point at the radius itself belongs to the ball."""


@dataclass(frozen=True, eq=False)
class GridResult:
    """The nearest adversarial image of a grid.

    Args:
        severity: its distance; infinite if no image of the grid within the radius is adversarial.
        image: (channel, height, width), None if there is none; `predicted`: its class.
        label: class of the original.
        points: images of the grid within the radius, all of which were asked about.
    """

    severity: float
    image: Float[Tensor, "channel height width"] | None
    predicted: int | None
    label: int
    points: int


@dataclass(frozen=True, eq=False)
class Guarantee:
    """What a grid and a Lipschitz constant say of all images of a ball that differ in the free pixels only.

    Args:
        verdict: "safe": no image of the ball is adversarial; "unsafe": `witness` is; "undecided": neither is shown.
        witness: an adversarial image of the ball, the nearest of the grid; `predicted`: its class.
        lower, upper: the distance D* to the nearest adversarial image that differs in the free pixels only lies between
            these two. `upper` is that of the witness, infinite without one; `lower` is at most the radius.
        covering_radius: R_tau: so near to a point of the grid is every image of the ball.
        tau_needed: a grid coarser than this cannot show safety, whatever its other points are: the margin at the
            image itself would be used up.
        points: images asked about.
        reason: the verdict in words.
    """

    verdict: Literal["safe", "unsafe", "undecided"]
    witness: Float[Tensor, "channel height width"] | None
    predicted: int | None
    lower: float
    upper: float
    covering_radius: float
    tau_needed: float
    points: int
    reason: str


def covering_radius(tau: int | float, coordinates: int, norm: Norm) -> float:
    r"""$R_\tau = \frac{\tau}{2} n^{1/k}$: the farthest a point can be from a grid of step tau in n coordinates."""
    return tau / 2 * (1.0 if norm == math.inf else coordinates ** (1 / norm))


def grid_search(
    predict: Predict,
    image: Float[Tensor, "channel height width"],
    pixels: Int64[Tensor, "pixel"],
    tau: int | float,
    d: int | float,
    norm: Norm = 2,
    label: int | None = None,
) -> GridResult:
    """The nearest adversarial image on the grid of step `tau`, by asking about every one within distance `d`.

    On the grid every channel of the free pixels differs from the image by a multiple of tau, or is cut off at 0 or 1.
    Args:
        image: in [0, 1].
        pixels: those that may change, as row * width + column.
        norm: of the distance, 0 (pixels), 1, 2 or inf.
        label: class of the image, by default the predicted one.
    Raises: BadInput, for a grid of more than 5 million points, with their number.
    Source: Wicker et al. 2018, arXiv 1710.07859, section 6 (grid search as the ground truth of the game).
    """
    _refuse_radius(d)
    grid = _grid(image, pixels, tau, d, norm)
    with black_box(predict) as box:
        label = _label(box, image, label)
        best = _Nearest()
        points = 0
        for part in grid.parts(d):
            scores = box.scores(part.images, torch.zeros(len(part.images), dtype=torch.int64, device=image.device))
            best = best.or_nearer(part, scores.argmax(1), label)
            points += len(part.images)
    return GridResult(best.severity, best.image, best.predicted, label, points)


def grid_guarantee(
    predict: Predict,
    lipschitz: int | float | Float[Tensor, "class"],
    image: Float[Tensor, "channel height width"],
    pixels: Int64[Tensor, "pixel"],
    tau: int | float,
    d: int | float,
    norm: Norm = 2,
    label: int | None = None,
) -> Guarantee:
    r"""Whether an image within `d` of `image` that differs in `pixels` only has another class: shown for all of them.

    Every image x of the ball has a grid point g within $R_\tau$, at most $d + R_\tau$ from the image; if all of those
    have their class c with $N_c(g) - N_j(g) > (\hbar_c + \hbar_j) R_\tau$ for all $j \ne c$, no x is adversarial. The
    points that fail this bound the distance from below: $D^* \ge \min_g \lVert g - a \rVert - R_\tau$ over them.

    Args:
        predict: images -> scores; logits rather than probabilities, whose margins are small for their constants.
        lipschitz: hbar_j of each score in this norm, on the images that differ in `pixels`; or one that holds for all.
        image, pixels, tau, d, label: as in `grid_search`.
        norm: 1, 2 or inf.
    Raises: BadInput, for a grid of more than 5 million points, with their number; for constants that do not fit.
    Source: Wicker et al. 2018, arXiv 1710.07859, section 5, theorem on safety guarantees; with the points outside of
        the ball that rounding to the grid can reach.
    """
    refuse_norm(norm, allowed=(1, 2, math.inf))
    _refuse_radius(d)
    radius = covering_radius(tau, len(pixels) * image.shape[0], norm)
    grid = _grid(image, pixels, tau, d + radius, norm)
    start = torch.zeros(1, dtype=torch.int64, device=image.device)
    with black_box(predict) as box:
        scores = box.scores(image[None], start)
        label = int(scores.argmax(1)[0]) if label is None else label
        constants = _constants(lipschitz, scores)
        room = float(_safe_radius(scores, constants, label)[0])
        best, doubtful, points = _Nearest(), math.inf, 0
        for part in grid.parts(d + radius):
            scores = box.scores(part.images, start.expand(len(part.images)))
            fails = ~(_safe_radius(scores, constants, label) > radius)  # NaN, from 0 / 0, fails too
            if fails.any():
                doubtful = min(doubtful, float(part.distance[fails].min()))
            inside = part.distance <= d * (1 + SLACK)
            best = best.or_nearer(part.rows(inside), scores[inside].argmax(1), label)
            points += len(part.images)
    return _guarantee(best, doubtful, radius, room, tau, d, points)


class _Part(NamedTuple):
    images: Float[Tensor, "point channel height width"]
    distance: Float[Tensor, "point"]

    def rows(self, chosen: Bool[Tensor, "point"]) -> "_Part":
        return _Part(self.images[chosen], self.distance[chosen])


class _Nearest(NamedTuple):
    severity: float = math.inf
    image: Tensor | None = None
    predicted: int | None = None

    def or_nearer(self, part: _Part, predicted: Int64[Tensor, "point"], label: int) -> "_Nearest":
        """The nearest adversarial image of this and a part of the grid."""
        distance = part.distance.masked_fill(predicted == label, math.inf)
        if len(distance) == 0 or float(distance.min()) >= self.severity:
            return self
        row = int(distance.argmin())
        return _Nearest(float(distance[row]), part.images[row], int(predicted[row]))


@dataclass(frozen=True, eq=False)
class _Grid:
    """The values of each free coordinate; points are counted through like the digits of a number."""

    image: Float[Tensor, "channel height width"]
    places: Int64[Tensor, "coordinate"]
    values: list[Tensor]
    norm: Norm

    def parts(self, radius: float) -> Iterator[_Part]:
        """The points within `radius` of the image, so many at a time."""
        sizes = [len(values) for values in self.values]
        total = math.prod(sizes)
        flat = self.image.flatten()
        for start in range(0, total, AT_A_TIME):
            rest = torch.arange(start, min(start + AT_A_TIME, total), device=flat.device)
            points = flat.new_empty(len(rest), len(sizes))
            for column, (size, values) in enumerate(zip(sizes, self.values, strict=True)):
                points[:, column] = values[rest % size]
                rest = rest // size
            distance = self._distance(points)
            points = points[distance <= radius * (1 + SLACK)]
            images = flat.repeat(len(points), 1).index_copy(1, self.places, points)
            if len(points):
                yield _Part(images.reshape(-1, *self.image.shape), distance[distance <= radius * (1 + SLACK)])

    def _distance(self, points: Float[Tensor, "point coordinate"]) -> Float[Tensor, "point"]:
        """From the image; coordinates come channel by channel, so that norm 0 can count pixels."""
        channels = self.image.shape[0]
        shape = (len(points), channels, 1, len(self.values) // channels)
        original = self.image.flatten()[self.places].expand_as(points)
        return severity(points.reshape(shape), original.reshape(shape), self.norm).double()


def _refuse_radius(d: float) -> None:
    if not 0 < d < math.inf:
        raise BadInput(f"the radius d is a finite number above 0, got {d}")


def _grid(image: Tensor, pixels: Int64[Tensor, "pixel"], tau: float, radius: float, norm: Norm) -> _Grid:
    refuse_unlike_images(image[None])
    refuse_step(tau)
    refuse_norm(norm)
    size = image[0].numel()
    if pixels.ndim != 1 or len(pixels) == 0 or len(pixels.unique()) < len(pixels):
        raise BadInput(f"the free pixels are a list of different numbers, got {pixels.tolist()}")
    if int(pixels.min()) < 0 or int(pixels.max()) >= size:
        raise BadInput(f"pixels are counted row * width + column, 0 to {size - 1} here; got {int(pixels.max())}")
    places = (torch.arange(image.shape[0], device=image.device)[:, None] * size + pixels.to(image.device)).flatten()
    reach = 1.0 if norm == 0 else radius
    values = [_values(float(start), tau, reach, image) for start in image.flatten()[places]]
    total = math.prod(len(v) for v in values)
    if total > MOST_POINTS:
        scale = "inf" if norm == 0 else f"{covering_radius(tau, len(places), norm):.3g}"
        raise BadInput(
            f"the grid of step {tau:g} over {len(places)} coordinates has {_written(total)} points, and at most "
            f"{MOST_POINTS:,} can be asked about. Even then each would speak only for images within {scale} of it. "
            "Free fewer pixels (the most salient: saliency_map(image).top(4)), with a coarser step or a smaller "
            "radius; the answer then holds for changes of those pixels only"
        )
    return _Grid(image, places, values, norm)


def _values(start: float, tau: float, reach: float, like: Tensor) -> Float[Tensor, "value"]:
    """start + k tau within `reach`, with 0 and 1 in place of the first values beyond them."""
    steps = math.floor(reach / tau + SLACK)
    up, down = math.ceil((1 - start) / tau - 1e-6), math.ceil(start / tau - 1e-6)
    levels = torch.arange(-min(steps, down), min(steps, up) + 1, dtype=torch.float64)
    ends = [float(end) for end, k in ((0.0, down), (1.0, up)) if steps < k and abs(end - start) <= reach * (1 + SLACK)]
    return torch.cat([(start + tau * levels).clamp(0, 1), torch.tensor(ends, dtype=torch.float64)]).unique().to(like)


def _written(count: int) -> str:
    return f"{count:,}" if count < 10**12 else f"about 10^{len(str(count)) - 1}"


def _label(box: BlackBox, image: Tensor, label: int | None) -> int:
    if label is not None:
        return label
    return int(box.scores(image[None], torch.zeros(1, dtype=torch.int64, device=image.device)).argmax(1)[0])


def _constants(lipschitz: float | Tensor, scores: Float[Tensor, "point class"]) -> Float[Tensor, "class"]:
    constants = torch.as_tensor(lipschitz, dtype=scores.dtype, device=scores.device)
    if constants.ndim == 0:
        constants = constants.expand(scores.shape[1])
    if constants.shape != scores.shape[1:] or not bool((constants >= 0).all()):
        raise BadInput(
            f"a Lipschitz constant >= 0 is needed for each of {scores.shape[1]} scores, or one for all; got "
            f"{constants.tolist()}"
        )
    return constants


def _safe_radius(
    scores: Float[Tensor, "point class"], constants: Float[Tensor, "class"], label: int
) -> Float[Tensor, "point"]:
    r"""$\min_{j \ne c} (N_c - N_j) / (\hbar_c + \hbar_j)$: within it the class cannot change; negative where it has."""
    margin = scores[:, label, None] - scores
    radius = margin / (constants[label] + constants)
    return radius.index_fill(1, torch.tensor([label], device=scores.device), math.inf).amin(1)


def _guarantee(
    best: _Nearest, doubtful: float, radius: float, room: float, tau: float, d: float, points: int
) -> Guarantee:
    """The verdict with its reason; `room` is the safe radius at the image itself."""
    lower = min(max(doubtful - radius, 0.0), d)
    needed = max(tau * room / radius, 0.0)
    if best.image is not None:
        verdict, reason = "unsafe", f"an image of the grid at distance {best.severity:.4g} has another class"
    elif math.isinf(doubtful):
        verdict = "safe"
        reason = f"the margin at all {points:,} points of the grid is larger than it can lose within {radius:.4g}"
    else:
        verdict = "undecided"
        reason = (
            f"no image of the grid is adversarial, but the first of them whose margin can be lost within the covering "
            f"radius of {radius:.4g} lies at distance {doubtful:.4g}"
        )
        if tau >= needed:
            reason += (
                f"; at the image itself the margin is lost within {room:.4g} already, so that only a step below "
                f"{needed:.3g} could show safety: take it, or free fewer pixels (the covering radius grows with them)"
            )
    return Guarantee(verdict, best.image, best.predicted, lower, best.severity, radius, needed, points, reason)
