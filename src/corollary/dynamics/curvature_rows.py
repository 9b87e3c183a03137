r"""The rows of which the Gauss-Newton matrix is the second moment: gradients of a network's outputs, by the loss.

$G = \frac1n \sum_i g_i g_i^\top$ with $g_i = J_i^\top h_i^{1/2}$, where $J_i$ is the Jacobian of the outputs at
sample i and $h_i$ the Hessian of its loss in the outputs: the identity for half the squared distance,
$\mathrm{diag}(p) - pp^\top$ for cross-entropy. Where the residuals are zero, $G$ is the Hessian.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad

from corollary.base.errors import BadInput
from corollary.base.network import Batch, Loss, Params, batches, map_inputs, parameters_of, refuse_non_finite
from corollary.linalg import gradient_gram, per_sample_gradients, per_sample_square_norms
from corollary.linalg.linearise import LossCurvature
from corollary.linalg.per_sample import BLOCK_BYTES
from corollary.linalg.problem import Data, Network, Problem


class PerSample(TypedDict):
    """Options of `per_sample_gradients`."""

    params: Params
    chunk: int
    check: bool


@final
@dataclass(frozen=True, eq=False)
class CurvatureRows:
    """The rows of a network, computed when they are asked for, block after block.

    Attributes:
        problem: the network, its parameters and its data.
        roots: $h_i^{1/2}$, up to a rotation.
        chunk: rows in a block at most.
        train_loss: on the data.
        quadratic: whether $h_i$ is the same for all samples, as it is for squares.
    """

    problem: Problem
    roots: Float[Tensor, "samples outputs directions"]
    chunk: int
    train_loss: float
    quadratic: bool

    @classmethod
    def of(
        cls, net: Network, loss: Loss, data: Data, *, params: Params | None = None, chunk: int = 256
    ) -> "CurvatureRows":
        """One pass over the data for the loss and its curvature in the outputs.

        Raises: BadInput, as `per_sample_gradients`; for parameters or outputs that are not finite; for a loss without
            curvature in the outputs, or that is not convex in them.
        """
        if chunk < 1:
            raise BadInput(f"a block of gradients holds at least one sample; got chunk={chunk}")
        for name, tensor in parameters_of(net, params).items():
            refuse_non_finite(tensor, f"the parameter {name!r}")
        problem = Problem.of(net, data, loss, params=params)
        hessians, total = [], 0.0
        for inputs, targets in (part for batch in problem.data for part in batches(batch, chunk)):
            outputs = problem.outputs(inputs)
            hessians.append(_output_hessians(loss, outputs, targets))
            total += float(loss(outputs, targets)) * len(targets)
        h = torch.cat(hessians)
        spread, scale = (h - h[0]).abs().max(), h.abs().max()
        return cls(problem, _roots(h), chunk, total / len(h), bool(spread <= _rounding(h) * scale))

    @property
    def samples(self) -> int:
        """n."""
        return len(self.roots)

    @property
    def directions(self) -> int:
        """Rows of each sample: as many as the outputs, less those in which the loss has no curvature anywhere."""
        return self.roots.shape[2]

    @property
    def parameters(self) -> int:
        """Length of a row."""
        return self.problem.size

    def __iter__(self) -> Iterator[Float[Tensor, "samples directions parameters"]]:
        """The rows of some samples at a time, all rows of a sample together."""
        held: list[Tensor] = []
        for block in per_sample_gradients(self.problem.net, _along, _Directions(self), **self._options()):
            held.append(block)
            if whole := sum(map(len, held)) // self.directions * self.directions:
                rows = torch.cat(held) if len(held) > 1 else block
                yield rows[:whole].unflatten(0, (-1, self.directions))
                held = [rows[whole:]]

    def square_norms(self) -> Float[Tensor, "samples"]:
        r"""$\lVert g_i \rVert_F^2$ for each sample."""
        norms = per_sample_square_norms(self.problem.net, _along, _Directions(self), **self._options())
        return norms.reshape(self.samples, self.directions).sum(dim=1)

    def gram(self) -> Float[Tensor, "rows rows"]:
        """The inner products of all rows, sample by sample."""
        return gradient_gram(self.problem.net, _along, _Directions(self), **self._options())

    def residuals(self, loss: Loss) -> Float[Tensor, "samples directions"]:
        r"""$e_i$ with $\nabla_f \ell_i = h_i^{1/2} e_i$: the residuals, for half their square as the loss."""
        slopes = []
        for inputs, targets in (part for batch in self.problem.data for part in batches(batch, self.chunk)):
            outputs = self.problem.outputs(inputs)
            # The loss is a mean over samples, so the slope of one sample's loss is n times that of the mean.
            slopes.append(len(targets) * grad(loss)(outputs, targets).reshape(len(targets), -1))
        return (torch.linalg.pinv(self.roots.double()) @ torch.cat(slopes).double()[..., None])[..., 0]

    def _options(self) -> PerSample:
        whole = max(1, self.chunk // self.directions) * self.directions
        params = {name: leaf.detach() for name, leaf in self.problem.leaves.items()}
        return {"params": params, "chunk": whole, "check": False}


@final
@dataclass(frozen=True, eq=False)
class _Directions:
    """The data with each sample once for each of its rows, and the weights of the outputs in the place of targets."""

    rows: CurvatureRows

    def __iter__(self) -> Iterator[Batch]:
        rows, problem, start = self.rows, self.rows.problem, 0
        row_bytes = problem.size * problem.kind[0].itemsize
        size = max(1, BLOCK_BYTES // row_bytes // rows.directions)
        for inputs, targets in (part for batch in problem.data for part in batches(batch, size)):
            roots = rows.roots[start : start + len(targets)]
            start += len(targets)
            repeated = map_inputs(lambda tensor: tensor.repeat_interleave(rows.directions, dim=0), inputs)
            yield repeated, roots.mT.flatten(0, 1)


def _along(outputs: Tensor, weights: Tensor) -> Tensor:
    """The mean over rows of a weighted sum of outputs: the gradient of one row's share is that row."""
    return (outputs.reshape(weights.shape) * weights).sum(dim=1).mean()


