"""Models whose outputs are quadratic in their weights: the uv recursion, random forms, two layers, Taylor models."""

import math
from copy import deepcopy
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, jvp

from corollary.base.errors import BadInput
from corollary.base.network import Params, parameters_of
from corollary.base.seeds import Seeds
from corollary.evidence import Source
from corollary.linalg import ParameterSpace

MELTZER_2023 = Source(
    key="meltzer2023",
    authors=("David Meltzer", "Min Chen", "Junyu Liu"),
    title="Catapult dynamics and phase transitions in quadratic nets",
    year=2023,
    arxiv="2301.07737",
)
LEWKOWYCZ_2020 = Source(
    key="lewkowycz2020",
    authors=("Aitor Lewkowycz", "Yasaman Bahri", "Ethan Dyer", "Jascha Sohl-Dickstein", "Guy Gur-Ari"),
    title="The large learning rate phase of deep learning: the catapult mechanism",
    year=2020,
    arxiv="2003.02218",
)
ZHU_2022 = Source(
    key="zhu2022quadratic",
    authors=("Libin Zhu", "Chaoyue Liu", "Adityanarayanan Radhakrishnan", "Mikhail Belkin"),
    title="Quadratic models for understanding catapult dynamics of neural networks",
    year=2022,
    arxiv="2205.11787",
)

Number = int | float | Tensor
"""One number, or a tensor of them that broadcasts with the others."""


class UVPath(NamedTuple):
    """Outputs and kernels after 0, 1, ... steps, each `[steps + 1, ...]`."""

    outputs: Float[Tensor, "step ..."]
    kernels: Float[Tensor, "step ..."]


@final
class UVRecursion:
    r"""Gradient descent on the uv network $z = \frac{1}{\sqrt m} \sum_i u_i v_i$ at one sample, in two variables.

    With $\epsilon = z - y$ and $\lambda = (\lVert u \rVert^2 + \lVert v \rVert^2)/m$, a step at rate $\eta$ is exactly
    $z' = z - \eta \lambda \epsilon + \eta^2 \epsilon^2 z / m$ and
    $\lambda' = \lambda - 4 \eta \epsilon z / m + \eta^2 \epsilon^2 \lambda / m$.

    Args:
        width: m, the number of hidden units.
        target: y.
    Raises: BadInput, for a width below 1.
    Source: Lewkowycz et al. 2020, arXiv:2003.02218, section 2; Meltzer et al. 2023, arXiv:2301.07737.
    """

    def __init__(self, width: int, target: int | float = 0.0):
        if width < 1:
            raise BadInput(f"a uv network has 1 or more hidden units, got width={width}")
        self.width, self.target = width, float(target)

    def run(self, output: Number, kernel: Number, learning_rate: Number, steps: int) -> UVPath:
        """The path from an output z_0 and a kernel value, for all combinations that the three broadcast to.

        Values that have diverged go on to infinity and NaN. Computed in float64.

        Raises: BadInput, for a negative number of steps.
        """
        if steps < 0:
            raise BadInput(f"the recursion makes 0 or more steps, got steps={steps}")
        z, kappa, rate = torch.broadcast_tensors(
            *(torch.as_tensor(value, dtype=torch.float64) for value in (output, kernel, learning_rate))
        )
        outputs, kernels = [z], [kappa]
        for _ in range(steps):
            step = rate * (z - self.target)
            z, kappa = (
                z - step * kappa + step.square() * z / self.width,
                kappa - 4 * step * z / self.width + step.square() * kappa / self.width,
            )
            outputs.append(z)
            kernels.append(kappa)
        return UVPath(torch.stack(outputs), torch.stack(kernels))


