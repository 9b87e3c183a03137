"""Interval bounds of products of matrices: their tightness at random weights, where it is 1, and weights that suit it.

A deep linear network with weights $W_1 \\dots W_L$ maps a box of radii $\\epsilon$ to one of radii
$|W_L \\cdots W_1|\\,\\epsilon$; interval bounds give $|W_L| \\cdots |W_1|\\,\\epsilon$.
"""

import math
from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from corollary.base.errors import BadInput
from corollary.evidence import Source

MAO_2024 = Source(
    key="mao2024understanding",
    authors=("Yuhao Mao", "Mark Niklas Mueller", "Marc Fischer", "Martin Vechev"),
    title="Understanding certified training with interval bound propagation",
    year=2024,
    arxiv="2306.10426",
    venue="ICLR",
)
SHI_2021 = Source(
    key="shi2021fast",
    authors=("Zhouxing Shi", "Yihan Wang", "Huan Zhang", "Jinfeng Yi", "Cho-Jui Hsieh"),
    title="Fast certified robust training with short warmup",
    year=2021,
    arxiv="2103.17268",
    venue="NeurIPS",
)

_WEIGHTED = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


class Radii(NamedTuple):
    """Half widths of the smallest boxes around linear functions of an output, and of the boxes that intervals give."""

    optimal: Tensor
    interval: Tensor

    @property
    def tightness(self) -> Tensor:
        """Their ratio, in (0, 1]; NaN where both are 0."""
        return self.optimal / self.interval


def product_radii(weights: Sequence[Float[Tensor, "*batch _ _"]], eps: float | int | Tensor = 1.0) -> Radii:
    r"""Radii $|W_L \cdots W_1|\,\epsilon$ and $|W_L| \cdots |W_1|\,\epsilon$ of deep linear networks.

    Args:
        weights: $W_1, \dots, W_L$, each (*batch, outputs, inputs): a batch of networks at once.
        eps: radii of the input box, one number or (*batch, inputs).
    Returns: radii (*batch, outputs).
    Raises: BadInput, without weights, or for weights that do not follow each other.
    Source: Mao et al. 2024, arXiv 2306.10426, definition of propagation tightness.
    """
    _check_chain(weights)
    first = weights[0]
    box = torch.as_tensor(eps, dtype=first.dtype, device=first.device).expand(*first.shape[:-2], first.shape[-1])
    product = reduce(lambda found, weight: weight @ found, weights)
    optimal = (product.abs() @ box[..., None])[..., 0]
    interval = reduce(lambda found, weight: weight.abs() @ found, weights, box[..., None])[..., 0]
    return Radii(optimal, interval)


def init_tightness(widths: Sequence[int]) -> float:
    r"""Expected optimal radius over expected interval radius of a deep linear network with Gaussian weights.

    $\prod_{k=1}^{L-1} q(d_k)$, $q(d) = \sqrt\pi\,\Gamma(\frac{d+1}2) / (d\,\Gamma(\frac d2)) \sim \sqrt{\pi / 2d}$: it
    falls as one over the root of the width and exponentially with depth, whatever the scales of the layers. Exact; the
    mean of the ratio is close to it. With one hidden layer of ReLU units, half of them active, it is $\sqrt2$ larger.

    Args: `widths`: $d_0, \dots, d_L$, inputs and outputs included.
    Raises: BadInput, for fewer than two widths or one below 1.
    Source: Mao et al. 2024, arXiv 2306.10426, theorem on initialisation.
    """
    if len(widths) < 2 or min(widths) < 1:
        raise BadInput(f"a network has two widths or more, inputs first, each 1 or more; got {tuple(widths)}")
    logs = (math.log(math.pi) / 2 + math.lgamma((d + 1) / 2) - math.log(d) - math.lgamma(d / 2) for d in widths[1:-1])
    return math.exp(sum(logs))


def reconstruction_tightness(dimension: int) -> float:
    r"""Tightness of $U U^\top$ with random orthonormal U, for inputs of many more dimensions: $\sqrt{\pi / 2k}$.

    Interval bounds grow by $(2/\pi) k$, the smallest boxes by $\sqrt{2k/\pi}$.

    Args: `dimension`: k, of the subspace on which the data lies.
    Source: Mao et al. 2024, arXiv 2306.10426, theorem on reconstruction.
    """
    if dimension < 1:
        raise BadInput(f"a subspace has 1 dimension or more, got {dimension}")
    return math.sqrt(math.pi / (2 * dimension))


