"""Softmax as the sigmoid of log-odds: what its bounds are made of."""

from dataclasses import dataclass

import torch
from torch import Tensor

from corollary.graph.ops import Op


@dataclass(frozen=True)
class LogOdds(Op):
    r"""$x_k - \log \sum_{i \neq k} e^{x_i}$ along `axis`, of which the sigmoid is the softmax. Two entries at least."""

    axis: int

    def __call__(self, x: Tensor) -> Tensor:
        return log_odds(x, x, self.axis)


def log_odds(own: Tensor, others: Tensor, axis: int) -> Tensor:
    """own_k - log(sum of e^others over the other entries), without cancellation or overflow.

    The sum is taken relative to its own largest entry: for the largest of all, that is the second. Where all others are
    -inf, as under a mask, it counts as the smallest number there is, so that gradients stay finite.
    """
    smallest = torch.finfo(others.dtype)
    leads = torch.zeros_like(others, dtype=torch.bool).scatter(axis, others.argmax(axis, keepdim=True), True)
    rest = others.masked_fill(leads, -torch.inf)
    first, second = (part.amax(axis, keepdim=True).detach() for part in (others, rest))
    second = second.clamp(min=smallest.min)
    weights = (others - first).exp()
    beside = weights.sum(axis, keepdim=True) - weights
    without_first = second + (rest - second).exp().sum(axis, keepdim=True).clamp(min=smallest.tiny).log()
    return own - torch.where(leads, without_first, first + beside.clamp(min=1).log())  # the largest weighs 1
