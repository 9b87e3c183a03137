"""Which samples a network sees at each step, with which labels: pure functions of a seed, so runs resume exactly."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, final

import torch
from jaxtyping import Int
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.seeds import Seeds

Order: TypeAlias = Literal["shuffle", "replacement", "fresh", "fixed"]
_BLOCK_ENTRIES = 4_000_000  # indices drawn ahead for all members together: 32 MB


def batch_order(
    seed: int, epoch: int, samples: int, order: Order = "shuffle", batch_size: int | None = None
) -> Int[Tensor, "visited"]:
    """The order in which epoch `epoch` of the run with that seed visits its samples.

    Args:
        seed: of the run, or of the member of a population.
        epoch: 0, 1, ...
        samples: size of the training set.
        order: `"shuffle"` a new permutation each epoch, `"replacement"` independent uniform draws, `"fresh"` batches
            independent of each other, each of `batch_size` distinct samples, `"fixed"` 0, 1, ...
        batch_size: for `"fresh"`, whose epochs hold whole batches only.
    Raises: BadInput, if `"fresh"` comes without a batch size in 1..samples.
    """
    if order == "fixed":
        return torch.arange(samples)
    generator = Seeds(seed)(f"batch order {epoch}")
    if order == "replacement":
        return torch.randint(samples, (samples,), generator=generator)
    if order == "fresh":
        size = batch_size or 0
        return distinct_rows(samples, size, samples // max(size, 1), generator).flatten()
    return torch.randperm(samples, generator=generator)


def distinct_rows(samples: int, size: int, rows: int, generator: torch.Generator) -> Int[Tensor, "rows size"]:
    """Independent rows of `size` distinct indices below `samples`, each set equally likely.

    Raises: BadInput, unless 1 <= size <= samples.
    """
    if not 1 <= size <= samples:
        raise BadInput(f"{size} distinct samples were asked of {samples}: a batch has at least 1 and at most all")
    if size * size > samples:  # then most rows drawn blindly would hold a sample twice
        return torch.rand(rows, samples, generator=generator, dtype=torch.float64).argsort(1)[:, :size]
    drawn = torch.randint(samples, (rows, size), generator=generator)
    while len(twice := (drawn.sort(1).values.diff(dim=1) == 0).any(1).nonzero().flatten()):
        drawn[twice] = torch.randint(samples, (len(twice), size), generator=generator)
    return drawn


def flip_labels(targets: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Give `round(fraction * n)` labels, chosen at random, another class of those present, uniformly.

    Args:
        targets: class labels `[n]`: integers, or floating-point numbers with two values (such as -1 and 1).
        fraction: share of labels to change, in [0, 1].
        generator: of the choice and of the new classes.
    Raises: BadInput, if `fraction` is outside [0, 1] or the targets are not labels of at least two classes.
    """
    if not 0 <= fraction <= 1:
        raise BadInput(f"label noise is a fraction of labels in [0, 1], got {fraction}")
    classes, index = targets.unique(return_inverse=True)
    if targets.ndim != 1 or len(classes) < 2 or (targets.is_floating_point() and len(classes) > 2):
        raise BadInput(
            f"label noise needs class labels [n] of two or more classes, got targets of shape {tuple(targets.shape)}, "
            f"dtype {targets.dtype}, with {len(classes)} distinct values"
        )
    chosen = torch.randperm(len(targets), generator=generator)[: round(fraction * len(targets))].to(targets.device)
    shift = torch.randint(1, len(classes), (len(chosen),), generator=generator).to(targets.device)
    index[chosen] = (index[chosen] + shift) % len(classes)
    return classes[index]


