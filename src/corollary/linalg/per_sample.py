"""The gradient of each sample's loss: streamed in blocks of rows, their norms, and their Gram matrix."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, vmap

from corollary.base.errors import BadInput
from corollary.base.network import Batch, Inputs, Loss, Params, batch_length, batches, map_inputs
from corollary.base.progress import track
from corollary.linalg.problem import Data, Network, Problem

BLOCK_BYTES = 2**28
"""Size of the largest block of gradients that is held at a time (the Gram matrix holds two)."""


def per_sample_gradients(
    net: Network, loss: Loss, data: Data, *, params: Params | None = None, chunk: int = 256, check: bool = True
) -> Iterator[Float[Tensor, "samples parameters"]]:
    r"""The rows $\nabla_\theta \ell_i$, in the order of the data, one block at a time, never all of them at once.

    Args:
        net: a module, or a function (params, inputs) -> outputs with `params=`.
        loss: (outputs, targets) -> the mean over samples; of one sample it is $\ell_i$.
        data: (inputs, targets), or a re-iterable of such batches.
        params: the parameters to differentiate by; by default the module's trainable ones, a tied one counted once.
        chunk: samples in a block at most; fewer where a block would pass `BLOCK_BYTES`, or a batch of `data` ends.
        check: compare two passes over the data first, and see that the loss is a mean over samples.
    Returns: an iterator of blocks; their columns are the flat parameters (`ParameterSpace`), their dtype and device
        those of the parameters. The mean of all rows is the gradient of the loss.
    Raises: BadInput, for batch normalisation in training mode (samples would depend on each other), named by its layer,
        and for other data or losses than these; NotDeterministic, if two passes over the data disagree.
    """
    problem = _problem(net, loss, data, params, chunk, check)
    parts = _parts(problem.data, min(chunk, _rows_that_fit(problem)))
    return (_gradients(problem, loss, *part) for part in track(parts, "blocks of per-sample gradients"))


def per_sample_square_norms(
    net: Network, loss: Loss, data: Data, *, params: Params | None = None, chunk: int = 256, check: bool = True
) -> Float[Tensor, "samples"]:
    r"""$\lVert \nabla_\theta \ell_i \rVert^2$ for each sample. Arguments as for `per_sample_gradients`."""
    blocks = per_sample_gradients(net, loss, data, params=params, chunk=chunk, check=check)
    return torch.cat([block.square().sum(dim=1) for block in blocks])


def gradient_gram(
    net: Network, loss: Loss, data: Data, *, params: Params | None = None, chunk: int = 256, check: bool = True
) -> Float[Tensor, "samples samples"]:
    r"""The inner products $\nabla\ell_i \cdot \nabla\ell_j$. Over n, its nonzero spectrum is the empirical Fisher's.

    One backward pass for each sample while all gradients fit `BLOCK_BYTES`; beyond that they are computed again for
    each pair of blocks. Arguments as for `per_sample_gradients`.
    """
    problem = _problem(net, loss, data, params, chunk, check)
    slabs = partial(_parts, problem.data, _rows_that_fit(problem))
    n = sum(batch_length(inputs) for inputs, _ in problem.data)
    gram = torch.empty(n, n, dtype=problem.kind[0], device=problem.kind[1])
    row = 0
    for a, slab in enumerate(track(slabs(), "blocks of the Gram matrix")):
        left = _slab(problem, loss, slab, chunk)
        rows, column = slice(row, row := row + len(left)), row
        gram[rows, rows] = left @ left.T
        for other in islice(slabs(), a + 1, None):
            right = _slab(problem, loss, other, chunk)
            columns = slice(column, column := column + len(right))
            share = left @ right.T
            gram[rows, columns], gram[columns, rows] = share, share.T
    return gram


def _problem(net: Network, loss: Loss, data: Data, params: Params | None, chunk: int, check: bool) -> Problem:
    if chunk < 1:
        raise BadInput(f"a block of per-sample gradients holds at least one sample; got chunk={chunk}")
    return Problem.of(net, data, loss, params=params, check=check)


def _rows_that_fit(problem: Problem) -> int:
    return max(1, BLOCK_BYTES // (problem.size * problem.kind[0].itemsize))


def _parts(data: Iterable[Batch], size: int) -> Iterator[Batch]:
    return (part for batch in data for part in batches(batch, size))


def _slab(problem: Problem, loss: Loss, part: Batch, chunk: int) -> Float[Tensor, "samples parameters"]:
    return torch.cat([_gradients(problem, loss, *piece) for piece in batches(part, chunk)])


def _gradients(problem: Problem, loss: Loss, inputs: Inputs, targets: Tensor) -> Float[Tensor, "samples parameters"]:
    params = {name: leaf.detach() for name, leaf in problem.leaves.items()}

    def of_sample(leaves: Params, inputs: Inputs, target: Tensor) -> Tensor:
        alone = map_inputs(lambda tensor: tensor[None], inputs)
        return loss(problem.net(leaves, alone), target[None])

    try:
        rows = vmap(grad(of_sample), in_dims=(None, 0, 0))(params, inputs, targets)
        return torch.cat([row.flatten(start_dim=1) for row in rows.values()], dim=1)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # an operation without a batching rule over samples, such as a recurrent layer
        batch = problem.linearised(inputs)
        n = len(targets)
        # The loss is a mean over n samples, so the gradient of one sample's loss is n times that of the mean.
        scores = n * grad(loss)(batch.outputs.detach(), targets).reshape(n, -1)
        seeds = torch.diag_embed(scores.T, dim1=0, dim2=1).reshape(n, -1)
        return problem.chunks(partial(batch.pull, list(params)), seeds)