def _output_hessians(loss: Loss, outputs: Tensor, targets: Tensor) -> Float[Tensor, "samples outputs outputs"]:
    """The Hessian of each sample's loss in its outputs: a product gives one column of all of them."""
    n = len(outputs)
    size = outputs[0].numel()
    units = torch.eye(size, dtype=outputs.dtype, device=outputs.device)[:, None].expand(size, n, size)
    columns = LossCurvature(loss, outputs, targets)(units.reshape(size, -1))
    # The loss is a mean over n samples, so the Hessian of one sample's loss is n times that of the mean.
    return n * columns.reshape(size, n, size).transpose(0, 1)


def _roots(hessians: Float[Tensor, "samples outputs outputs"]) -> Float[Tensor, "samples outputs directions"]:
    """Square roots of the Hessians, without the columns that are zero for all samples."""
    values, vectors = torch.linalg.eigh(hessians.double())
    largest = values.abs().amax()
    # Not relative alone: a probability near 1 is rounded absolutely, and its variance is small.
    if bool(values.amin() < -_rounding(hessians) * (1 + largest)):
        raise BadInput(
            f"the loss is not convex in the outputs: its Hessian there has an eigenvalue {float(values.amin()):.3g}. "
            "The thresholds are for squares, cross-entropy and other losses that are."
        )
    if not bool(largest > 0):
        raise BadInput("the loss has no curvature in the outputs (it is linear in them): there is no edge of stability")
    kept = values.amax(dim=0) > _rounding(hessians) * largest
    return (vectors * values.clamp(min=0).sqrt()[:, None])[..., kept].to(hessians.dtype)


def _rounding(tensor: Tensor) -> float:
    return 100 * torch.finfo(tensor.dtype).eps
