r"""Diagonal linear networks $f(x) = \sum_j a_j b_j x_j$: their curvature is a norm, and SGD bounds it.

With $\beta = a \odot b$ and uncorrelated inputs of variance 1, $\operatorname{tr} G = \lVert a \rVert^2 + \lVert b
\rVert^2 \ge 2 \lVert \beta \rVert_1$ and $\lambda_{\max}(G) = \max_j (a_j^2 + b_j^2) \ge 2 \lVert \beta \rVert_\infty$:
a minimum that is stable for SGD of batch size 1 has $\lVert \beta \rVert_1 \le 1 / \eta$, one that is stable for
gradient descent only $\lVert \beta \rVert_\infty \le 1 / \eta$.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import refuse_non_finite
from corollary.base.progress import track
from corollary.base.seeds import Seeds

BLOCK = 4096
"""Steps for which the samples of all members are drawn at a time."""


@final
class DiagonalLinearNet(nn.Module):
    r"""$f(x) = \langle \beta, x \rangle$ with $\beta$ the elementwise product of `depth` weight vectors.

    Args:
        d: inputs. depth: weight vectors, at least 2; standard normal to begin with, from PyTorch's default generator.
    Raises: BadInput, for fewer inputs than 1 or a depth below 2.
    """

    def __init__(self, d: int, depth: int = 2):
        super().__init__()
        if d < 1 or depth < 2:
            raise BadInput(f"a diagonal network has d >= 1 inputs and depth >= 2, got d={d}, depth={depth}")
        self.factors = nn.Parameter(torch.randn(depth, d))

    def forward(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch"]:
        """One output for each row."""
        return x @ self.factors.prod(dim=0)

    def beta(self) -> Float[Tensor, "d"]:
        """The linear map that the network is."""
        return self.factors.detach().prod(dim=0)

    def balance(self) -> float:
        """How unequal the layers are: see `balance`."""
        return float(balance(self.factors.detach()))


def balance(factors: Float[Tensor, "*member depth d"]) -> Float[Tensor, "*member"]:
    r"""$\frac{\sum_j \sum_l \prod_{m \ne l} w_{mj}^2}{L \sum_j |\beta_j|^{2 - 2/L}} \ge 1$: the trace over the least it
    can be for this $\beta$, 1 where the layers' magnitudes agree.

    At depth L = 2 it is $(\lVert a \rVert^2 + \lVert b \rVert^2) / (2 \lVert a \odot b \rVert_1)$.

    Args: `factors`: weight vectors [..., depth, d].
    """
    depth = factors.shape[-2]
    least = factors.prod(dim=-2).abs().pow(2 - 2 / depth).sum(dim=-1)
    return _gradient_squares(factors).sum(dim=-1) / (depth * least)


class Curvature(NamedTuple):
    """Trace and largest eigenvalue of G on the training inputs, [members] each."""

    trace: Float[Tensor, "*member"]
    largest_eigenvalue: Float[Tensor, "*member"]


def diagonal_curvature(factors: Float[Tensor, "*member depth d"], x: Float[Tensor, "n d"]) -> Curvature:
    r"""For half the squared distance: $\operatorname{tr} G = \sum_j s_j \overline{x_j^2}$ with $s_j = a_j^2 + b_j^2$,
    and the largest eigenvalue, which is that of $\frac1n X \operatorname{diag}(s) X^\top$.
    """
    squares = _gradient_squares(factors)
    kernel = (x * squares[..., None, :]) @ x.T / len(x)
    return Curvature(squares @ x.square().mean(dim=0), torch.linalg.eigvalsh(kernel)[..., -1])


def _gradient_squares(factors: Float[Tensor, "*member depth d"]) -> Float[Tensor, "*member d"]:
    """The squared gradient of each entry of beta with respect to its weights; zeros among them do no harm."""
    ones = torch.ones_like(factors[..., :1, :])
    before = torch.cat([ones, factors[..., :-1, :]], dim=-2).cumprod(dim=-2)
    after = torch.cat([ones, factors.flip(-2)[..., :-1, :]], dim=-2).cumprod(dim=-2).flip(-2)
    return (before * after).square().sum(dim=-2)


@final
@dataclass(frozen=True, eq=False)
class DiagonalRuns:
    r"""Trained two-layer diagonal networks.

    Attributes:
        factors: a and b of each member, [members, 2, d].
        train_loss: half the mean squared residual, [members]; NaN or infinite for one that diverged.
        identity_error: the largest difference seen between the two sides of
            $a_j'^2 - b_j'^2 = (a_j^2 - b_j^2)(1 - \eta^2 u_j^2)$, with $u$ the batch's mean of residual times input,
            over all steps and entries, relative to $1 + |a_j^2 - b_j^2|$, [members]: SGD balances the layers, at a rate
            of second order in the learning rate, and gradient flow does not.
    """

    factors: Float[Tensor, "members 2 d"]
    train_loss: Float[Tensor, "members"]
    identity_error: Float[Tensor, "members"]

    def test_error(self, x: Float[Tensor, "n d"], y: Float[Tensor, "n"]) -> Float[Tensor, "members"]:
        """Mean squared error on other samples."""
        return (self.factors.prod(dim=1) @ x.T - y).square().mean(dim=1)


def train_diagonal(
    factors: Float[Tensor, "members 2 d"],
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n"],
    learning_rate: Float[Tensor, "members"],
    *,
    steps: int,
    batch_size: int | None = None,
    seed: int = 0,
    gradient_clip: float | None = None,
) -> DiagonalRuns:
    """Two-layer diagonal networks by SGD with replacement, or by gradient descent, all members at once.

    Args:
        factors: where each member starts: a and b.
        x, y: training samples, shared; half the mean squared residual is the loss.
        learning_rate: one for each member.
        steps: updates.
        batch_size: samples a step, drawn with replacement for each member; None for gradient descent.
        seed: of the batches.
        gradient_clip: a larger norm of a member's gradient is scaled down to it.
    Raises: BadInput, for samples that are not finite, and steps or a batch size below 1.
    """
    refuse_non_finite(x, "the inputs x")
    refuse_non_finite(y, "the targets y")
    if steps < 1 or (batch_size is not None and batch_size < 1):
        raise BadInput(f"training takes steps >= 1 and batches of >= 1, got steps={steps}, batch_size={batch_size}")
    a, b = (factor.clone() for factor in factors.unbind(dim=1))
    rate = learning_rate.to(a)[:, None]
    error = torch.zeros_like(a)
    for inputs, targets in track(_batches(x, y, len(a), steps, batch_size, seed), "steps of SGD", total=steps):
        residual = (inputs @ (a * b)[..., None])[..., 0] - targets
        slope = (residual[:, None] @ inputs)[:, 0] / inputs.shape[1]
        moved = rate * slope
        if gradient_clip is not None:
            norm = ((a.square() + b.square()) * slope.square()).sum(dim=1, keepdim=True).sqrt()
            moved = moved * (gradient_clip / norm).clamp(max=1)
        before = a.square() - b.square()
        a, b = a - moved * b, b - moved * a
        wanted = before * (1 - moved.square())
        error = torch.maximum(error, (a.square() - b.square() - wanted).abs() / (1 + before.abs()))
    trained = torch.stack([a, b], dim=1)
    loss = 0.5 * (trained.prod(dim=1) @ x.T - y).square().mean(dim=1)
    return DiagonalRuns(trained, loss, error.amax(dim=1))


def _batches(
    x: Tensor, y: Tensor, members: int, steps: int, batch_size: int | None, seed: int
) -> Iterator[tuple[Float[Tensor, "any batch d"], Float[Tensor, "any batch"]]]:
    """The batches of all members, step by step."""
    if batch_size is None:
        for _ in range(steps):
            yield x[None], y[None]
        return
    generator = Seeds(seed)("batches of a diagonal network")
    for start in range(0, steps, BLOCK):
        shape = (min(BLOCK, steps - start), members, batch_size)
        picks: Int[Tensor, "steps members batch"] = torch.randint(len(x), shape, generator=generator).to(x.device)
        for pick in picks:
            yield x[pick], y[pick]
