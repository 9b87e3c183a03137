"""The noise that SGD keeps under weight decay: per-sample gradients cannot vanish while the weights do not."""

from typing import NamedTuple

import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.base.network import Loss, NetFunction, Params, parameters_of
from corollary.linalg.per_sample import per_sample_gradients
from corollary.linalg.problem import Data


class NoiseFloor(NamedTuple):
    r"""Per-sample gradients against the weights they hold up.

    Fields:
        second_moment: mean over samples of $\lVert g_i \rVert^2$, $g_i$ the gradient of the loss of sample i.
        floor: $\lambda^2 \lVert w \rVert^2$, which `second_moment` reaches or passes where the residual is 0.
        residual: $\lVert \bar g + \lambda w \rVert$, 0 at a critical point of the loss with decay.
        variance: mean of $\lVert g_i - \bar g \rVert^2$, the noise of SGD with one sample a step.
    """

    second_moment: float
    floor: float
    residual: float
    variance: float


def sgd_noise_floor(
    net: nn.Module | NetFunction, loss: Loss, data: Data, weight_decay: float, *, params: Params | None = None
) -> NoiseFloor:
    r"""Second moment of the per-sample gradients, and the floor that weight decay puts under it.

    At a critical point of $L(w) + \frac\lambda2 \lVert w \rVert^2$ the mean gradient is $-\lambda w$, so by Jensen's
    inequality $\frac1n \sum_i \lVert g_i \rVert^2 \ge \lambda^2 \lVert w \rVert^2$. Without decay both sides can be 0;
    with it they cannot, and steps of SGD never vanish at a constant learning rate.

    Args:
        net: a module, or a function (params, inputs) -> outputs with `params=`.
        loss: (outputs, targets) -> the mean over samples.
        data: (inputs, targets), or a re-iterable of such batches.
        weight_decay: $\lambda$, as PyTorch's optimizers take it: twice the factor of $\lVert w \rVert^2$ in what is
            minimised.
    Raises: BadInput, for a negative weight decay, batch normalisation in training mode, or a loss that is not a mean.
    Source: Xu et al. 2023, doi 10.34133/research.0024, the section on inherent SGD noise.
    """
    if not weight_decay >= 0:
        raise BadInput(f"weight decay is at least 0, got {weight_decay}")
    weights = torch.cat([p.flatten() for p in parameters_of(net, params).values()]).double()
    samples, squares, total = 0, torch.zeros_like(weights[0]), torch.zeros_like(weights)
    for block in per_sample_gradients(net, loss, data, params=params):
        samples += len(block)
        squares += block.double().square().sum()
        total += block.double().sum(dim=0)
    mean, second = total / samples, float(squares / samples)
    return NoiseFloor(
        second_moment=second,
        floor=float(weight_decay**2 * weights.square().sum()),
        residual=float(torch.linalg.vector_norm(mean + weight_decay * weights)),
        variance=max(0.0, second - float(mean.square().sum())),
    )
