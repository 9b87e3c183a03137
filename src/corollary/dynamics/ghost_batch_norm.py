"""Ghost batch normalisation: the statistics of a large batch are taken over small virtual batches."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.evidence import Source

HOFFER_2017 = Source(
    key="hoffer2017train",
    authors=("Elad Hoffer", "Itay Hubara", "Daniel Soudry"),
    title="Train longer, generalize better: closing the generalization gap in large batch training of neural networks",
    year=2017,
    arxiv="1705.08741",
    venue="NIPS",
)


class Ghost:
    """What the layers below share; each is PyTorch's layer with another forward pass in training mode.

    Each virtual batch is normalised by its own mean and biased variance, with shared scale and shift. Running
    statistics are updated as by one call of batch normalisation for each virtual batch, in order (so the later ones
    weigh more), with unbiased variances. In evaluation mode nothing differs from batch normalisation, and the state
    dict is the same.

    Args:
        num_features: channels.
        virtual_batch: samples normalised together, at least 2. Where a batch leaves a shorter rest, that is a virtual
            batch too; a single sample joins the one before it.
        eps, momentum, affine, track_running_stats: as of PyTorch's layer.
    Raises: BadInput, for a virtual batch below 2, inputs of another shape, or one value a channel to normalise.
    Source: Hoffer, Hubara and Soudry 2017, arXiv 1705.08741, algorithm 1.
    """

    dimensions: tuple[int, ...]
    virtual_batch: int
    training: bool
    num_features: int
    eps: float
    momentum: float | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, num_features: int, virtual_batch: int, eps: float = 1e-5, **settings: Any):
        super().__init__(num_features, eps=eps, **settings)  # type: ignore[call-arg]  # PyTorch's layer is the next class
        if virtual_batch < 2:
            raise BadInput(f"a virtual batch needs at least 2 samples to have a variance, got {virtual_batch}")
        self.virtual_batch = virtual_batch

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)  # type: ignore[misc]  # as above
        if input.ndim not in self.dimensions or input.shape[1] != self.num_features:
            raise BadInput(
                f"this layer takes [batch, {self.num_features}, ...] of {' or '.join(map(str, self.dimensions))} "
                f"dimensions, got {list(input.shape)}"
            )
        found = [self._normalised(part, size) for part, size in self._parts(input)]
        self._track(torch.cat([mean for _, mean, _ in found]), torch.cat([variance for _, _, variance in found]))
        return torch.cat([output for output, _, _ in found]) if len(found) > 1 else found[0][0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, virtual_batch={self.virtual_batch}"  # type: ignore[misc]  # as above

    def _parts(self, x: Tensor) -> list[tuple[Tensor, int]]:
        """Pieces of the batch, each with the size of its virtual batches, which divides it."""
        size, count = self.virtual_batch, len(x) // self.virtual_batch
        if len(x) - count * size == 1:  # too few for a variance
            count -= 1
        whole = max(0, count) * size
        if whole == len(x):
            return [(x, size)]
        return [*([(x[:whole], size)] if whole else []), (x[whole:], len(x) - whole)]

    def _normalised(self, x: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Virtual batches of one size, side by side as channels: outputs, means, variances `[batches, channels]`."""
        count, (channels, *space) = len(x) // size, x.shape[1:]
        if size * x[:1, :1].numel() == 1:
            raise BadInput(
                f"one value a channel has no variance: got a batch of shape {list(x.shape)} in training mode"
            )
        beside = x.reshape(count, size, channels, *space).transpose(0, 1).reshape(size, count * channels, *space)
        mean, variance = (x.detach().new_zeros(count * channels) for _ in range(2))
        scale, shift = (None if part is None else part.repeat(count) for part in (self.weight, self.bias))
        # With momentum 1 the "running" statistics are those of the batch.
        found = F.batch_norm(beside, mean, variance, scale, shift, training=True, momentum=1.0, eps=self.eps)
        found = found.reshape(size, count, channels, *space).transpose(0, 1).reshape(x.shape)
        return found, mean.reshape(count, channels), variance.reshape(count, channels)

    @torch.no_grad()
    def _track(self, means: Tensor, variances: Tensor) -> None:
        """Update the running statistics as one call for each virtual batch, in order, would."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        count = len(means)
        like = {"dtype": means.dtype, "device": means.device}
        if self.momentum is None:  # a cumulative average
            before = self.num_batches_tracked.to(means.dtype)
            kept, weights = before / (before + count), torch.ones(count, **like) / (before + count)
        else:
            kept = (1 - self.momentum) ** count
            weights = self.momentum * (1 - self.momentum) ** torch.arange(count - 1, -1, -1, **like)
        for running, found in ((self.running_mean, means), (self.running_var, variances)):
            running.mul_(kept).add_((weights @ found).to(running.dtype))
        self.num_batches_tracked.add_(count)


class GhostBatchNorm1d(Ghost, nn.BatchNorm1d):
    """Ghost batch normalisation of `[batch, channels]` or `[batch, channels, length]`.

    Arguments, errors and source: see `Ghost`.
    """

    dimensions = (2, 3)


class GhostBatchNorm2d(Ghost, nn.BatchNorm2d):
    """Ghost batch normalisation of `[batch, channels, height, width]`.

    Arguments, errors and source: see `Ghost`.
    """

    dimensions = (4,)


class GhostBatchNorm3d(Ghost, nn.BatchNorm3d):
    """Ghost batch normalisation of `[batch, channels, depth, height, width]`.

    Arguments, errors and source: see `Ghost`.
    """

    dimensions = (5,)


GHOSTS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.BatchNorm1d: GhostBatchNorm1d,
    nn.BatchNorm2d: GhostBatchNorm2d,
    nn.BatchNorm3d: GhostBatchNorm3d,
}


def ghostify(module: nn.Module, virtual_batch: int) -> nn.Module:
    """A copy of a network with every batch normalisation replaced by ghost batch normalisation, state and all.

    Raises: BadInput, if there is no batch normalisation to replace, or for a virtual batch below 2.
    """
    copied = deepcopy(module)
    places = [(name, part) for name, part in copied.named_modules() if type(part) in GHOSTS]
    if not places:
        raise BadInput(f"{type(module).__name__} has no BatchNorm1d, BatchNorm2d or BatchNorm3d to replace")
    for name, part in places:
        ghost = _ghost_of(part, virtual_batch)
        if not name:
            return ghost
        parent, _, leaf = name.rpartition(".")
        setattr(copied.get_submodule(parent), leaf, ghost)
    return copied


def _ghost_of(norm: Any, virtual_batch: int) -> nn.Module:
    like = next((t for t in (*norm.parameters(), *norm.buffers()) if t.is_floating_point()), torch.empty(0))
    ghost = GHOSTS[type(norm)](
        norm.num_features, virtual_batch, eps=norm.eps, momentum=norm.momentum, affine=norm.affine,
        track_running_stats=norm.track_running_stats, dtype=like.dtype, device=like.device,
    )  # fmt: skip
    ghost.load_state_dict(norm.state_dict())
    for name, parameter in norm.named_parameters():
        ghost.get_parameter(name).requires_grad_(parameter.requires_grad)
    return ghost.train(norm.training)
