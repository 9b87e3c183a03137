"""A classifier as attacks see it: a function from inputs to logits, differentiable by the inputs."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import evaluating, refuse_non_finite

Classifier: TypeAlias = Callable[[Tensor], Tensor]
"""Inputs (batch, *input) -> logits (batch, class); a sample's logits depend on that sample alone."""


@contextmanager
def attackable(model: Classifier) -> Iterator[None]:
    """Inside, a module is in evaluation mode and gradients are recorded; afterwards all is as it was."""
    with evaluating(model) if isinstance(model, nn.Module) else nullcontext(), torch.enable_grad():
        yield


def logits_of(model: Classifier, x: Float[Tensor, "batch *input"]) -> Float[Tensor, "batch class"]:
    """The logits of `x`, once they are seen to be finite, of one row a sample, with two classes or more.

    Raises: BadInput, if they are not.
    """
    logits = model(x)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        shown = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise BadInput(
            f"an attack needs logits [{len(x)}, classes] of two classes or more, but the model returned {shown}. "
            "Wrap it in a function that returns one logit a class (for a single logit h: torch.stack([-h, h], 1))"
        )
    refuse_non_finite(logits.detach(), "the model's logits")
    return logits


def predictions(model: Classifier, x: Float[Tensor, "batch *input"], *, batch: int = 4096) -> Int[Tensor, "batch"]:
    """The most likely class of each input, `batch` inputs at a time, in evaluation mode."""
    with attackable(model), torch.no_grad():
        return torch.cat([logits_of(model, some).argmax(1) for some in x.split(batch)])


def margin(logits: Float[Tensor, "batch class"], y: Int[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    r"""$\max_{j \ne y} h_j - h_y$: positive where another class has more than `y`."""
    return _others(logits, y).amax(1) - _of(logits, y)


def log_odds_against(logits: Float[Tensor, "batch class"], y: Int[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    r"""$u = \log\sum_{j \ne y} e^{h_j} - h_y$, of which the cross-entropy is the increasing function $\log(1+e^u)$."""
    return _others(logits, y).logsumexp(1) - _of(logits, y)


def _others(logits: Tensor, y: Tensor) -> Tensor:
    """`logits` with minus infinity at the class `y`."""
    return logits.scatter(1, y[:, None].long(), -math.inf)


def _of(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None].long()).squeeze(1)
