"""Gradients and curvature of groups of samples: do they oppose each other, and how much of the sharpness is theirs."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import vmap

from corollary.base.network import Batch, Loss, Params, as_function, batches, map_inputs, parameters_of
from corollary.dynamics.opposing_groups import OpposingGroups
from corollary.linalg import Eigenpairs, eigenpairs, hessian
from corollary.linalg.linearise import refuse_wrong_adjoint

CHUNK = 1024
"""Samples in one forward pass of `per_sample_losses`."""
HESSIAN_BATCH = 8192
"""Samples whose graph is kept between products with the Hessian; more are streamed."""


@final
@dataclass(frozen=True)
class CurvatureShares:
    r"""The curvature $q^\top H_S q$ of the mean loss of a set S of samples, along the top eigenvector q of all.

    `all` is the sharpness $\lambda$, and `residual` its error $\lVert Hq - \lambda q \rVert$. A group far above `all`
    makes more than its share. `random` has the size of a group.
    """

    rising: float
    falling: float
    random: float
    all: float
    residual: float


def per_sample_losses(
    net: nn.Module, loss: Loss, data: Batch, *, params: Params | None = None, chunk: int = CHUNK
) -> Float[Tensor, "sample"]:
    """The loss of each sample alone, [n], in the mode the network is in.

    Args: `params`: in place of the network's own, by name.
    """
    function = as_function(net)
    values = parameters_of(net) if params is None else params

    def single(output: Tensor, target: Tensor) -> Tensor:
        return loss(output[None], target[None])

    with torch.no_grad():
        return torch.cat([vmap(single)(function(values, x), y) for x, y in batches(data, chunk)])


def opposition(
    net: nn.Module,
    loss: Loss,
    data: Batch,
    first: Int[Tensor, "k"],
    second: Int[Tensor, "m"],
    *,
    params: Params | None = None,
) -> float:
    """Cosine of the gradients of the mean losses of two groups of samples (indices), at `params` or as the network is.

    Negative: a step that serves one group hurts the other. NaN where a gradient is zero.
    """
    own = parameters_of(net)
    leaves = {name: (params or own).get(name, tensor).detach().requires_grad_() for name, tensor in own.items()}
    function = as_function(net)
    inputs, targets = data

    def gradient(rows: Tensor) -> Tensor:
        x = map_inputs(lambda tensor: tensor[rows.to(tensor.device)], inputs)
        value = loss(function({**(params or {}), **leaves}, x), targets[rows.to(targets.device)])
        parts = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        return torch.cat([part.reshape(-1) for part in parts]).double()

    a, b = gradient(first), gradient(second)
    return float(a @ b / (a.norm() * b.norm()))


def sharpest(
    net: nn.Module,
    loss: Loss,
    data: Batch,
    *,
    params: Params | None = None,
    tolerance: float = 1e-4,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """The top eigenpair of the Hessian of the mean loss, with its residual.

    Symmetry, the sign of right second derivatives, is looked at on all samples: in float32 the few digits that a
    saturated softmax leaves to single samples would look like a wrong operation.

    Raises: BadInput, if the Hessian of all samples is not symmetric.
    """
    op = hessian(net, loss, batches(data, HESSIAN_BATCH), params=params, check=False)

    def product(rows: Tensor) -> Tensor:
        return (op @ rows.T).T

    refuse_wrong_adjoint(product, product, op.shape, next(iter(parameters_of(net).values())), "the Hessian")
    return eigenpairs(op, 1, tolerance=tolerance, generator=generator)


def curvature_shares(
    net: nn.Module,
    loss: Loss,
    data: Batch,
    groups: OpposingGroups,
    *,
    params: Params | None = None,
    generator: torch.Generator | None = None,
) -> CurvatureShares:
    r"""$q^\top H_S q$ for both groups, a random one and all samples, q the top eigenvector of the whole Hessian.

    Quadratic forms, because q itself has no sign and turns where the top eigenvalue is nearly repeated.

    Args: `generator`: of the random group and of Lanczos' start.
    """
    inputs, targets = data
    leaves = {name: (params or {}).get(name, tensor) for name, tensor in parameters_of(net).items()}
    top = sharpest(net, loss, data, params=leaves, generator=generator)
    q = top.vectors[:, 0]
    size, n = len(groups.rising), len(targets)

    def along(rows: Tensor) -> float:
        x = map_inputs(lambda tensor: tensor[rows.to(tensor.device)], inputs)
        part = hessian(net, loss, (x, targets[rows.to(targets.device)]), params=leaves, check=False)
        return float(q @ (part @ q) / (q @ q))

    drawn = torch.randperm(n, generator=generator)[:size]
    return CurvatureShares(
        along(groups.rising), along(groups.falling), along(drawn), float(top.values), float(top.residuals)
    )