def is_propagation_invariant(weights: Sequence[Float[Tensor, "_ _"]], tol: float = 0.0) -> bool:
    r"""Whether interval bounds of a deep linear network are exact for every box.

    That is, $|W_L \cdots W_1| = |W_L| \cdots |W_1|$ entrywise. It is so just where all paths from an
    input to an output have one sign, which is decided on the signs alone, without rounding.

    Args:
        weights: $W_1, \dots, W_L$, each (outputs, inputs).
        tol: weights of at most this size count as zero.
    Raises: BadInput, as `product_radii`; for a negative tol.
    Source: Mao et al. 2024, arXiv 2306.10426, theorems on propagation invariance.
    """
    _check_chain(weights)
    if not tol >= 0:
        raise BadInput(f"tol is a size of weights, 0 or more; got {tol}")
    positive = torch.eye(weights[0].shape[1], dtype=torch.bool, device=weights[0].device)
    negative = torch.zeros_like(positive)
    for weight in weights:
        above, below = (weight > tol).double(), (weight < -tol).double()
        p, n = positive.double(), negative.double()
        positive, negative = (above @ p + below @ n) > 0, (above @ n + below @ p) > 0
    return not bool((positive & negative).any())


def has_conflicting_signs(product: Float[Tensor, "*batch output input"]) -> Tensor:
    r"""Whether some 2 x 2 minor of the signs of $W = W_2 W_1$ multiplies to -1, (*batch).

    Then, with no zero among the weights, interval bounds of the two layers are not exact. The product of signs
    $s_{ij} s_{ij'} s_{i'j} s_{i'j'}$ is 1 throughout just where every row of signs is the first one or its negative.
    Minors with a zero are left out.

    Source: Mao et al. 2024, arXiv 2306.10426, necessary condition for propagation invariance.
    """
    signs = product.sign()
    agree = signs[..., :, None, :] * signs[..., None, :, :]
    return ((agree > 0).any(-1) & (agree < 0).any(-1)).flatten(-2).any(-1)


def ibp_init_(model: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    r"""Draw the weights of every linear and convolutional layer from $N(0, 2\pi / d^2)$, d its fan-in, in place.

    In a ReLU network this keeps the radius of interval bounds constant from layer to layer in expectation: a layer
    multiplies it by $d \cdot \sqrt{2/\pi} \cdot \sqrt{2\pi}/d = 2$, of which half passes the units. Biases stay.

    Returns: the model.
    Raises: BadInput, if it has no such layer, or one whose weight is computed from others (parametrised).
    Source: Shi et al. 2021, arXiv 2103.17268, section 3.1.
    """
    layers = [module for module in model.modules() if isinstance(module, _WEIGHTED)]
    if not layers:
        raise BadInput(f"{type(model).__name__} has no linear or convolutional layer to initialise")
    for layer in layers:
        if parametrize.is_parametrized(layer, "weight"):
            raise BadInput(f"the weight of {layer} is computed from other tensors: initialise it before parametrising")
        transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
        # A transposed convolution reads `in / groups` channels through each kernel entry, as the others do.
        channels = layer.weight.shape[0] // layer.groups if transposed else layer.weight.shape[1]
        fan_in = channels * layer.weight[0, 0].numel()
        nn.init.normal_(layer.weight, 0.0, math.sqrt(2 * math.pi) / fan_in, generator=generator)
    return model


def _check_chain(weights: Sequence[Tensor]) -> None:
    if not weights:
        raise BadInput("a deep linear network has one weight matrix or more; none was given")
    for k, (first, second) in enumerate(pairwise(weights), 1):
        if second.shape[-1] != first.shape[-2]:
            raise BadInput(
                f"weights follow each other: W_{k + 1} takes {second.shape[-1]} inputs, W_{k} has {first.shape[-2]} "
                "outputs. Give them from the input on, each (outputs, inputs)"
            )
