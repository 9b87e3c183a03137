r"""Learning rates that bound the mean-square threshold from both sides, from a few moments of the gradients.

With $H_i = g_i g_i^\top$, $G$ their mean, and the notation of `mean_square`, the threshold is
$\eta^* = (1 - \beta) / \max_M \frac{\langle M, D M \rangle - \frac{\beta}{1 - \beta^2} \langle M, Q M \rangle}
{\langle M, C M \rangle}$ for momentum $\beta$. Every M gives an upper bound: the identity, or the projection to the
leading eigenvector. $H_i \preceq \max_i \lVert H_i \rVert$ gives a lower one.
"""

import math
from dataclasses import dataclass
from typing import final

from corollary.dynamics.mean_square import noise_share, refuse_momentum


@final
@dataclass(frozen=True)
class GradientMoments:
    r"""What the bounds are made of.

    Args:
        samples: n. directions: rows of each sample, at least the rank of each $H_i$.
        trace: $\operatorname{tr} G$.
        largest_eigenvalue: $\lambda_{\max}(G)$.
        frobenius: $\lVert G \rVert_F$.
        fourth_moment: the mean of $\lVert H_i \rVert_F^2$, which is $\lVert g_i \rVert^4$ for one output.
        largest_sample: the largest $\lVert H_i \rVert$, which is $\lVert g_i \rVert^2$ for one output.
    """

    samples: int
    directions: int
    trace: float
    largest_eigenvalue: float
    frobenius: float
    fourth_moment: float
    largest_sample: float

    def gradient_descent(self, *, momentum: int | float = 0.0) -> float:
        r"""$2 (1 + \beta) / \lambda_{\max}(G)$: necessary and sufficient with full batches, necessary with any."""
        refuse_momentum(momentum)
        return _ratio(2 * (1 + momentum), self.largest_eigenvalue)

    def trace_limit(self, batch_size: int, *, replacement: bool = True, momentum: int | float = 0.0) -> float:
        r"""A necessary condition from the trace alone: at batch size 1, $\eta \operatorname{tr} G \le 2$.

        For C directions $2 C B / \operatorname{tr} G$ without replacement, and a little less with; each sample's
        gradients may spread over C directions, whence the factor.

        Raises: BadInput, for a batch size below 1 or above n, or momentum outside [0, 1).
        Source: Wu and Su 2023, arXiv:2305.17490, main theorem (one output, batch size 1, no momentum).
        """
        share, rest = self._weights(batch_size, replacement, momentum)
        # The identity's bound with |H_i|_F^2 >= (tr H_i)^2 / C. For |G|_F^2: at least (tr G)^2 / (n C), its rank being
        # n C at most, where it adds; at most the mean of |H_i|_F^2 where it takes away.
        least = share + (rest / self.samples if rest > 0 else rest)
        return _ratio(2 * (1 - momentum) * self.directions, least * self.trace)

    def identity_limit(self, batch_size: int, *, replacement: bool = True, momentum: int | float = 0.0) -> float:
        r"""The necessary condition that M = I gives; without momentum
        $\eta\,[c\, E\lVert H_i \rVert_F^2 + (1 - c) \lVert G \rVert_F^2] \le 2 \operatorname{tr} G$.

        At most `trace_limit`. Raises: as there.
        """
        share, rest = self._weights(batch_size, replacement, momentum)
        return _ratio(2 * (1 - momentum) * self.trace, share * self.fourth_moment + rest * self.frobenius**2)

    def sufficient_limit(self, batch_size: int, *, replacement: bool = True, momentum: int | float = 0.0) -> float:
        r"""Up to here every interpolating minimum with these moments is stable: without momentum
        $2 / (c \max_i \lVert H_i \rVert + (1 - c) \lambda_{\max}(G))$.

        Raises: as `trace_limit`.
        """
        share = noise_share(self.samples, batch_size, replacement=replacement)
        refuse_momentum(momentum)
        damping = (1 - momentum) / (1 + momentum)
        noise, drift = share * self.largest_sample, (1 - share) * damping * self.largest_eigenvalue
        return _ratio(2 * (1 - momentum), noise + drift)

    def _weights(self, batch_size: int, replacement: bool, momentum: int | float) -> tuple[float, float]:
        """The weights of the mean of squares and of the square of the mean."""
        share = noise_share(self.samples, batch_size, replacement=replacement)
        refuse_momentum(momentum)
        return share, 1 - share - 2 * momentum / (1 + momentum)


def _ratio(above: float, below: float) -> float:
    """A limit; infinite where nothing limits."""
    return above / below if below > 0 else math.inf
