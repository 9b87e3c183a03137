"""Learning rate and momentum read off the spectrum of the batch Hessian while a network trains."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.base.network import Inputs, Params
from corollary.base.seeds import Seeds
from corollary.linalg import SYMMETRIC, Operator, SpectralDensity, spectral_density
from corollary.linalg.linearise import LossGradient, twice_differentiable

PRODUCT_COST = 2.0
"""Gradients of the same batch that one Hessian-vector product counts for: it walks the graph of a gradient, which holds
twice the operations of the loss's own, and the graph itself is one more gradient."""


class HeavyBall(NamedTuple):
    """Settings of gradient descent with heavy-ball momentum, as `torch.optim.SGD` takes them."""

    learning_rate: float
    momentum: float


def heavy_ball_from_spectrum(density: SpectralDensity, weight_decay: float = 0.0) -> HeavyBall:
    r"""Polyak's learning rate and momentum for curvatures between $\mu$ and L.

    $\alpha = (2 / (\sqrt L + \sqrt\mu))^2$, $\beta = ((\sqrt L - \sqrt\mu) / (\sqrt L + \sqrt\mu))^2$, which shrink the
    error of a quadratic by $\sqrt\beta$ a step, the best that fixed settings can. L is the largest magnitude of a node,
    with the weight decay; $\mu$ the larger of the weight decay and the mean magnitude of an eigenvalue.

    Args:
        density: of the Hessian of the loss without weight decay.
        weight_decay: as PyTorch's optimizers take it: it adds itself to every eigenvalue.
    Raises: BadInput, if the curvature is zero everywhere, or the weight decay negative.
    Source: Polyak 1964; in this use Granziol, Zohren and Roberts 2022, arXiv 2006.09092. The choice of $\mu$ is ours.
    """
    return _polyak(*_curvatures(density, weight_decay))


def _curvatures(density: SpectralDensity, weight_decay: float) -> tuple[float, float]:
    """The smallest and the largest curvature to reckon with."""
    if not weight_decay >= 0:
        raise BadInput(f"weight decay is at least 0; got {weight_decay}")
    largest = float(density.nodes.abs().max()) + weight_decay
    if not 0 < largest < math.inf:
        raise BadInput(f"a learning rate needs curvature above 0 and finite; the spectrum's largest is {largest}")
    return min(largest, max(weight_decay, density.mean(torch.abs).value)), largest


def _polyak(smallest: float, largest: float) -> HeavyBall:
    above, below = math.sqrt(largest) + math.sqrt(smallest), math.sqrt(largest) - math.sqrt(smallest)
    return HeavyBall((2 / above) ** 2, (below / above) ** 2)


