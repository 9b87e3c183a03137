"""Which pixels of an image matter to an eye: a mixture of Gaussians over pixels, one for each key point."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from corollary.base.errors import BadInput
from corollary.evidence import Source
from corollary.verify.keypoints import Detector, KeyPoints, detector_of

WICKER_2018 = Source(
    key="wicker2018feature",
    authors=("Matthew Wicker", "Xiaowei Huang", "Marta Kwiatkowska"),
    title="Feature-guided black-box safety testing of deep neural networks",
    year=2018,
    arxiv="1710.07859",
    venue="TACAS",
)
SMALL = 50
"""Images with sides below this are enlarged before key points are looked for."""


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """Features of one image: a distribution over its pixels for each, and how much each weighs.

    Args:
        components: G_i, (feature, height, width), each summing to one.
        weights: phi_i, (feature,), summing to one, the heaviest first.
        points: x, y, size and response of each feature's key point, in pixels of the image; no rows if there is none.
    """

    components: Float[Tensor, "feature height width"]
    weights: Float[Tensor, "feature"]
    points: Float[Tensor, "point 4"]

    @staticmethod
    def uniform(height: int, width: int, like: Tensor) -> "FeatureMap":
        """One feature, all pixels alike: what is used where an image has no key point, and the control of the idea."""
        share = torch.full((1, height, width), 1 / (height * width), dtype=like.dtype, device=like.device)
        return FeatureMap(share, share.new_ones(1), share.new_zeros(0, 4))

    def map(self) -> Float[Tensor, "height width"]:
        r"""The saliency $P(p) = \sum_i \phi_i G_i(p)$ of each pixel, summing to one."""
        return torch.tensordot(self.weights, self.components, dims=1)

    def top(self, count: int) -> Int64[Tensor, "pixel"]:
        """The `count` most salient pixels, as row * width + column, the most salient first."""
        return self.map().flatten().topk(min(count, self.components[0].numel())).indices


def saliency_map(
    image: Float[Tensor, "channel height width"] | Float[Tensor, "height width"],
    detector: Detector = "dog",
    *,
    enlarge: int = 15,
    sigma: float = 15.0,
    most: int = 256,
) -> FeatureMap:
    r"""Key points of an image as a distribution over its pixels, $P(p) = \sum_i \phi_i G_i(p)$.

    $\phi_i = r_i / \sum_j r_j$ for responses r; G_i is a Gaussian at the key point, of standard deviation
    s_i + `sigma` for its size s_i, restricted to the image's pixels. Without key points: one uniform component.

    Args:
        image: in [0, 1], (channel, height, width) or (height, width).
        detector: "dog" (differences of Gaussians, built in), "sift" (OpenCV's, from the extra `vision`), or a function
            from grey images (image, height, width) to `KeyPoints`.
        enlarge: an image with both sides below 50 pixels is enlarged so many times first, bilinearly.
        sigma: added to every size, in pixels of the image the key points were found in.
        most: key points kept, those of the largest responses.
    Raises: BadInput, for an image outside [0, 1] or of another shape.
    Source: Wicker et al. 2018, arXiv 1710.07859, section 3.
    """
    images = image[None, None] if image.ndim == 2 else image[None]
    return saliency_maps(images, detector, enlarge=enlarge, sigma=sigma, most=most)[0]


def saliency_maps(
    images: Float[Tensor, "image channel height width"],
    detector: Detector = "dog",
    *,
    enlarge: int = 15,
    sigma: float = 15.0,
    most: int = 256,
) -> list[FeatureMap]:
    """`saliency_map` of each of several images of one size, their key points found together."""
    refuse_unlike_images(images)
    height, width = images.shape[2:]
    times = enlarge if max(height, width) < SMALL else 1
    grey = _grey(images)
    if times > 1:
        grey = F.interpolate(grey[:, None], scale_factor=times, mode="bilinear", align_corners=False)[:, 0]
    found = detector_of(detector)(grey.clamp(0, 1))
    return [_features(found, number, (height, width), times, sigma, most, images) for number in range(len(images))]


def refuse_unlike_images(images: Tensor) -> None:
    """Raises: BadInput, unless `images` is (image, channel, height, width) in [0, 1]."""
    if images.ndim != 4 or images.numel() == 0 or not images.is_floating_point():
        raise BadInput(
            f"images are (image, channel, height, width) of floating values in [0, 1], got {tuple(images.shape)} "
            f"of {images.dtype}"
        )
    outside = ~((images >= 0) & (images <= 1))
    if outside.any():
        place = tuple(outside.nonzero()[0].tolist())
        raise BadInput(
            f"{int(outside.sum())} of {images.numel()} pixel values lie outside [0, 1], the first at {place} is "
            f"{float(images[place]):g}. Scale the images, and let predict undo it: lambda x: net((x - mean) / std)"
        )


def _grey(images: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image height width"]:
    """Luminance of three colours (ITU-R BT.601), else the mean of the channels."""
    if images.shape[1] != 3:
        return images.mean(1)
    return torch.tensordot(images.movedim(1, -1), images.new_tensor([0.299, 0.587, 0.114]), dims=1)


def _features(
    found: KeyPoints, number: int, shape: tuple[int, int], times: int, sigma: float, most: int, like: Tensor
) -> FeatureMap:
    """The features of one image, from the key points of all."""
    rows = (found.image == number).nonzero()[:, 0]
    rows = rows[found.response[rows].argsort(descending=True, stable=True)[:most]]
    response = found.response[rows].to(like)
    if len(rows) == 0 or float(response.sum()) <= 0:
        return FeatureMap.uniform(*shape, like)
    # Pixel u of the enlarged image has its centre at u + 1/2, which is (u + 1/2) / times in pixels of the image.
    x, y = ((place[rows].to(like) + 0.5) / times - 0.5 for place in (found.x, found.y))
    spread = (found.size[rows].to(like) + sigma) / times
    across, down = (
        -((torch.arange(side, dtype=like.dtype, device=like.device) - centre[:, None]) ** 2)
        / (2 * spread[:, None] ** 2)
        for side, centre in ((shape[1], x), (shape[0], y))
    )
    mass = down.softmax(1)[:, :, None] * across.softmax(1)[:, None, :]
    points = torch.stack([x, y, found.size[rows].to(like) / times, response], 1)
    return FeatureMap(mass, response / response.sum(), points)
