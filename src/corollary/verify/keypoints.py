"""Key points of images: blobs that stand out at some scale, found by differences of Gaussians or by OpenCV's SIFT."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.base.optional import optional
from corollary.evidence import Source

LOWE = Source(
    key="lowe2004distinctive",
    authors=("David G. Lowe",),
    title="Distinctive image features from scale-invariant keypoints",
    year=2004,
    doi="10.1023/B:VISI.0000029664.99615.94",
    venue="International Journal of Computer Vision",
)
INTERVALS = 3
"""Scales an octave, Lowe's choice."""
BASE_SIGMA, INPUT_SIGMA = 1.6, 0.5
"""Blur of the first scale, and the blur that a picture is taken to have already, in its pixels."""
CONTRAST, EDGE = 0.04, 10.0
"""Least contrast (shared out over the scales), and the largest ratio of principal curvatures of a blob."""

LARGEST = 2**20
"""Pixels blurred at a time: more do not fit into the processor's caches."""

_cv2: Any = optional("cv2", extra="vision", purpose='the detector "sift"')


@dataclass(frozen=True, eq=False)
class KeyPoints:
    """Key points of a batch of images, one entry each; coordinates in pixels, the centre of the first pixel at 0.

    Args:
        image: which image of the batch it lies in.
        x: column; y: row.
        size: diameter of the neighbourhood that matters.
        response: how clearly it stands out, above 0.
    """

    image: Int64[Tensor, "point"]
    x: Float[Tensor, "point"]
    y: Float[Tensor, "point"]
    size: Float[Tensor, "point"]
    response: Float[Tensor, "point"]


Detect: TypeAlias = Callable[[Tensor], KeyPoints]
"""Grey images (image, height, width) in [0, 1] -> their key points."""
Detector: TypeAlias = Literal["dog", "sift"] | Detect


def detector_of(detector: Detector) -> Detect:
    """The function behind a detector's name. Raises: BadInput, for an unknown name."""
    if callable(detector):
        return detector
    known: dict[str, Detect] = {"dog": difference_of_gaussians, "sift": sift}
    if detector not in known:
        raise BadInput(f"there is no detector {detector!r}: choose {' or '.join(map(repr, known))}, or give a function")
    return known[detector]


