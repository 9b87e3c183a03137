"""The open domains of a branch and bound search: slots of tensors, taken worst first."""

import torch
from torch import Tensor


class Pool:
    """Rows of several tensors under one key each; rows are put in and the worst taken out without moving the others."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        self._priority = torch.empty(0)
        self._alive = torch.zeros(0, dtype=torch.bool)

    def __len__(self) -> int:
        return int(self._alive.sum())

    @property
    def worst(self) -> float:
        """The smallest priority held; infinite where nothing is."""
        return float(self._priority[self._alive].min()) if len(self) else torch.inf

    def put(self, priority: Tensor, **rows: Tensor) -> None:
        """Enter rows, (k, ...); those of a second axis that is shorter than before are filled up with zeros."""
        free = (~self._alive).nonzero()[:, 0]
        if len(free) < len(priority):
            self._grow(len(self._alive) + max(len(priority) - len(free), len(self._alive), 256))
            free = (~self._alive).nonzero()[:, 0]
        slots = free[: len(priority)]
        self._alive[slots] = True
        self._priority = self._priority.to(priority.dtype)
        self._priority[slots] = priority
        for name, values in rows.items():
            held = self._held.get(name)
            if held is None:
                held = values.new_zeros(len(self._alive), *values.shape[1:])
            elif held.shape[1:] != values.shape[1:]:
                wide = tuple(max(a, b) for a, b in zip(held.shape[1:], values.shape[1:], strict=True))
                held, values = _padded(held, wide), _padded(values, wide)
            held[slots] = values
            self._held[name] = held

    def take(self, most: int) -> dict[str, Tensor]:
        """Take out up to so many rows of least priority."""
        slots = self._alive.nonzero()[:, 0]
        if len(slots) > most:
            slots = slots[self._priority[slots].topk(most, largest=False).indices]
        self._alive[slots] = False
        return {name: held[slots] for name, held in self._held.items()} | {"priority": self._priority[slots]}

    def _grow(self, capacity: int) -> None:
        more = capacity - len(self._alive)
        self._alive = torch.cat([self._alive, torch.zeros(more, dtype=torch.bool)])
        self._priority = torch.cat([self._priority, self._priority.new_zeros(more)])
        self._held = {name: torch.cat([h, h.new_zeros(more, *h.shape[1:])]) for name, h in self._held.items()}


def _padded(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    if values.shape[1:] == shape:
        return values
    out = values.new_zeros(len(values), *shape)
    out[(slice(None), *(slice(size) for size in values.shape[1:]))] = values
    return out
