"""How alike two networks are in what they compute: the linear centred kernel alignment of their outputs."""

import torch
from jaxtyping import Float
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.base.network import refuse_non_finite
from corollary.evidence import Source

KORNBLITH_2019 = Source(
    key="kornblith2019similarity",
    authors=("Simon Kornblith", "Mohammad Norouzi", "Honglak Lee", "Geoffrey Hinton"),
    title="Similarity of neural network representations revisited",
    year=2019,
    arxiv="1905.00414",
    venue="ICML",
)
FLAT = 1e-10
"""Outputs whose centred norm is below this share of their own norm are constant: what is left is rounding."""


def linear_cka(a: Float[Tensor, "*batch n p"], b: Float[Tensor, "*other m q"]) -> Float[Tensor, "*batch"]:
    r"""$\|A^\top B\|_F^2 \,/\, (\|A^\top A\|_F \|B^\top B\|_F)$ of the centred outputs A and B for the same n inputs.

    1 for outputs that are equal up to rotation, shift and isotropic scale; in [0, 1]. Computed in float64, from
    matrices of p x q features: the kernels of n x n samples are never built.

    Args:
        a, b: samples in rows; leading axes are batched (pairs of networks, layers).
    Returns: one number for each pair; NaN where outputs are the same for all samples.
    Raises: BadInput, if the two have different samples or fewer than two, or are not finite.
    Source: Kornblith et al. 2019, arXiv 1905.00414, section 3.
    Example:
        >>> outputs = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0]])
        >>> round(float(linear_cka(outputs, 3 * outputs.flip(1) + 1)), 12)
        1.0
    """
    if a.shape[:-1] != b.shape[:-1] or a.shape[-2] < 2:
        raise BadInput(
            f"similarity is measured on the outputs [..., samples, features] of two networks for the same two or more "
            f"samples; got shapes {list(a.shape)} and {list(b.shape)}"
        )
    refuse_non_finite(a, "the first network's outputs")
    refuse_non_finite(b, "the second network's outputs")
    a, b = _centred(a), _centred(b)
    own = (a.mT @ a).norm(dim=(-2, -1)) * (b.mT @ b).norm(dim=(-2, -1))
    return (a.mT @ b).square().sum((-2, -1)) / own


def _centred(outputs: Float[Tensor, "*batch n p"]) -> Float[Tensor, "*batch n p"]:
    """Centred and scaled to norm 1, which keeps the fourth powers in range; NaN where nothing but rounding is left."""
    outputs = outputs.double()
    centred = outputs - outputs.mean(dim=-2, keepdim=True)
    norm, whole = (values.norm(dim=(-2, -1), keepdim=True) for values in (centred, outputs))
    return centred / torch.where(norm <= FLAT * whole, torch.nan, norm)
