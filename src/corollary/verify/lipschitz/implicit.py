"""Networks defined by an equation: deep equilibrium layers, and when that equation has exactly one solution."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corollary.base.errors import BadInput, CorollaryError


class NotWellPosed(CorollaryError):
    """The equation of an implicit layer was not solved, or no certificate that it has one solution was found."""


class Equilibrium(nn.Module):
    r"""The solution w of $w = \phi(W w + U x + b)$; x (batch, input) to w (batch, state).

    It is found by $w \leftarrow (1 - a) w + a\, \phi(W w + U x + b)$, which converges where W is small. Whether the
    equation has exactly one solution for every x is answered by `lipschitz_bound`, not by the iteration. With
    w = C z + V s and multipliers that make the unit's own block of the matrix inequality positive definite, the map
    from s to the gauge P z that it causes has norm below 1 where group j is measured by $\sqrt{\lambda_j}$, and the
    activation gives s from P z with Lipschitz constant 1: the loop is a contraction, with one fixed point.

    Args:
        state: W, (state, state). input: U, (state, input). bias: b, (state,).
        activation: phi, a module of one nonlinearity: nn.ReLU, MaxMin, GroupSort, Householder, nn.Tanh, ...
        damping: a. tolerance: change, by the largest entry, at which the iteration ends. steps: most iterations.
    Raises: BadInput, for shapes that do not fit. NotWellPosed, from a pass that does not converge.
    Source: Bai, Kolter and Koltun 2019, arXiv 1909.01377; Revay, Wang and Manchester 2020, arXiv 2010.01732.
    """

    def __init__(
        self,
        state: Tensor,
        input: Tensor,
        bias: Tensor,
        activation: nn.Module,
        *,
        damping: float = 0.5,
        tolerance: float = 1e-6,
        steps: int = 1000,
    ):
        super().__init__()
        if not (state.shape == (len(bias), len(bias)) and len(input) == len(bias)):
            raise BadInput(
                "an equilibrium layer needs W (n, n), U (n, m) and b (n), got "
                f"{tuple(state.shape)}, {tuple(input.shape)} and {tuple(bias.shape)}"
            )
        self.state, self.input, self.bias = (nn.Parameter(t.detach().clone()) for t in (state, input, bias))
        self.activation, self.damping, self.tolerance, self.steps = activation, damping, tolerance, steps

    def forward(self, x: Float[Tensor, "batch input"]) -> Float[Tensor, "batch state"]:
        """The solution for each sample; gradients pass through all iterations."""
        given = x @ self.input.T + self.bias
        w = change = torch.zeros_like(given)
        for _ in range(self.steps):
            change = self.damping * (self.activation(w @ self.state.T + given) - w)
            w = w + change
            if not change.numel() or self._small(change, w):
                return w
        raise NotWellPosed(
            f"w = phi(W w + U x + b) was not solved to {self.tolerance:g} in {self.steps} iterations: the last one "
            f"changed an entry by {float(change.detach().abs().max()):.2g}. W is large: try another damping, a coarser "
            "tolerance or more steps; lipschitz_bound tells whether there is exactly one solution."
        )

    def _small(self, change: Tensor, w: Tensor) -> bool:
        return float(change.detach().abs().max()) <= self.tolerance * max(1.0, float(w.detach().abs().max()))