def difference_of_gaussians(images: Float[Tensor, "image height width"]) -> KeyPoints:
    r"""Extrema over place and scale of $D(\cdot, \sigma) = (G_{k\sigma} - G_\sigma) * I$, $k = 2^{1/3}$.

    Each is moved to the extremum of the parabola through its neighbours (one Newton step, at most half a cell), and
    dropped if its contrast is low or if it lies along an edge.
    Args: `images`: grey, in [0, 1], (image, height, width).
    Returns: the key points; size is twice the scale sigma, response is |D|.
    Source: Lowe 2004, doi 10.1023/B:VISI.0000029664.99615.94, sections 3 and 4.
    """
    at_once = max(1, LARGEST // images[0].numel())
    found = [
        _of_octave(octave, first, number)
        for first in range(0, len(images), at_once)
        for number, octave in enumerate(_octaves(images[first : first + at_once]))
    ]
    parts = zip(*((p.image, p.x, p.y, p.size, p.response) for p in found), strict=True)
    return KeyPoints(*(torch.cat(part) for part in parts))


def sift(images: Float[Tensor, "image height width"]) -> KeyPoints:
    """OpenCV's SIFT key points of grey images (image, height, width) in [0, 1]; needs the extra `vision`.

    Source: Lowe 2004, doi 10.1023/B:VISI.0000029664.99615.94, as built into OpenCV.
    """
    finder = _cv2.SIFT_create()
    bytes_ = (images.detach().cpu() * 255).round().to(torch.uint8).numpy()
    points = [(i, point) for i, picture in enumerate(bytes_) for point in finder.detect(picture, None)]
    table = np.array([(*point.pt, point.size, point.response) for _, point in points]).reshape(-1, 4)
    x, y, size, response = torch.from_numpy(table).to(images).unbind(1)
    return KeyPoints(
        torch.tensor([i for i, _ in points], device=images.device, dtype=torch.int64), x, y, size, response
    )


def _octaves(images: Float[Tensor, "image height width"]) -> Iterator[Float[Tensor, "image scale height width"]]:
    """Six scales each, every one 2^(1/3) times the blur of the one before; each octave has half the pixels a side."""
    first = _blur(images, math.sqrt(BASE_SIGMA**2 - INPUT_SIGMA**2))
    for _ in range(max(1, round(math.log2(min(images.shape[1:]))) - 2)):
        scales = [first]
        for number in range(1, INTERVALS + 3):
            before, after = (BASE_SIGMA * 2 ** (n / INTERVALS) for n in (number - 1, number))
            scales.append(_blur(scales[-1], math.sqrt(after**2 - before**2)))
        yield torch.stack(scales, 1)
        first = scales[INTERVALS][:, ::2, ::2]  # the scale of twice the first sigma starts the next octave
        if min(first.shape[1:]) < 3:
            return


def _blur(images: Float[Tensor, "image height width"], sigma: float) -> Float[Tensor, "image height width"]:
    """Convolution with a Gaussian, the border repeated outwards."""
    height, width = images.shape[1:]
    # As two matrix products: on pictures of one channel and a few hundred pixels a side far faster than conv2d.
    return _blurring(height, sigma, images) @ images @ _blurring(width, sigma, images).T


def _blurring(side: int, sigma: float, like: Tensor) -> Float[Tensor, "side side"]:
    """Row i holds the weights of the pixels of a line in its blurred pixel i."""
    radius = math.ceil(4 * sigma)
    place = torch.arange(side, device=like.device)[:, None]
    taps = torch.arange(-radius, radius + 1, device=like.device)
    weights = torch.exp(-(taps.to(like.dtype) ** 2) / (2 * sigma**2))
    matrix = torch.zeros(side, side, dtype=like.dtype, device=like.device)
    return matrix.scatter_add_(1, (place + taps).clamp(0, side - 1), (weights / weights.sum()).expand(side, -1))


def _of_octave(blurred: Float[Tensor, "image scale height width"], first: int, number: int) -> KeyPoints:
    """Key points of octave `number` of the images from `first` on."""
    differences = blurred[:, 1:] - blurred[:, :-1]
    pixel = 2.0**number
    place = _candidates(differences).nonzero() + torch.tensor([0, 1, 1, 1], device=differences.device)
    image, scale, row, column = place.unbind(1)
    cube = _neighbourhoods(differences, place)
    gradient, curvature = _derivatives(cube)
    step = _newton_step(gradient, curvature)
    response = (cube[:, 1, 1, 1] + (gradient * step).sum(1) / 2).abs()
    keep = _is_blob(curvature[:, 1:, 1:]) & (response * INTERVALS >= CONTRAST)
    size = 2 * BASE_SIGMA * pixel * 2 ** ((scale + step[:, 0]) / INTERVALS)
    x, y = (column + step[:, 2]) * pixel, (row + step[:, 1]) * pixel
    return KeyPoints(image[keep] + first, x[keep], y[keep], size[keep], response[keep])


def _candidates(differences: Float[Tensor, "image scale height width"]) -> Bool[Tensor, "image scale2 row column"]:
    """Inner entries at least as extreme as their 26 neighbours, and not small."""
    middle = differences[:, 1:-1, 1:-1, 1:-1]
    strong = middle.abs() > 0.5 * CONTRAST / INTERVALS
    highest, lowest = _largest_around(differences), -_largest_around(-differences)
    return strong & torch.where(middle > 0, middle == highest, middle == lowest)


def _largest_around(values: Float[Tensor, "image scale height width"]) -> Float[Tensor, "image scale2 row column"]:
    """The largest of each inner entry and its 26 neighbours, an axis at a time."""
    for axis in (1, 2, 3):
        inner = values.shape[axis] - 2
        left, middle, right = (values.narrow(axis, start, inner) for start in (0, 1, 2))
        values = torch.maximum(torch.maximum(left, middle), right)
    return values


def _newton_step(gradient: Float[Tensor, "point 3"], curvature: Float[Tensor, "point 3 3"]) -> Float[Tensor, "point 3"]:
    """To the extremum of the parabola, at most half a cell: further away it is not a model of the picture."""
    # A curvature that vanishes has no extremum; on the diagonal, 1e-12 keeps the solution finite and changes no other.
    ridge = 1e-12 * torch.eye(3, dtype=torch.float64, device=curvature.device)
    step = -torch.linalg.solve_ex(curvature.double() + ridge, gradient.double())[0]
    return step.nan_to_num(0.0, 0.0, 0.0).clamp(-0.5, 0.5).to(gradient)


def _neighbourhoods(differences: Tensor, place: Int64[Tensor, "point 4"]) -> Float[Tensor, "point 3 3 3"]:
    steps = torch.arange(-1, 2, device=place.device)
    image, scale, row, column = (index[:, None, None, None] for index in place.unbind(1))
    return differences[image, scale + steps[:, None, None], row + steps[None, :, None], column + steps[None, None, :]]


def _derivatives(cube: Float[Tensor, "point 3 3 3"]) -> tuple[Float[Tensor, "point 3"], Float[Tensor, "point 3 3"]]:
    """Central differences at the middle of each cube, by scale, row and column."""
    axes = (1, 2, 3)

    def at(*moves: tuple[int, int]) -> Tensor:
        index = [1, 1, 1]
        for axis, move in moves:
            index[axis - 1] += move
        return cube[:, index[0], index[1], index[2]]

    def second(a: int, b: int) -> Tensor:
        if a == b:
            return at((a, 1)) - 2 * at() + at((a, -1))
        return (at((a, 1), (b, 1)) - at((a, 1), (b, -1)) - at((a, -1), (b, 1)) + at((a, -1), (b, -1))) / 4

    gradient = torch.stack([(at((a, 1)) - at((a, -1))) / 2 for a in axes], 1)
    curvature = torch.stack([torch.stack([second(a, b) for b in axes], 1) for a in axes], 1)
    return gradient, curvature


def _is_blob(curvature: Float[Tensor, "point 2 2"]) -> Bool[Tensor, "point"]:
    """Both principal curvatures of one sign and of similar size."""
    trace = curvature[:, 0, 0] + curvature[:, 1, 1]
    determinant = curvature[:, 0, 0] * curvature[:, 1, 1] - curvature[:, 0, 1] ** 2
    return (determinant > 0) & (trace**2 * EDGE < (EDGE + 1) ** 2 * determinant)
