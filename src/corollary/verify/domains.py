"""Domains of a branch and bound search, rows of tensors by name: the open ones, their halves, their constraints."""

import torch
from torch import Tensor

from corollary.graph import Node
from corollary.verify.branching import Neurons
from corollary.verify.linear_bounds import Splits


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

    def held(self, name: str) -> Tensor:
        """One of the tensors, and "priority", of the rows held."""
        return (self._priority if name == "priority" else self._held[name])[self._alive]

    def take(self, most: int, order: Tensor | None = None) -> dict[str, Tensor]:
        """Take out up to so many rows of least priority, or least `order` where given, one number for each row held."""
        slots = self._alive.nonzero()[:, 0]
        if len(slots) > most:
            order = self._priority[slots] if order is None else order
            slots = slots[order.topk(most, largest=False).indices]
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


def constraints(domain: dict[str, Tensor], neurons: Neurons, multiplier: Tensor) -> dict[Node, Splits]:
    """The split constraints of domains by node, with multipliers (domains, rows, constraints)."""
    found = {}
    for node in neurons.nodes:
        place = neurons.of(node)
        here = (domain["entry"] >= place.start) & (domain["entry"] < place.stop) & (domain["sign"] != 0)
        if not bool(here.any()):
            continue
        order = here.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : int(here.sum(1).max())]
        live = here.gather(1, order)
        entry = torch.where(live, domain["entry"].gather(1, order) - place.start, 0)
        sign = torch.where(live, domain["sign"].gather(1, order), 0.0)
        point = torch.where(live, domain["point"].gather(1, order), 0.0)
        chosen = multiplier.gather(2, order[:, None].expand(-1, multiplier.shape[1], -1))
        found[node] = Splits(entry, sign, point, chosen)
    return found


def halved(domain: dict[str, Tensor], entry: Tensor, point: Tensor) -> dict[str, Tensor]:
    """The domains with `entry` at most `point`, then those with it at least so."""
    twice = {name: torch.cat([values, values]) for name, values in domain.items()}
    full = bool((twice["sign"][:, -1] != 0).any())
    if full:
        for name in ("entry", "sign", "point", "multiplier"):
            twice[name] = torch.nn.functional.pad(twice[name], (0, 1))
    slot = (twice["sign"] != 0).sum(1, keepdim=True)
    sign = torch.cat([torch.ones_like(point), -torch.ones_like(point)])
    for name, value in (("entry", torch.cat([entry, entry])), ("sign", sign), ("point", torch.cat([point, point]))):
        twice[name] = twice[name].scatter(1, slot, value[:, None].to(twice[name].dtype))
    return twice


def together(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    """The domains of both; split constraints are filled up to one number."""
    if not len(b["disjunct"]):
        return a
    joined = {}
    for name, values in a.items():
        other = b[name]
        if name in ("entry", "sign", "point", "multiplier"):
            longer = max(values.shape[-1], other.shape[-1])
            values, other = (torch.nn.functional.pad(v, (0, longer - v.shape[-1])) for v in (values, other))
        joined[name] = torch.cat([values, other])
    return joined
