r"""Networks under the square loss as one scale times a normalised network: $f(x) = \rho\, f_V(x)$.

A network whose output is multiplied by $c > 0$ when the weights of any one layer are, is described by the product
$\rho$ of the Frobenius norms of its layers and by their directions $V_k$. Gradient flow on the square loss has an
equilibrium of $\rho$ that the normalised margins determine.
"""

import math
from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jvp

from corollary.base.errors import BadInput
from corollary.base.network import Inputs, Params, as_function, map_inputs
from corollary.evidence import Source

XU_2023 = Source(
    "xu2023dynamics",
    ("Mengjia Xu", "Akshay Rangamani", "Qianli Liao", "Tomer Galanti", "Tomaso Poggio"),
    "Dynamics in Deep Classifiers Trained with the Square Loss: Normalization, Low Rank, Neural Collapse, and "
    "Generalization Bounds",
    2023,
    doi="10.34133/research.0024",
    venue="Research",
)

_NORMALISING = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
_CHECKED = 4
"""Samples on which homogeneity is checked."""


class RhoModel(nn.Module):
    r"""A homogeneous network as $\rho\, f_V(x)$, with unit Frobenius norm of every weight of $f_V$.

    A module like any other: its parameters are `rho` and those of `net`, of which only the directions count. As a
    function it equals the network it was made of, which is copied and not written to.

    Args: `net`: without biases and normalisation, such as linear or convolutional layers with ReLU between them. What
        a bias does, a constant input does (`with_constant`).
    Attributes:
        rho: product of the Frobenius norms of all weights, a parameter.
        net: a copy of the network with every weight divided by its norm.
    Raises: BadInput, naming the layer that has a bias, normalises, or is zero.
    Source: Xu et al. 2023, doi 10.34133/research.0024.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        norms = _weight_norms(net)
        self.net = deepcopy(net)
        with torch.no_grad():
            for name, parameter in self.net.named_parameters():
                parameter.div_(norms[name])
        self.rho = nn.Parameter(torch.stack(list(norms.values())).prod())

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        r"""$\rho\, f_V(x)$."""
        return self.rho * functional_call(self.net, self.directions, inputs, named)

    @property
    def directions(self) -> dict[str, Tensor]:
        r"""$V_k$ by the network's own names, of unit Frobenius norm."""
        return {name: p / torch.linalg.vector_norm(p) for name, p in self.net.named_parameters()}

    @torch.no_grad()
    def normalised(self, x: Inputs) -> Float[Tensor, "sample output"]:
        """$f_V(x)$, without gradients; a network that returns `[n]` has one output.

        Raises: BadInput, naming the layer, if the network is not homogeneous of degree 1 in its weights.
        """
        refuse_other_degrees(self, x)
        return self._at(self.directions, x)

    def margins(self, x: Inputs, y: Tensor) -> Float[Tensor, "sample"]:
        r"""Normalised margins: $y f_V(x)$ for labels -1 and 1, $f_V(x)_y - \max_{c \ne y} f_V(x)_c$ for classes.

        Args: `y`: `[n]`, labels -1 and 1 for a network of one output, class indices for several; or target rows.
        """
        outputs = self.normalised(x)
        return margins_of(outputs, target_rows(y, outputs))

    def equilibrium(self, x: Inputs, y: Tensor, penalty: float) -> float:
        """The scale at which `rho` is stationary for these directions (see `equilibrium`); targets as for `margins`."""
        outputs = self.normalised(x)
        return float(equilibrium(outputs, target_rows(y, outputs), penalty))

    def homogeneity(self, x: Inputs) -> dict[str, Float[Tensor, "sample output"]]:
        r"""$\langle \partial f_V(x) / \partial V_k, V_k \rangle$ for each weight: by Euler's theorem, $f_V(x)$."""
        directions = {name: direction.detach() for name, direction in self.directions.items()}

        def derivative(name: str) -> Tensor:
            def function(direction: Tensor) -> Tensor:
                return self._at({**directions, name: direction}, x)

            return jvp(function, (directions[name],), (directions[name],))[1]

        return {name: derivative(name) for name in directions}

    def network(self) -> nn.Module:
        r"""A plain network of the same function: each of its $L$ weights has norm $\rho^{1/L}$.

        Raises: BadInput, if `rho` is not positive: no norms have such a product.
        """
        rho = float(self.rho.detach())
        if not rho > 0:
            raise BadInput(f"a product of norms is positive, but rho is {rho:.4g}: train with a smaller learning rate")
        plain, directions = deepcopy(self.net), self.directions
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(directions[name] * rho ** (1 / len(directions)))
        return plain

    def _at(self, weights: Params, x: Inputs) -> Tensor:
        outputs = as_function(self.net)(weights, x)
        return outputs[:, None] if outputs.ndim == 1 else outputs


def refuse_other_degrees(model: RhoModel, x: Inputs) -> None:
    """Raises: BadInput, naming the layer, if doubling its weights does not double the outputs on the first samples."""
    few, directions = map_inputs(lambda tensor: tensor[:_CHECKED], x), model.directions
    once = model._at(directions, few)
    if once.ndim != 2:
        raise BadInput(f"the network must return [n] or [n, outputs] to be described by one scale, got {once.shape}")
    for name, direction in directions.items():
        twice = model._at({**directions, name: 2 * direction}, few)
        if not torch.allclose(twice, 2 * once, rtol=1e-3, atol=1e-4 * float(once.abs().max())):
            ratio = float((twice * once).sum() / once.square().sum())
            raise BadInput(
                f"the network is not homogeneous in the weights of layer {_layer(name)!r}: doubling them multiplies "
                f"the outputs by {ratio:.3g} and not by 2. Residual sums, shared weights and activations other than "
                "ReLU-like ones cannot be described by one scale."
            )


