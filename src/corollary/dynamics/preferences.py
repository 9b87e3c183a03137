"""A step of maximum likelihood as a sum of pairwise preferences, and what it adds up to along training."""

import copy
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import Inputs, batch_length, call, evaluating, map_inputs, refuse_non_finite
from corollary.linalg.per_sample import per_sample_gradients

BLOCK_BYTES = 2**27
"""Size of the gradients of all outputs that are held at a time."""


class PreferenceDecomposition(NamedTuple):
    """What a step on "y was observed" says of each other output.

    Fields:
        weights: `[n, outputs]`: the softmax of the output that y is preferred to; 0 for y itself, so that a row sums
            to one minus the softmax of y.
        norms: `[n, outputs]`: norm of the gradient of the difference of utilities of y and that output.
        residual: largest relative error, over samples, of the weighted sum against the gradient of the log-likelihood.
    """

    weights: Float[Tensor, "n outputs"]
    norms: Float[Tensor, "n outputs"]
    residual: float


def preference_decomposition(model: nn.Module, x: Inputs, y: Int[Tensor, "n"]) -> PreferenceDecomposition:
    r"""$\nabla\log\sigma(y|x) = \sum_{y' \ne y} \sigma(y'|x)\, \nabla[u(x,y) - u(x,y')]$, checked in float64.

    Any network that ends in a softmax is taught pairwise preferences "y over y'", the more the stronger y' competes.

    Args:
        model: inputs -> logits `[n, outputs]`; a copy in float64 and evaluation mode is differentiated. The step of a
            sequence model is one too, with `(x, prefix)` as inputs.
        x: inputs of n samples.
        y: the observed outputs.
    Returns: weights, norms and the residual, which is rounding alone (it grows as one over 1 - softmax of y).
    Raises: BadInput, for outputs out of range, or logits that are not `[n, outputs]`.
    Source: Huang and Yuan 2023 (training as utility learning); the identity follows from the softmax.
    """
    twin = copy.deepcopy(model).double()
    x = map_inputs(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, x)
    with torch.no_grad(), evaluating(twin):
        logits = call(twin, x)
        if logits.ndim != 2 or len(logits) != len(y) or bool(((y < 0) | (y >= logits.shape[1])).any()):
            raise BadInput(
                f"preferences need logits [n, outputs] and observed outputs [n] among them; got logits "
                f"{tuple(logits.shape)} and y {tuple(y.shape)} from {int(y.min())} to {int(y.max())}"
            )
        refuse_non_finite(logits, "the utility")
        weights = logits.softmax(-1).scatter(1, y[:, None], 0)
        size = sum(p.numel() for p in twin.parameters() if p.requires_grad)
        few = max(1, BLOCK_BYTES // (8 * size * logits.shape[1]))
        norms, errors = [], []
        for i in range(0, batch_length(x), few):
            part = slice(i, i + few)
            inputs = map_inputs(lambda tensor, part=part: tensor[part], x)
            found = _of_part(twin, inputs, y[part], weights[part], check=i == 0)
            norms.append(found[0])
            errors.append(found[1])
    return PreferenceDecomposition(weights, torch.cat(norms), float(torch.cat(errors).max()))


def _of_part(net: nn.Module, x: Inputs, y: Tensor, weights: Tensor, *, check: bool) -> tuple[Tensor, Tensor]:
    """Norms of the pairs' gradients, and the relative error of each sample."""
    n, count = weights.shape
    repeated = map_inputs(lambda tensor: tensor.repeat_interleave(count, dim=0), x)
    each = torch.arange(count, device=y.device).repeat(n)
    utility = torch.cat(list(per_sample_gradients(net, _picked, (repeated, each), check=check)))
    utility = utility.reshape(n, count, -1)
    direct = torch.cat(list(per_sample_gradients(net, _log_likelihood, (x, y), check=check)))
    pairs = utility[torch.arange(n, device=y.device), y][:, None] - utility
    summed = torch.einsum("nc,ncp->np", weights, pairs)
    errors = (summed - direct).norm(dim=1) / direct.norm(dim=1).clamp_min(torch.finfo(direct.dtype).tiny)
    return pairs.norm(dim=2), errors


def _picked(logits: Tensor, outputs: Tensor) -> Tensor:
    return logits.gather(1, outputs[:, None]).mean()


def _log_likelihood(logits: Tensor, outputs: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(1, outputs[:, None]).mean()


class Telescoped(NamedTuple):
    """The two sides of the duality, `[*runs, outputs]` each.

    Fields:
        frequency: how often each output was observed.
        softmax_average: mean softmax over the steps.
        drift: utility gained, over learning rate times steps.
        residual: frequency - softmax_average - drift: 0 for tabular utilities, what the sharing of weights between
            inputs adds for a network.
    """

    frequency: Tensor
    softmax_average: Tensor
    drift: Tensor
    residual: Tensor


def tabular_utilities(
    initial: Float[Tensor, "*runs outputs"], observed: Int[Tensor, "*runs steps"], learning_rate: float
) -> Float[Tensor, "time *runs outputs"]:
    r"""Utilities before and after each step $u \leftarrow u + \eta\,(e_{y_t} - \sigma(u))$ of maximum likelihood.

    Args:
        initial: the utilities at the start.
        observed: the output seen at each step.
        learning_rate: $\eta$.
    Returns: one row more than there are steps.
    """
    _refuse_observed(observed, initial.shape[-1])
    path = [initial]
    one_hot = nn.functional.one_hot(observed, initial.shape[-1]).to(initial)
    for step in one_hot.movedim(-2, 0):
        path.append(path[-1] + learning_rate * (step - path[-1].softmax(-1)))
    return torch.stack(path)


def telescoping_frequency(
    utilities: Float[Tensor, "time *runs outputs"], observed: Int[Tensor, "*runs steps"], learning_rate: float
) -> Telescoped:
    r"""$\frac1T\sum_t 1[y_t = y] = \frac1T\sum_t \sigma_{u_t}(y) + (u_T(y) - u_0(y))/(\eta T)$.

    The empirical frequency is the average softmax along training plus the utility gained per unit step. Exact for
    tabular utilities (or logits trained directly, at one input); for a network the residual is a diagnostic.

    Args:
        utilities: before the first step and after each one, T + 1 rows.
        observed: the output seen at each of the T steps.
        learning_rate: $\eta$ of those steps.
    Raises: BadInput, for a learning rate that is not positive, lengths that do not fit, or outputs out of range.
    """
    steps = observed.shape[-1]
    if len(utilities) != steps + 1 or steps == 0:
        raise BadInput(
            f"{steps} observed outputs need {steps + 1} rows of utilities and at least one step, got "
            f"{len(utilities)} rows"
        )
    if not learning_rate > 0:
        raise BadInput(f"the learning rate must be positive, got {learning_rate}")
    refuse_non_finite(utilities, "the utility")
    _refuse_observed(observed, utilities.shape[-1])
    frequency = nn.functional.one_hot(observed, utilities.shape[-1]).to(utilities).mean(-2)
    average = utilities[:-1].softmax(-1).mean(0)
    drift = (utilities[-1] - utilities[0]) / (learning_rate * steps)
    return Telescoped(frequency, average, drift, frequency - average - drift)


def _refuse_observed(observed: Tensor, count: int) -> None:
    if observed.numel() and bool(((observed < 0) | (observed >= count)).any()):
        given = f"{int(observed.min())} to {int(observed.max())}"
        raise BadInput(f"observed outputs are indices 0 to {count - 1}, got {given}")
