"""Data of a strong feature in most samples and a weak one in all, and the two-layer patch network that learns them."""

import math
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.seeds import Seeds
from corollary.evidence import Source

LU_2023 = Source(
    key="lu2024benign",
    authors=("Miao Lu", "Beining Wu", "Xiaodong Yang", "Difan Zou"),
    title="Benign oscillation of stochastic gradient descent with large learning rates",
    year=2023,
    arxiv="2310.17074",
    venue="ICLR 2024",
)
ORTHOGONAL = 1e-6
"""The largest cosine of two features that count as orthogonal: float32 vectors pass."""


class FeatureNoiseSamples(NamedTuple):
    """Samples of two patches, their labels of -1 and 1, and which of them lack the strong feature."""

    x: Float[Tensor, "sample patch dimension"]
    y: Float[Tensor, "sample"]
    is_weak: Bool[Tensor, "sample"]


@final
class FeatureNoiseData:
    r"""Samples $(y v,\; y u)$ with a strong feature u, or with chance $\rho$ $(y v,\; \xi)$: noise in its place.

    The label y is -1 or 1, equally likely. The noise is $\sigma_p^2$ times a standard Gaussian, without its parts along
    u and v: it tells nothing of the label. Both features are there to be learned; the weak one alone is in all samples.

    Args:
        dimension: d of a patch, at least 3.
        samples: n of the training set.
        strong, weak: norms of the features, then along the first two axes; or the vectors u and v themselves. The
            weak one stays unlearned at small rates only where it is five times weaker or more.
        rho: the share of training samples without the strong feature, in [0, 1).
        noise: the norm of the noise, about: $\sigma_p$ times the root of d.
        seed: of labels and noise.
    Raises: BadInput, for features that are zero, of another length or not orthogonal, for rho outside [0, 1), or sizes
        out of range.
    Source: Lu et al. 2023, arXiv:2310.17074, the feature-noise data model.
    """

    def __init__(
        self,
        dimension: int,
        samples: int,
        *,
        strong: int | float | Tensor = 1.0,
        weak: int | float | Tensor = 0.2,
        rho: int | float = 0.2,
        noise: int | float = 1.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ):
        if dimension < 3 or samples < 1:
            raise BadInput(
                f"noise beside two features needs a dimension of 3 or more, and 1 or more samples; got dimension="
                f"{dimension}, samples={samples}"
            )
        if not 0 <= rho < 1:
            raise BadInput(f"the share of samples without the strong feature lies in [0, 1), got rho={rho}")
        if not noise >= 0:
            raise BadInput(f"noise is a norm of 0 or more, got {noise}")
        self.strong = _feature(strong, 0, dimension, dtype, "strong")
        self.weak = _feature(weak, 1, dimension, dtype, "weak")
        cosine = float(torch.cosine_similarity(self.strong, self.weak, dim=0))
        if abs(cosine) > ORTHOGONAL:
            raise BadInput(
                f"the strong and the weak feature must be orthogonal, their cosine is {cosine:.3g}: subtract from one "
                "its projection on the other"
            )
        self.dimension, self.scale, self.seeds = dimension, noise / math.sqrt(dimension), Seeds(seed)
        generator = self.seeds("training set")
        y = _signs(samples, generator, dtype)
        self.train = self.of_labels(y, torch.rand(samples, generator=generator) < rho, generator)

    def of_labels(
        self, y: Float[Tensor, "sample"], is_weak: Bool[Tensor, "sample"], generator: torch.Generator
    ) -> FeatureNoiseSamples:
        """Samples of these labels, with noise in place of the strong feature where `is_weak`.

        Raises: BadInput, for labels other than -1 and 1.
        """
        if not bool((y.abs() == 1).all()):
            wrong = y[y.abs() != 1]
            raise BadInput(f"labels are -1 and 1; {len(wrong)} of {len(y)} are not, the first is {float(wrong[0]):g}")
        y = y.to(self.strong)
        drawn = self.scale * torch.randn(len(y), self.dimension, generator=generator, dtype=y.dtype)
        for feature in (self.strong, self.weak):
            drawn = drawn - torch.outer(drawn @ feature / feature.square().sum(), feature)
        second = torch.where(is_weak[:, None], drawn, torch.outer(y, self.strong))
        return FeatureNoiseSamples(torch.stack([torch.outer(y, self.weak), second], dim=1), y, is_weak)

    def weak_test(self, samples: int) -> FeatureNoiseSamples:
        """Samples none of which has the strong feature, the same on every call.

        Raises: BadInput, for less than one sample.
        """
        if samples < 1:
            raise BadInput(f"a test set has 1 or more samples, got {samples}")
        generator = self.seeds("weak test set")
        y = _signs(samples, generator, self.strong.dtype)
        return self.of_labels(y, torch.ones(samples, dtype=torch.bool), generator)


