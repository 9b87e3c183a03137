r"""The solvable model of opposing signals: a two-layer linear network, and one feature that says two things.

$f(x) = c\, b^\top x$ on inputs with a signal $x_s \sim N(0, I)$ and one opposing coordinate $x_o = \pm\sqrt\alpha$, the
sign a fair coin; the target is $\beta^\top x_s + |x_o|$. No linear network fits $|x_o|$: the two signs of $x_o$ are two
groups that pull $b_o$ in opposite directions. Up to the constant $\alpha / 2$ the population loss is
$L = \frac12 (\lVert c b_s - \beta \rVert^2 + \alpha c^2 b_o^2)$.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.progress import track

Numbers = int | float | Sequence[int] | Sequence[float] | Tensor


@final
@dataclass(frozen=True)
class OpposingPath:
    """A path of the model's weights, with what follows from them.

    Args:
        times: of flow, or numbers of steps of gradient descent, [time].
        signal: $b_s$, [time, member, d]; opposing: $b_o$; c: the second layer, both [time, member].
    """

    model: "OpposingLinearModel"
    times: Float[Tensor, "time"]
    signal: Float[Tensor, "time member d"]
    opposing: Float[Tensor, "time member"]
    c: Float[Tensor, "time member"]

    @property
    def _misfit(self) -> Float[Tensor, "time member"]:
        return (self.c[..., None] * self.signal - self.model.beta).square().sum(dim=-1)

    @property
    def loss(self) -> Float[Tensor, "time member"]:
        """Population loss, up to its constant."""
        return (self._misfit + self.model.alpha * (self.c * self.opposing).square()) / 2

    @property
    def group_losses(self) -> tuple[Float[Tensor, "time member"], Float[Tensor, "time member"]]:
        r"""$L_\pm = \frac12 (\lVert c b_s - \beta \rVert^2 + \alpha (\pm c b_o - 1)^2)$ of the two signs of $x_o$."""
        pulled = self.c * self.opposing
        plus, minus = ((self._misfit + self.model.alpha * (sign * pulled - 1).square()) / 2 for sign in (1, -1))
        return plus, minus

    @property
    def sharpness(self) -> Float[Tensor, "time member"]:
        r"""Curvature along $b_o$, $S = \alpha c^2$; at a minimum with $\alpha > 2$ the largest eigenvalue."""
        return self.model.alpha * self.c.square()

    @property
    def conserved(self) -> Float[Tensor, "time member"]:
        r"""$\Delta = c^2 - \lVert b_s \rVert^2 - b_o^2$, which gradient flow keeps."""
        return self.c.square() - self.signal.square().sum(dim=-1) - self.opposing.square()

    @property
    def hessian(self) -> Float[Tensor, "time member p p"]:
        """Hessian of the population loss by $(b_s, b_o, c)$, p = d + 2."""
        d = self.signal.shape[-1]
        matrix = self.signal.new_zeros(*self.c.shape, d + 2, d + 2)
        curvature = self.c.square()
        matrix[..., range(d), range(d)] = curvature[..., None]
        matrix[..., d, d] = self.model.alpha * curvature
        matrix[..., -1, -1] = self.signal.square().sum(dim=-1) + self.model.alpha * self.opposing.square()
        across = torch.cat(
            [
                2 * self.c[..., None] * self.signal - self.model.beta,
                (2 * self.model.alpha * self.c * self.opposing)[..., None],
            ],
            dim=-1,
        )
        matrix[..., -1, :-1] = across
        matrix[..., :-1, -1] = across
        return matrix

    def alternation(self) -> Float[Tensor, "member"]:
        """Share of consecutive times between which the group of larger loss changes; differences that rounding
        swallows count as no difference."""
        plus, minus = self.group_losses
        sign = (plus - minus).sign()
        return (sign[1:] * sign[:-1] < 0).to(sign.dtype).mean(dim=0)


@final
class OpposingLinearModel:
    """Two-layer linear networks at their initial weights, one or several at once; in float64.

    Args:
        alpha: variance of the opposing coordinate, a number or one per member.
        beta: weights of the true signal: a number, [d], or [member, d].
        c0: second layer, a number or one per member.
        b0: first layer, (on the signal, on the opposing coordinate): the first a number or shaped like `beta`, the
            second a number or one per member.
    Raises: BadInput, if alpha is not positive, a value is not finite, or the members do not agree in number.
    Source: Rosenfeld and Risteski 2024, arXiv:2311.04163, section 3.
    """

    def __init__(self, alpha: Numbers, beta: Numbers, c0: Numbers, b0: tuple[Numbers, Numbers]):
        each = {"alpha": _tensor(alpha), "c0": _tensor(c0), "b0[1]": _tensor(b0[1])}
        shared = {"beta": _tensor(beta), "b0[0]": _tensor(b0[0])}
        if any(tensor.ndim > 1 for tensor in each.values()) or any(tensor.ndim > 2 for tensor in shared.values()):
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in {**each, **shared}.items())
            raise BadInput(
                f"alpha, c0 and b0[1] are numbers or [member], beta and b0[0] up to [member, d]; got {shapes}"
            )
        try:
            columns = [tensor.reshape(-1, 1) for tensor in each.values()]
            rows = [torch.atleast_2d(tensor) for tensor in shared.values()]
            tensors = torch.broadcast_tensors(*rows, *columns)
        except RuntimeError as error:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in {**each, **shared}.items())
            raise BadInput(f"the members do not agree in number: {shapes}") from error
        if not all(bool(tensor.isfinite().all()) for tensor in tensors) or not bool((tensors[2] > 0).all()):
            raise BadInput("the model needs finite weights and a positive alpha")
        self.beta, self.signal = tensors[0].contiguous(), tensors[1].contiguous()
        self.alpha, self.c, self.opposing = (tensor[:, 0].contiguous() for tensor in tensors[2:])

    def sharpness(self) -> Float[Tensor, "member"]:
        r"""Curvature along $b_o$ at the start, $\alpha c_0^2$."""
        return self.alpha * self.c.square()

    def sharpness_limit(self) -> Float[Tensor, "member"]:
        r"""Where gradient flow ends: $S_\infty = \alpha (\Delta_0 + \sqrt{\Delta_0^2 + 4 \lVert\beta\rVert^2}) / 2$.

        There $c b_s = \beta$, $b_o = 0$, and $\Delta_0 = c^2 - \lVert b_s \rVert^2 - b_o^2$ is what it was. For small
        balanced weights about $\alpha \lVert\beta\rVert$: a stronger signal ends sharper.
        """
        conserved = self._path(torch.zeros(1), self._state()[None]).conserved[0]
        return self.alpha * (conserved + (conserved.square() + 4 * self.beta.square().sum(dim=-1)).sqrt()) / 2

    def flow(self, times: Numbers, *, tolerance: float = 1e-10) -> OpposingPath:
        """Gradient flow, integrated to a relative `tolerance` (Dormand and Prince, order 8).

        Args: `times`: one or several, from 0 on, ascending.
        Raises: BadInput, for times that are negative or out of order.
        """
        at = _tensor(times).reshape(-1)
        if not len(at) or float(at[0]) < 0 or bool((at.diff() < 0).any()):
            raise BadInput(f"flow is asked for at ascending times from 0 on, got {at.tolist()}")
        start = self._state()

        def velocity(_: float, flat: np.ndarray) -> np.ndarray:
            return -self._gradient(torch.from_numpy(flat).reshape(start.shape)).reshape(-1).numpy()

        span = (0.0, max(float(at[-1]), 1e-12))
        options = {"rtol": tolerance, "atol": 1e-2 * tolerance, "t_eval": at.numpy()}
        solved = solve_ivp(velocity, span, start.reshape(-1).numpy(), method="DOP853", **options)
        return self._path(at, torch.from_numpy(solved.y.T.copy()).reshape(-1, *start.shape))

    def gradient_descent(self, learning_rate: Numbers, steps: int, *, every: int = 1) -> OpposingPath:
        """Gradient descent on the population loss; with a small rate, Euler's method for the flow.

        Args:
            learning_rate: a number or one per member.
            every: how many steps between two points of the path; it also holds the start, and the end if `every`
                divides `steps`.
        """
        if steps < 1 or every < 1:
            raise BadInput(
                f"a path has 1 or more steps, kept every 1, 2, ... of them; got steps={steps}, every={every}"
            )
        rate = _tensor(learning_rate).reshape(-1, 1)
        state = self._state()
        kept = state.new_empty(steps // every + 1, *state.shape)
        kept[0] = state
        for step in track(range(1, steps + 1), "steps of gradient descent"):
            state = torch.addcmul(state, rate, self._gradient(state), value=-1)
            if step % every == 0:
                kept[step // every] = state
        return self._path(every * torch.arange(len(kept), dtype=torch.float64), kept)

    def network(self, member: int = 0) -> nn.Sequential:
        """A member as two linear layers without bias, for inputs [n, d + 1] such as `opposing_data` draws."""
        first = torch.cat([self.signal[member], self.opposing[member, None]])
        layers = nn.Sequential(nn.Linear(len(first), 1, bias=False), nn.Linear(1, 1, bias=False)).double()
        layers.load_state_dict({"0.weight": first[None], "1.weight": self.c[member].reshape(1, 1)})
        return layers

    def _state(self) -> Float[Tensor, "member p"]:
        return torch.cat([self.signal, self.opposing[:, None], self.c[:, None]], dim=1)

    def _gradient(self, state: Float[Tensor, "member p"]) -> Float[Tensor, "member p"]:
        first, c = state[:, :-1], state[:, -1:]
        pull = torch.addcmul(self._minus_target, c, first) * self._variance
        return torch.cat([c * pull, (first * pull).sum(dim=1, keepdim=True)], dim=1)

    @cached_property
    def _minus_target(self) -> Float[Tensor, "member inputs"]:
        return nn.functional.pad(-self.beta, (0, 1))

    @cached_property
    def _variance(self) -> Float[Tensor, "member inputs"]:
        return torch.cat([torch.ones_like(self.beta), self.alpha[:, None]], dim=1)

    def _path(self, times: Float[Tensor, "time"], states: Float[Tensor, "time member p"]) -> OpposingPath:
        return OpposingPath(self, times, states[..., :-2], states[..., -2], states[..., -1])


def opposing_data(
    n: int, beta: Numbers, alpha: int | float, *, fraction: int | float = 1.0, generator: torch.Generator
) -> tuple[Float[Tensor, "n inputs"], Float[Tensor, "n"], Bool[Tensor, "n"]]:
    r"""Samples of the model: inputs [n, d + 1] with the opposing coordinate last, targets, and who carries it.

    Both signs are equally many (up to one): the two groups of the model. Where one prevails, $x_o$ predicts $|x_o|$ and
    $b_o$ does not end at 0.

    Args: `fraction`: share of the samples with $x_o = \pm\sqrt\alpha$; it is 0 on the others.
    """
    weights = _tensor(beta).reshape(-1)
    carriers = round(fraction * n)
    if not 1 <= carriers <= n:
        raise BadInput(f"a fraction of {fraction} of {n} samples leaves none, or more than all, to carry the feature")
    signal = torch.randn(n, len(weights), generator=generator, dtype=torch.float64)
    chosen = torch.randperm(n, generator=generator)[:carriers]
    opposing = torch.zeros(n, dtype=torch.float64)
    opposing[chosen[::2]], opposing[chosen[1::2]] = math.sqrt(alpha), -math.sqrt(alpha)
    return torch.cat([signal, opposing[:, None]], dim=1), signal @ weights + opposing.abs(), opposing != 0


def _tensor(numbers: Numbers) -> Tensor:
    return torch.as_tensor(numbers, dtype=torch.float64)