def seeded(make_net: Callable[..., nn.Module], seed: int, *arguments: object) -> nn.Module:
    """A network with the initial weights of that seed: `make_net(*arguments)` under a default generator of its own."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(Seeds(seed).integer("initial weights"))
        return make_net(*arguments)


@final
class Batches:
    """The index batches of every member: step -> which samples each of them sees.

    An epoch of a member is one pass over its own samples in its own order; where its batch size does not divide them,
    the last batch is smaller, or left out with `drop_last`. A member whose batch is its whole set sees it in order.
    With the order "fresh" batches know nothing of each other, and an epoch is as many as fit the member's set.

    Args:
        seeds: one per member.
        subsets: the sample indices of each member, repeats allowed.
        batch_sizes: one per member; larger than the member's set means the whole set.
        order: how an epoch is ordered, see `batch_order`.
        drop_last: leave out the last batch of an epoch where it is smaller.
        device: where the indices are wanted.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        subsets: Sequence[Tensor],
        batch_sizes: Sequence[int],
        order: Order = "shuffle",
        drop_last: bool = False,
        device: torch.device | str = "cpu",
    ):
        self.device = device
        self.seeds, self.subsets, self.drop_last = tuple(seeds), tuple(subsets), drop_last
        self.sizes = tuple(min(size, len(subset)) for size, subset in zip(batch_sizes, subsets, strict=True))
        self.order: Order = order
        self.steps_per_epoch = tuple(
            len(subset) // size if drop_last or order == "fresh" else -(-len(subset) // size)
            for size, subset in zip(self.sizes, self.subsets, strict=True)
        )
        self.uniform = len(set(self.sizes)) == 1 and len({len(subset) for subset in subsets}) == 1
        """Whether all members have the same number of samples in each batch."""
        whole = all(size == len(subset) for size, subset in zip(self.sizes, self.subsets, strict=True))
        self.full = order != "replacement" and whole
        """Whether every step of every member sees its whole set: then all steps have the same batch."""
        self._start, self._block, self._counts = 0, torch.empty(0, len(seeds), 0, dtype=torch.long), [[0]]

    def __call__(self, step: int) -> tuple[Int[Tensor, "member batch"], Tensor | None]:
        """`(indices, weights)` for one step.

        Where members differ in batch size, the shorter rows are filled up with a sample of theirs, and `weights`
        `[member, batch]` is 1 / batch size on a member's batch and 0 on the filling; otherwise it is None.
        """
        step = 0 if self.full else step
        if not self._start <= step < self._start + len(self._block):
            self._draw(step)
        counts = self._counts[step - self._start]
        longest = max(counts)
        indices = self._block[step - self._start, :, :longest]
        if min(counts) == longest:
            return indices, None
        valid = torch.tensor(counts, device=indices.device)[:, None]
        return indices, (torch.arange(longest, device=indices.device) < valid) / valid.to(torch.float64)

    def _draw(self, start: int) -> None:
        """Draw the batches of a block of steps at once: an epoch of the longest member, unless memory forbids."""
        members, widest = len(self.seeds), max(self.sizes)
        length = max(1, min(max(self.steps_per_epoch), _BLOCK_ENTRIES // (members * widest)))
        # Rows are filled up with a sample of the member's own: its loss is finite whenever the batch's is.
        filling = torch.stack([subset[0] for subset in self.subsets])
        block = filling[None, :, None].expand(length, members, widest).clone()
        counts = [[0] * members for _ in range(length)]
        drawn: dict[tuple[int, int, int, int], Tensor] = {}  # paired members, of one seed and set, share their batches
        for member, per_epoch in enumerate(self.steps_per_epoch):
            for epoch in range(start // per_epoch, (start + length - 1) // per_epoch + 1):
                first, last = max(start, epoch * per_epoch), min(start + length, (epoch + 1) * per_epoch)
                size = self.sizes[member]
                key = (self.seeds[member], id(self.subsets[member]), size, epoch)
                if key not in drawn:
                    drawn[key] = self._epoch(member, epoch)
                visited = drawn[key][(first - epoch * per_epoch) * size :]
                whole = min(last - first, len(visited) // size)
                block[first - start : first - start + whole, member, :size] = visited[: whole * size].view(whole, size)
                lengths = [size] * whole
                if whole < last - first:
                    rest = visited[whole * size :]
                    block[last - 1 - start, member, : len(rest)] = rest
                    lengths.append(len(rest))
                for row, count in enumerate(lengths, first - start):
                    counts[row][member] = count
        self._start, self._block, self._counts = start, block.to(self.device), counts

    def _epoch(self, member: int, epoch: int) -> Int[Tensor, "visited"]:
        """The samples one member visits in one epoch, in order."""
        subset, size, steps = self.subsets[member], self.sizes[member], self.steps_per_epoch[member]
        order: Order = "fixed" if size == len(subset) and self.order in ("shuffle", "fresh") else self.order
        return subset[batch_order(self.seeds[member], epoch, len(subset), order, size)][: steps * size]