def plant_feature(
    x: Float[Tensor, "sample ..."],
    y: Float[Tensor, "sample"],
    feature: Float[Tensor, "..."],
    generator: torch.Generator,
    *,
    weak: int | float = 0.2,
    rho: int | float = 0.2,
    noise: int | float = 1.0,
) -> FeatureNoiseSamples:
    """Real data as the weak feature: each input is one patch, a feature planted by label (or noise) the other.

    Args:
        x: inputs, flattened here; give them centred. Each is brought to the norm `weak`.
        y: labels -1 and 1.
        feature: what is planted, y times it, shaped like one input: a bright bar, a watermark.
        generator: of the noise, and of which samples have it in place of the feature, a share `rho`.
        noise: its norm, about; it is orthogonal to the feature.
    Raises: BadInput, for other labels, a feature of another size, or a share outside [0, 1].
    """
    flat, planted = x.flatten(1), feature.flatten()
    if not bool((y.abs() == 1).all()):
        raise BadInput(f"labels are -1 and 1, got {sorted(set(y.tolist()))[:5]}")
    if planted.shape != flat.shape[1:] or not float(planted.norm()) > 0:
        raise BadInput(
            f"the planted feature is a nonzero vector of {flat.shape[1]} numbers, like one input; got "
            f"{list(feature.shape)} of norm {float(feature.norm()):g}"
        )
    if not 0 <= rho <= 1:
        raise BadInput(f"the share of samples without the planted feature lies in [0, 1], got rho={rho}")
    is_weak = torch.rand(len(y), generator=generator) < rho
    drawn = torch.randn(flat.shape, generator=generator, dtype=flat.dtype) * (noise / math.sqrt(flat.shape[1]))
    drawn = drawn - torch.outer(drawn @ planted / planted.square().sum(), planted)
    second = torch.where(is_weak[:, None], drawn, torch.outer(y, planted))
    first = flat * (weak / flat.norm(dim=1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny))
    return FeatureNoiseSamples(torch.stack([first, second], dim=1), y, is_weak)


@final
class PatchSquaredReLU(nn.Module):
    r"""$f = F_{+} - F_{-}$ with $F_j(x) = \frac1m \sum_{r, p} \max(\langle w_{j,r}, x^{(p)} \rangle, 0)^2$.

    Two layers that share their weights between the patches; the second one is fixed to 1 and -1, the first starts as
    N(0, I / d).

    Args:
        dimension: d of a patch. width: m, units of each sign.
        seed: of the weights.
    Raises: BadInput, for sizes below 1.
    Source: Lu et al. 2023, arXiv:2310.17074, the two-layer network of the theory.
    """

    signs: Tensor

    def __init__(self, dimension: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64):
        super().__init__()
        if dimension < 1 or width < 1:
            raise BadInput(f"a network has 1 or more inputs and units, got dimension={dimension}, width={width}")
        generator = Seeds(seed)("initial weights")
        drawn = torch.randn(2, width, dimension, generator=generator, dtype=dtype)
        self.weight = nn.Parameter(drawn / math.sqrt(dimension))
        self.register_buffer("signs", torch.tensor([1.0, -1.0], dtype=dtype))

    def forward(self, x: Float[Tensor, "sample patch dimension"]) -> Float[Tensor, "sample"]:
        """Outputs, one a sample."""
        projected = torch.einsum("jrd,kpd->kjrp", self.weight, x)
        return projected.relu().square().sum((2, 3)) @ self.signs / self.weight.shape[1]

    def edge(self, strong: int | float) -> float:
        r"""$m / (2 U^2)$: the learning rate at which one sample, fitted by a feature of norm U alone, gets unstable.

        There the loss $\frac12 (f - y)^2$ has the curvature $4 U^2 / m$ along that feature. Oscillation sets in above,
        and beyond some 1.7 times it single steps overshoot so far that units die or training diverges.
        """
        return self.weight.shape[1] / (2 * float(strong) ** 2)


def _feature(given: int | float | Tensor, axis: int, dimension: int, dtype: torch.dtype, name: str) -> Tensor:
    if not isinstance(given, Tensor):
        vector = torch.zeros(dimension, dtype=dtype)
        vector[axis] = given
        given = vector
    if given.shape != (dimension,):
        raise BadInput(f"the {name} feature is a norm or a vector [{dimension}], got shape {list(given.shape)}")
    vector = given.to(dtype)
    if not bool(torch.isfinite(vector).all()) or not float(vector.norm()) > 0:
        raise BadInput(f"the {name} feature needs a positive, finite norm, got {float(vector.norm()):g}")
    return vector


def _signs(samples: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randint(2, (samples,), generator=generator).to(dtype) * 2 - 1
