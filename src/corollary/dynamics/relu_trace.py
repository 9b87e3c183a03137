r"""Two-layer ReLU networks $f(x) = \sum_j a_j\,\mathrm{relu}(w_j^\top x)$: the trace of their curvature is a norm."""

import torch
from jaxtyping import Float
from torch import Tensor

from corollary.base.network import refuse_non_finite


def relu_trace_closed_form(weights: Float[Tensor, "m d"], outer: Float[Tensor, "m"]) -> float:
    r"""$\operatorname{tr} G = \frac12 \sum_j (\lVert w_j \rVert^2 + d\, a_j^2)$, for half the squared distance.

    The inputs are N(0, I), or uniform on the sphere of radius $\sqrt d$. At least $\sqrt d$ times `path_norm`, with
    equality where the two layers are balanced.

    Args:
        weights: $w_j$, the rows of the first layer. outer: $a_j$.
    Raises: BadInput, for weights that are not finite.
    Source: Wu and Su 2023, arXiv:2305.17490, two-layer ReLU networks.
    """
    refuse_non_finite(weights, "the first layer")
    refuse_non_finite(outer, "the second layer")
    d = weights.shape[1]
    return float(0.5 * (weights.double().square().sum() + d * outer.double().square().sum()))


def path_norm(weights: Float[Tensor, "m d"], outer: Float[Tensor, "m"]) -> float:
    r"""$\sum_j |a_j| \lVert w_j \rVert$; at most $2 / (\eta \sqrt d)$ where SGD of batch size 1 is stable.

    Args: as for `relu_trace_closed_form`.
    """
    return float((outer.double().abs() * torch.linalg.vector_norm(weights.double(), dim=1)).sum())
