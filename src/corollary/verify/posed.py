"""A property of a network in one dtype, and whether the dtype is fine enough to prove it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from corollary.graph import Graph, evaluate
from corollary.verify.prepared import Prepared, prepare
from corollary.verify.queries import Queries
from corollary.verify.search import Margin
from corollary.verify.specification import Specification

ALLOWANCES = 10
"""Where an open disjunct is missed by fewer allowances for rounding than these, little of its margin is left."""


@dataclass(frozen=True, eq=False)
class Posed:
    """The network and the property in one dtype, and what a bound must exceed in it."""

    network: Prepared
    queries: Queries
    margin: Margin

    @classmethod
    def of(cls, graph: Graph, specification: Specification, dtype: torch.dtype) -> "Posed":
        """Both brought to the dtype, the property rounded outwards."""
        network = prepare(graph, dtype=dtype)
        return cls(network, Queries.of(specification, dtype, network.device), Margin.for_dtype(dtype))


def rounding_decides(network: Prepared, query: Queries, allowed: Tensor) -> bool:
    """Whether the middle of the region is so nearly unsafe that rounding may decide.

    Args:
        query: of one region.
        allowed: what each row's bound is lowered by for rounding, (1, rows).
    """
    outputs = evaluate(network.graph, query.region.center).reshape(1, 1, -1)
    values = torch.einsum("nro,kno->nr", query.rows, outputs) - query.offsets
    return bool((query.margins(values).abs() <= ALLOWANCES * allowed.amax(1, keepdim=True)).any())
