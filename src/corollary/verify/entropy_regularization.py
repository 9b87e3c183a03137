r"""Training for sure answers: cross-entropy plus $\lambda H$, the entropy of the prediction.

Low entropy means wide gaps between logits, and so larger perturbations before an answer changes. Part of what a
gradient attack seems to lose against such a network may be its gradient and not its grip: compare attacks on the
margin.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from corollary.base.errors import BadInput
from corollary.base.network import Batch
from corollary.engine import Fit, cross_entropy, fit


def entropy_penalty(logits: Float[Tensor, "batch class"]) -> Float[Tensor, ""]:
    r"""Mean entropy of the predictions, $H = -\sum_k p_k \log p_k$ with $p = \mathrm{softmax}(h)$, in nats.

    0 for certain answers, $\log K$ for uniform ones; finite, with a finite gradient, for logits of any size.
    """
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean()


@final
@dataclass(frozen=True)
class EntropyRegularised:
    r"""The loss $\mathrm{CE} + \lambda H(\mathrm{softmax}(h))$, a mean over samples.

    Args: `strength`: $\lambda$. Above 0 it lowers entropy, the opposite of the confidence penalty; 0 is cross-entropy.
    Source: Cubuk et al. 2017, arXiv 1711.02846, section 4.
    """

    strength: float

    def __call__(self, logits: Float[Tensor, "batch class"], y: Int[Tensor, "batch"]) -> Float[Tensor, ""]:
        return cross_entropy(logits, y) + self.strength * entropy_penalty(logits)


def fit_with_low_entropy(
    net: nn.Module,
    data: Batch,
    *,
    strength: float = 10.0,
    plain_epochs: int = 3,
    epochs: int = 5,
    batch_size: int | None = 128,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] = torch.optim.Adam,
    seed: int = 0,
) -> Fit:
    r"""Train a copy of `net` with cross-entropy for some epochs, then with $\lambda H$ added.

    The plain epochs come first because a network that is pushed to be sure before it knows anything stays with the
    wrong answers it began with.

    Args:
        data: `(inputs, targets)`, targets class numbers.
        strength: $\lambda$ of the second phase; 0 continues plainly, for a paired comparison under the same seed.
        plain_epochs: of cross-entropy alone; `epochs`: with the entropy term.
    Returns: the fit of the second phase.
    Raises: BadInput, for a negative strength, or as `fit` does.
    Source: Cubuk et al. 2017, arXiv 1711.02846, section 4.
    """
    if strength < 0:
        raise BadInput(
            f"the strength is {strength}: below 0 the term raises entropy (the confidence penalty), "
            "which narrows the gaps; give 0 or more"
        )
    if plain_epochs:
        net = fit(net, data, epochs=plain_epochs, batch_size=batch_size, optimizer=optimizer, seed=seed).module
    loss = EntropyRegularised(strength)
    return fit(net, data, loss=loss, epochs=epochs, batch_size=batch_size, optimizer=optimizer, seed=seed + 1)
