"""The window of catapults: from 2 to 4 over the top eigenvalue of the tangent kernel; the weight norm's exact step."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import Inputs, Params, as_function, batch_length, parameters_of
from corollary.base.seeds import Seeds
from corollary.dynamics.losses import half_square
from corollary.linalg import eigenpairs, ggn

HOMOGENEOUS = 1e-4
"""Relative difference up to which doubled weights may miss four times the outputs: float32 networks pass."""


class Window(NamedTuple):
    """Learning rates: below `lower` the lazy phase, up to `upper` catapults, both for the square loss."""

    lower: float
    upper: float


class WeightNormStep(NamedTuple):
    """One step of gradient descent as the squared weight norm sees it.

    Fields:
        change: of the squared norm, from the weights before and after the step.
        predicted: the identity's value, which it equals exactly.
        bound: the identity with the kernel's top eigenvalue in place of the kernel, which it does not exceed.
        kernel: that eigenvalue.
    """

    change: float
    predicted: float
    bound: float
    kernel: float


def ntk_lambda(net: nn.Module, x: Inputs, *, tolerance: float = 1e-6) -> float:
    r"""The top eigenvalue of the normalised tangent kernel $K = J J^\top / n$, over all outputs of all samples.

    By Lanczos on the matrix of the same nonzero spectrum, $J^\top J / n$, the Gauss-Newton matrix of `half_square`:
    no kernel is formed, so that many samples and outputs are no obstacle.

    Args:
        net: any module, in evaluation mode where it normalises over batches.
        x: inputs of n samples.
        tolerance: of the eigenvalue's residual, relative; its own error is of the square.
    Raises: BadInput, for no samples, or as `linalg.ggn`.
    Source: Jacot et al. 2018, arXiv:1806.07572; normalised as in Meltzer et al. 2023, arXiv:2301.07737.
    """
    if batch_length(x) == 0:
        raise BadInput("the tangent kernel of no samples is empty: give at least one input")
    with torch.no_grad():
        targets = torch.zeros_like(as_function(net)(parameters_of(net), x))
    operator = ggn(net, half_square, (x, targets))
    found = eigenpairs(operator, 1, tolerance=tolerance, generator=Seeds(0)("start of Lanczos"))
    return float(found.values[0])


def learning_rate_window(net: nn.Module, x: Inputs) -> Window:
    r"""$(2/\lambda,\, 4/\lambda)$ at the present weights, for full batches of `half_square`.

    Between the two, quadratic models and two-layer homogeneous networks provably catapult and converge; ReLU networks
    may converge above the upper end as well. Arguments and errors as for `ntk_lambda`.

    Raises: BadInput also where the kernel is zero (a dead network), which has no window.
    """
    top = ntk_lambda(net, x)
    if not top > 0:
        raise BadInput(
            f"the top eigenvalue of the tangent kernel is {top:g}: the network does not react to its weights "
            "(all units dead?), and every learning rate leaves it where it is"
        )
    return Window(2 / top, 4 / top)


def weight_norm_step(
    net: nn.Module, x: Inputs, targets: Tensor, learning_rate: int | float, *, check: bool = True
) -> WeightNormStep:
    r"""What one step of gradient descent on `half_square` does to the squared weight norm of a degree-2 network.

    Where outputs are homogeneous of degree 2, $\theta \cdot \nabla z = 2 z$, and with $\epsilon = z - y$ exactly
    $\lVert \theta' \rVert^2 - \lVert \theta \rVert^2 = -\frac{4 \eta}{n} \epsilon^\top z
    + \frac{\eta^2}{n} \epsilon^\top K \epsilon$, at most the same with $\lambda \lVert \epsilon \rVert^2$ at the end:
    for y = 0 at most $\frac{\eta}{n} \lVert z \rVert^2 (\eta \lambda - 4)$, negative below $\eta = 4 / \lambda$.

    Args:
        net: a module whose outputs are homogeneous of degree 2 in its trainable parameters; it is not written to.
        targets: shaped like the outputs.
        check: whether to test homogeneity, by doubling the weights.
    Raises: BadInput, for a network that is not homogeneous of degree 2, unless `check` is False.
    Source: Meltzer et al. 2023, arXiv:2301.07737, the weight norm of quadratic and two-layer homogeneous networks.
    """
    function = as_function(net)
    params = {name: p.requires_grad_() for name, p in parameters_of(net).items()}
    outputs = function(params, x)
    if check:
        refuse_inhomogeneous(net, x, outputs.detach())
    gradients = torch.autograd.grad(half_square(outputs, targets), list(params.values()))
    change = 0.0
    for p, g in zip(params.values(), gradients, strict=True):
        before = p.detach()
        after = before - learning_rate * g
        # The difference of two squares, without the loss of digits of two large sums.
        change += float(((after - before) * (after + before)).sum())
    z = outputs.detach().reshape(-1)
    residual = z - targets.reshape(-1)
    n = batch_length(x)
    pull = -4 * learning_rate / n * float(residual @ z)
    # n |grad L|^2 is the kernel's form of the residuals: the gradient is J' residual / n.
    push = learning_rate**2 * sum(float(g.square().sum()) for g in gradients)
    top = ntk_lambda(net, x)
    bound = pull + learning_rate**2 * top / n * float(residual @ residual)
    return WeightNormStep(change, pull + push, bound, top)


def refuse_inhomogeneous(net: nn.Module, x: Inputs, outputs: Float[Tensor, "..."]) -> None:
    """Raises: BadInput, unless doubling the trainable parameters of `net` makes its `outputs` on `x` fourfold."""
    doubled: Params = {name: 2 * p for name, p in parameters_of(net).items()}
    with torch.no_grad():
        found = as_function(net)(doubled, x)
    missed = float((found - 4 * outputs).abs().max())
    if missed > HOMOGENEOUS * float(4 * outputs.abs().max()):
        raise BadInput(
            "the identity of the weight norm needs outputs homogeneous of degree 2 in the weights: doubled weights "
            f"should give four times the outputs, and miss that by up to {missed:.3g} (biases? another depth? a layer "
            "that normalises?). Pass check=False to see by how much the identity fails."
        )