def with_constant(x: Float[Tensor, "sample feature"]) -> Float[Tensor, "sample feature_and_one"]:
    """`x` with a last feature of 1, whose weights act as the biases of the first layer and keep it homogeneous."""
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def target_rows(y: Tensor, outputs: Float[Tensor, "sample output"]) -> Float[Tensor, "sample output"]:
    """Targets as the square loss takes them, a row a sample, in the kind of the outputs.

    Args: `y`: class indices `[n]` for several outputs (they become one-hot rows), labels -1 and 1 `[n]` for one; or
        rows already.
    Raises: BadInput, for targets of another form.
    """
    width = outputs.shape[1]
    if y.shape == outputs.shape and y.is_floating_point():
        return y.to(outputs)
    if y.ndim == 1 and len(y) == len(outputs):
        if width == 1 and bool((y.abs() == 1).all()):
            return y.to(outputs)[:, None]
        if width > 1 and not y.is_floating_point() and int(y.min()) >= 0 and int(y.max()) < width:
            return (y[:, None] == torch.arange(width, device=y.device)).to(outputs)
    raise BadInput(
        f"targets for outputs {list(outputs.shape)} are "
        + ("labels -1 and 1 [n]" if width == 1 else f"class indices [n] in 0..{width - 1}")
        + f", or rows of the outputs' shape; got {y.dtype} {list(y.shape)}"
        + (f" with values {y.unique().tolist()[:4]}" if y.ndim == 1 and width == 1 else "")
    )


def margins_of(
    outputs: Float[Tensor, "*member sample output"], rows: Float[Tensor, "sample output"]
) -> Float[Tensor, "*member sample"]:
    """The output of the target class less the largest other one; with one output, target times output."""
    if rows.shape[1] == 1:
        return (outputs * rows).squeeze(-1)
    own = rows.argmax(dim=1, keepdim=True).expand((*outputs.shape[:-1], 1))
    others = outputs.scatter(-1, own, -math.inf).amax(dim=-1)
    return outputs.gather(-1, own).squeeze(-1) - others


def equilibrium(
    outputs: Float[Tensor, "*member sample output"],
    targets: Float[Tensor, "sample output"],
    penalty: float | Float[Tensor, "*member"],
) -> Float[Tensor, "*member"]:
    r"""The stationary scale $\rho = \overline{\langle f_V, y \rangle} / (\lambda + \overline{\lVert f_V \rVert^2})$.

    With labels $y = \pm 1$ and margins $\bar f = y f_V$ it is $\overline{\bar f} / (\lambda + \overline{\bar f^2})$. Of
    all directions that fit the data, those of the largest margins have the smallest $\rho$.

    Args:
        outputs: $f_V(x)$ of the normalised network.
        targets: rows, see `target_rows`.
        penalty: $\lambda$ of $\frac1n \sum_i \lVert \rho f_V(x_i) - y_i \rVert^2 + \lambda \rho^2$, with a mean:
            where a paper sums over samples, its $\lambda$ is n times this one.
    Raises: BadInput, for a negative penalty.
    Source: Xu et al. 2023, the equilibrium of $\dot\rho$.
    """
    if bool((torch.as_tensor(penalty) < 0).any()):
        raise BadInput(f"the penalty on the squared scale is at least 0, got {penalty}")
    aligned = (outputs * targets).sum(-1).mean(-1)
    return aligned / (penalty + outputs.square().sum(-1).mean(-1))


def equal_margin_output(penalty: float, rho: float) -> float:
    r"""The output $z = \rho \bar f$ at equilibrium if all margins are equal: $(1 + \sqrt{1 - 4 \lambda \rho^2}) / 2$.

    Raises: BadInput, if $\lambda \rho^2 > 1/4$: no output is then an equilibrium.
    Source: Xu et al. 2023; the larger root of $z (1 - z) = \lambda \rho^2$.
    """
    product = penalty * rho**2
    if not 0 <= product <= 0.25:
        raise BadInput(
            f"equal margins have an equilibrium only for 0 <= penalty * rho^2 <= 1/4, got {penalty:g} * {rho:g}^2 = "
            f"{product:.4g}: take a smaller penalty or scale"
        )
    return (1 + math.sqrt(1 - 4 * product)) / 2


def _weight_norms(net: nn.Module) -> dict[str, Tensor]:
    for name, module in net.named_modules():
        if isinstance(module, _NORMALISING):
            raise BadInput(
                f"layer {name!r} ({type(module).__name__}) normalises, which makes the norms of the weights before it "
                "irrelevant: a description by one scale needs a network without normalisation layers"
            )
    norms: dict[str, Tensor] = {}
    for name, parameter in net.named_parameters():
        if name.rpartition(".")[2].startswith("bias") or parameter.ndim < 2:
            raise BadInput(
                f"layer {_layer(name)!r} has a bias or another vector of parameters ({name!r}, "
                f"{list(parameter.shape)}), so the network is not homogeneous: build it with bias=False and append a "
                "constant input (with_constant)"
            )
        norms[name] = torch.linalg.vector_norm(parameter.detach())
        if not bool(norms[name] > 0):
            raise BadInput(f"the weights {name!r} are all zero or not finite: they have no direction")
    if not norms:
        raise BadInput("the network has no weights")
    return norms


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter
