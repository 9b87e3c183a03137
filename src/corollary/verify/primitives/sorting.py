"""Sorts as networks of comparators, each a larger and a smaller one by one ReLU."""

import torch

from corollary.graph import Node
from corollary.graph.ops import Add, Concatenate, Gather, ReLU, Sort, Subtract
from corollary.verify.primitives.rewriter import Rewriter, parts_of

MOST_SORTED = 16
"""A sort of n takes about n log(n)^2 / 4 ReLUs, and its bounds loosen with each layer of them."""


def comparators(n: int) -> list[list[tuple[int, int]]]:
    """Layers of disjoint pairs (i, j), i < j, that sort n numbers: put the smaller at i, the larger at j.

    Source: Batcher 1968, "Sorting networks and their applications": odd-even merging.
    """
    layers, p = [], 1
    while p < n:
        k = p
        while k:
            layers.append(
                [
                    (i + j, i + j + k)
                    for j in range(k % p, n - k, 2 * k)
                    for i in range(min(k, n - j - k))
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p)
                ]
            )
            k //= 2
        p *= 2
    return layers


@parts_of(Sort)
def _sort(to: Rewriter, op: Sort, x: Node) -> Node:
    axis = op.axis % len(x.shape)
    n = x.shape[axis]
    if not isinstance(n, int) or n > MOST_SORTED:
        raise to.declined(op, f"it sorts {n} entries, and at most {MOST_SORTED} are written out")
    for layer in comparators(n):
        x = _compared(to, x, axis, n, layer)
    return _picked(to, x, axis, list(reversed(range(n)))) if op.descending else x


def _compared(to: Rewriter, x: Node, axis: int, n: int, pairs: list[tuple[int, int]]) -> Node:
    """One layer: with d = relu(x_i - x_j), the smaller is x_i - d and the larger x_j + d."""
    low, high = [i for i, _ in pairs], [j for _, j in pairs]
    first, second = _picked(to, x, axis, low), _picked(to, x, axis, high)
    swap = to.emit(ReLU(), to.emit(Subtract(), first, second))
    pieces = [to.emit(Subtract(), first, swap), to.emit(Add(), second, swap)]
    untouched = sorted(set(range(n)) - {*low, *high})
    if untouched:
        pieces.append(_picked(to, x, axis, untouched))
    order = [*low, *high, *untouched]
    return _picked(to, to.emit(Concatenate(axis), *pieces), axis, [order.index(i) for i in range(n)])


def _picked(to: Rewriter, x: Node, axis: int, indices: list[int]) -> Node:
    if indices == list(range(len(indices))) and len(indices) == x.shape[axis]:
        return x
    return to.emit(Gather(axis), x, to.constant(torch.tensor(indices), "order"))