@final
class PureQuadratic(nn.Module):
    r"""Sample $\alpha$ has the output $z_\alpha = \frac12 \theta^\top \Psi_\alpha \theta$: no linear term, no inputs.

    The forms are random, symmetric, with entries of variance 1/p^2, so that outputs and tangent kernel are of order 1
    at weights $\theta \sim N(0, I)$. Its inputs are indices of samples: `model(torch.arange(n))`.

    Args:
        samples: n. weights: p.
        zero_trace: subtract from each form its trace over p, so that outputs have mean zero.
        seed: of the forms; the weights are drawn from PyTorch's default generator.
    Raises: BadInput, for sizes below 1.
    Source: Meltzer et al. 2023, arXiv:2301.07737, section on quadratic models.
    """

    forms: Tensor

    def __init__(
        self,
        samples: int,
        weights: int,
        zero_trace: bool = True,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ):
        super().__init__()
        if samples < 1 or weights < 1:
            raise BadInput(f"a quadratic model has 1 or more samples and weights, got {samples} and {weights}")
        drawn = torch.randn(samples, weights, weights, generator=Seeds(seed)("quadratic forms"), dtype=dtype)
        forms = (drawn + drawn.mT) / (math.sqrt(2) * weights)
        if zero_trace:
            trace = forms.diagonal(dim1=1, dim2=2).mean(1)
            forms = forms - trace[:, None, None] * torch.eye(weights, dtype=dtype)
        self.register_buffer("forms", forms)
        self.theta = nn.Parameter(torch.randn(weights, dtype=dtype))

    def forward(self, index: Int[Tensor, "sample"]) -> Float[Tensor, "sample"]:
        """Outputs of the samples of these indices."""
        return 0.5 * ((self.forms @ self.theta)[index] * self.theta).sum(-1)


@final
class HomogeneousNet(nn.Module):
    r"""Two layers without biases, both trained: $z = \frac{1}{\sqrt m} \sum_i u_i\, \sigma(v_i^\top x / \sqrt d)$.

    The activation is max(t, slope t): ReLU at slope 0, leaky ReLU between, linear at 1 (with one input of value 1, the
    uv network). Then outputs are homogeneous of degree 2 in the weights, which start as $N(0, 1)$.

    Args:
        inputs: d. width: m.
        slope: of the activation below 0, in [0, 1].
    Raises: BadInput, for sizes below 1 or a slope outside [0, 1].
    Source: Meltzer et al. 2023, arXiv:2301.07737, section on two-layer homogeneous nets.
    """

    def __init__(self, inputs: int, width: int, slope: int | float = 0.0, dtype: torch.dtype = torch.float64):
        super().__init__()
        if inputs < 1 or width < 1 or not 0 <= slope <= 1:
            raise BadInput(
                f"a two-layer network has 1 or more inputs and units and a slope in [0, 1], got inputs={inputs}, "
                f"width={width}, slope={slope}"
            )
        self.activation = nn.Identity() if slope == 1 else nn.LeakyReLU(float(slope))
        self.inner = nn.Parameter(torch.randn(width, inputs, dtype=dtype))
        self.outer = nn.Parameter(torch.randn(width, dtype=dtype))

    def forward(self, x: Float[Tensor, "sample input"]) -> Float[Tensor, "sample"]:
        """Outputs, one a sample."""
        width, inputs = self.inner.shape
        # Weights first: for many networks on shared inputs that is one large product, several times faster.
        hidden = self.activation(self.inner @ (x.mT / math.sqrt(inputs)))
        return self.outer @ hidden / math.sqrt(width)


class TangentState(NamedTuple):
    """What decides the next step of a two-layer network, for each set of weights.

    Fields:
        outputs: `[..., n]`. kernel: J J' / n, `[..., n, n]`.
        active: the share of (unit, sample) pairs with a positive input to the activation, `[...]`.
        dead: the share of units that are active on no sample, `[...]`.
    """

    outputs: Float[Tensor, "... sample"]
    kernel: Float[Tensor, "... sample sample"]
    active: Float[Tensor, "..."]
    dead: Float[Tensor, "..."]