@final
class LearningRateLearner(torch.optim.SGD):
    r"""Heavy-ball SGD that sets its own learning rate and momentum from the spectrum of the batch Hessian.

    Every `every` steps a few Lanczos steps on the Hessian of the current batch give Polyak's settings. In a loop of
    your own, with a closure that returns the loss and leaves `backward` to the optimizer:

        optimizer = LearningRateLearner(net.parameters())
        for x, y in loader:
            optimizer.step(lambda: loss(net(x), y))

    or with your own backward pass, and `refresh` where it is due:

        if optimizer.due:
            optimizer.refresh(lambda: loss(net(x), y))
        optimizer.zero_grad()
        loss(net(x), y).backward()
        optimizer.step()

    The loss is evaluated once for a refresh and its graph kept, so that dropout masks and batch statistics are the same
    in all products. The settings are in `param_groups` ("lr", "momentum"), and everything is in `state_dict`.

    Args:
        params: parameters, or groups of them, as any PyTorch optimizer takes; all share one learning rate.
        every: steps from one look at the spectrum to the next.
        steps: Lanczos steps, one product each. probes: random vectors, each with so many steps.
        weight_decay: as for `torch.optim.SGD`.
        scale: factor on Polyak's rate, which by itself lies at the edge of stability, where sharpness rises.
        memory: weight of what was seen before, in logarithms, where curvature falls; a rise counts at once. The
            defaults are for small batches, the sharpest of which set the limit; where every step sees all data,
            `scale=0.5, memory=0.25` follow the curvature more closely.
        seed: of the random vectors.
    Raises: BadInput, for settings out of their range.
    Source: Granziol, Zohren and Roberts 2022, arXiv 2006.09092; `scale` and `memory` are ours.
    """

    def __init__(
        self,
        params: Any,
        *,
        every: int = 20,
        steps: int = 4,
        probes: int = 1,
        weight_decay: float = 0.0,
        scale: float = 0.25,
        memory: float = 0.95,
        seed: int = 0,
    ):
        if min(every, steps, probes) < 1:
            raise BadInput(f"every, steps and probes are at least 1; got {every}, {steps}, {probes}")
        if not (scale > 0 and 0 <= memory < 1):
            raise BadInput(f"scale is above 0 and memory in [0, 1); got {scale} and {memory}")
        super().__init__(params, lr=0.0, momentum=0.0, weight_decay=weight_decay)
        self.every, self.steps, self.probes, self.seed = every, steps, probes, seed
        self.scale, self.memory = scale, memory
        for group in self.param_groups:  # in the groups, so that a state dict carries them
            group.update(since=every, refreshes=0, products=0, curvatures=(0.0, 0.0))

    @property
    def due(self) -> bool:
        """Whether it is time to look at the spectrum again."""
        return self.param_groups[0]["since"] >= self.every

    @property
    def settings(self) -> HeavyBall:
        """The current learning rate and momentum; the rate is 0 before the first refresh."""
        return HeavyBall(self.param_groups[0]["lr"], self.param_groups[0]["momentum"])

    @property
    def products(self) -> int:
        """Hessian-vector products so far."""
        return self.param_groups[0]["products"]

    @property
    def extra_gradients(self) -> float:
        """What looking has cost so far, in gradients of a batch: `PRODUCT_COST` a product and one for each graph."""
        return PRODUCT_COST * self.products + self.param_groups[0]["refreshes"]

    def refresh(self, loss: Callable[[], Tensor]) -> HeavyBall:
        """Measure the spectrum of the Hessian of `loss()` and set learning rate and momentum by it.

        Args: `loss`: evaluates the mean loss of one batch, with its graph; it is called once.
        Raises: BadInput, if the loss is not one number with a graph, or its curvature is zero or not finite.
        """
        first = self.param_groups[0]
        generator = Seeds(self.seed)(f"probe {first['refreshes']}")
        density = spectral_density(self._hessian(loss), self.steps, self.probes, generator=generator)
        if first["refreshes"] and not bool(density.nodes.any()):
            curvatures = first["curvatures"]  # a loss that is flat to the last digit teaches nothing
        else:
            seen = _curvatures(density, first["weight_decay"])
            curvatures = tuple(
                max(now, before**self.memory * now ** (1 - self.memory))
                for now, before in zip(seen, first["curvatures"], strict=True)
            )
        rate, momentum = _polyak(*curvatures)
        for group in self.param_groups:
            group.update(lr=self.scale * rate, momentum=momentum, since=0, curvatures=curvatures)
            group["refreshes"] += 1
            group["products"] += density.products
        return self.settings

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]  # the loss itself
        """Update the parameters; with a closure also compute their gradients, and look at the spectrum when due.

        Args: `closure`: returns the loss of the batch with its graph, without calling `backward`.
        Returns: the loss of the closure.
        Raises: BadInput, without a closure before the first `refresh`; with a closure that calls `backward` itself.
        """
        loss = None
        if closure is not None:
            if self.due:
                self.refresh(closure)
            self.zero_grad()
            with torch.enable_grad():
                loss = closure()
                _backward(loss)
        elif not self.param_groups[0]["refreshes"]:
            raise BadInput("there is no learning rate yet: call refresh(lambda: loss) first, or step(closure)")
        super().step()
        for group in self.param_groups:
            group["since"] += 1
        return None if loss is None else loss.detach()

    def _hessian(self, loss: Callable[[], Tensor]) -> Operator:
        """The Hessian of `loss()` in all parameters that are trained."""
        trained = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        leaves = {str(i): p for i, p in enumerate(trained)}
        if not leaves:
            raise BadInput("no parameter requires a gradient")
        if len({(p.dtype, p.device) for p in trained}) > 1:
            raise BadInput("the parameters must share dtype and device to form one vector; use net.to(...)")

        def net(params: Params, inputs: Inputs) -> Tensor:
            return loss()

        # The loss is its own network here: LossGradient keeps the graph of the gradient between products.
        nothing = torch.empty(0)
        try:
            gradient = LossGradient(twice_differentiable(net), lambda value, _: value, leaves, nothing, nothing)
        except RuntimeError as error:
            raise _own_backward(error) from error
        names, size = list(leaves), sum(p.numel() for p in trained)

        def matmat(columns: Tensor) -> Tensor:
            return gradient.hessian(names, columns.T).T

        return Operator((size, size), matmat, None, {SYMMETRIC}, trained[0].dtype, trained[0].device)


def _backward(loss: Tensor) -> None:
    try:
        loss.backward()
    except RuntimeError as error:
        raise _own_backward(error) from error


def _own_backward(error: RuntimeError) -> Exception:
    if "second time" in str(error):
        return BadInput("the closure called backward itself: let it return the loss only, the optimizer differentiates")
    return error
