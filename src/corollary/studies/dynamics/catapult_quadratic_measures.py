"""What `catapult-quadratic` measures on the way: kernels in closed form, and both terms of the norm's identity."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from corollary.dynamics.catapult import CatapultTable
from corollary.dynamics.quadratic_models import homogeneous_state
from corollary.engine import Members

DRAWN = 60
"""Steps of the paths that are kept for the picture."""


class TanhNet(nn.Module):
    r"""$z = \frac{1}{\sqrt m} \sum_i u_i \tanh(v_i^\top x / \sqrt d)$, both layers trained, weights from N(0, 1)."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.inner = nn.Parameter(torch.randn(width, inputs, dtype=torch.float64))
        self.outer = nn.Parameter(torch.randn(width, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs, one a sample."""
        width, inputs = self.inner.shape
        return torch.tanh(x @ self.inner.mT / math.sqrt(inputs)) @ self.outer / math.sqrt(width)


def top_eigenvalue(members: Members, *, x: Tensor, slope: float) -> Tensor:
    """Of the tangent kernel of every two-layer network."""
    return torch.linalg.eigvalsh(homogeneous_state(members.params, x, slope).kernel)[:, -1]


def two_layers(x: Tensor, slope: float, members: Members) -> tuple[Tensor, Tensor]:
    """Outputs and kernels of two-layer networks."""
    state = homogeneous_state(members.params, x, slope)
    return state.outputs, state.kernel


def pure_forms(members: Members) -> tuple[Tensor, Tensor]:
    """Outputs and kernels of pure quadratic models: the Jacobian of sample i is the form of i times the weights."""
    theta, forms = members.params["theta"], members.buffers["forms"]
    jacobian = torch.einsum("mnpq,mq->mnp", forms, theta)
    outputs = 0.5 * torch.einsum("mnp,mp->mn", jacobian, theta)
    return outputs, jacobian @ jacobian.mT / forms.shape[1]


def forces(state: Callable[[Members], tuple[Tensor, Tensor]], y: Tensor) -> dict[str, Callable[[Members], Tensor]]:
    """The two terms of the identity: residuals times outputs, and the kernel's form of the residuals, over n."""

    def pull(members: Members) -> Tensor:
        outputs, _ = state(members)
        return ((outputs - y) * outputs).mean(1)

    def push(members: Members) -> Tensor:
        outputs, kernel = state(members)
        residual = outputs - y
        return torch.einsum("mi,mij,mj->m", residual, kernel, residual) / len(y)

    return {"pull": pull, "push": push}


def rises_of_norm(found: CatapultTable) -> dict[str, np.ndarray]:
    """For each run, the steps from where rate times eigenvalue is below 4, and those of them where the norm rose."""
    squared, edges = found.record["weight_norm"] ** 2, found.learning_rate * found.record["lambda_ntk"]
    here, following = squared[:-1], squared[1:]
    known = np.isfinite(here) & np.isfinite(following)
    rose = known & (following > here * (1 + 1e-9))
    below = edges[:-1] < 4
    return {
        "judged": (known & below).sum(0),
        "rises": (rose & below).sum(0),
        "rises_above": (rose & ~below).sum(0),
    }


def first_paths(found: CatapultTable) -> dict[str, np.ndarray]:
    """The first steps of the first seed, one row a (multiple, step), for the picture."""
    first = found.seed == 0
    losses, kernels = (found.record[name][: DRAWN + 1, first] for name in ("loss", "lambda_ntk"))
    steps, runs = losses.shape
    return {
        "path multiple": np.repeat(found.multiple[first], steps),
        "path step": np.tile(np.arange(steps), runs),
        "path loss": (losses / losses[0]).T.reshape(-1),
        "path edge": (kernels * found.learning_rate[first]).T.reshape(-1),
    }