def homogeneous_state(params: Params, x: Float[Tensor, "sample input"], slope: int | float = 0.0) -> TangentState:
    r"""Outputs and tangent kernel of `HomogeneousNet`s in closed form, with any leading axes on the weights.

    $n m K_{\alpha\beta} = \sigma_\alpha \cdot \sigma_\beta + \frac{x_\alpha \cdot x_\beta}{d} \sum_i u_i^2
    \sigma'_{i\alpha} \sigma'_{i\beta}$, with $\sigma'(0)$ the slope, as in PyTorch.

    Args:
        params: `inner` `[..., m, d]` and `outer` `[..., m]`.
        x: inputs, shared.
        slope: of the activation below 0.
    """
    inner, outer = params["inner"], params["outer"]
    width, inputs = inner.shape[-2:]
    before = x @ inner.mT / math.sqrt(inputs)
    hidden = F.leaky_relu(before, slope)
    positive = before > 0
    derivative = slope + (1 - slope) * positive.to(before.dtype)
    through_inner = (derivative * outer.square()[..., None, :]) @ derivative.mT * (x @ x.mT / inputs)
    return TangentState(
        outputs=(hidden @ outer[..., None])[..., 0] / math.sqrt(width),
        kernel=(hidden @ hidden.mT + through_inner) / (width * len(x)),
        active=positive.to(before.dtype).mean((-2, -1)),
        dead=(~positive.any(-2)).to(before.dtype).mean(-1),
    )


@final
class QuadraticModel(nn.Module):
    r"""The second-order Taylor model of a network in its weights, $z(\delta) = z_0 + J \delta + \frac12 \delta^\top H
    \delta$, at any inputs, trained through its displacement $\delta$.

    `QuadraticModel(net)` starts at `net`, which is copied and never written to; its own weights are the expansion
    point, its displacement (one flat vector) is the only parameter. No matrix is formed: derivatives are directional.

    Args: `net`: any module that can be differentiated twice in forward mode; it is held in evaluation mode.
    Raises: BadInput, if `net` has no trainable parameters.
    Source: Zhu et al. 2022, arXiv:2205.11787, equation of the neural quadratic model.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        origin = parameters_of(net)
        self._space = ParameterSpace.of(origin)
        self.origin = deepcopy(net).requires_grad_(False).eval()
        first = next(iter(origin.values()))
        self.displacement = nn.Parameter(torch.zeros(self._space.size, dtype=first.dtype, device=first.device))

    @classmethod
    def from_module(cls, net: nn.Module) -> "QuadraticModel":
        """The Taylor model of `net` at its present weights."""
        return cls(net)

    def train(self, mode: bool = True) -> "QuadraticModel":
        """Training changes the displacement alone: the network it expands stays in evaluation mode."""
        super().train(mode)
        self.origin.eval()
        return self

    def forward(self, *inputs: Tensor) -> Tensor:
        """Outputs of the Taylor model, shaped like the network's."""
        # Read here and not kept: a caller may stand other tensors in for these, as `functional_call` does.
        held = dict(self.origin.named_parameters())
        point = {name: held[name] for name in self._space.names}
        direction = self._space.unflatten(self.displacement)

        def outputs(params: Params) -> Tensor:
            return functional_call(self.origin, dict(params), inputs)

        def slope(params: Params) -> tuple[Tensor, Tensor]:
            value, first, *_ = jvp(outputs, (params,), (direction,))
            return value, first

        (value, first), (_, second), *_ = jvp(slope, (point,), (direction,))
        return value + first + 0.5 * second


def sphere_points(samples: int, inputs: int, generator: torch.Generator) -> Float[Tensor, "sample input"]:
    """Uniform points on the sphere of radius the root of the dimension, in float64."""
    drawn = torch.randn(samples, inputs, generator=generator, dtype=torch.float64)
    return drawn * (math.sqrt(inputs) / drawn.norm(dim=1, keepdim=True))
