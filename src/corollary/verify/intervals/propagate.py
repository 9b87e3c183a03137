"""Interval bound propagation: intervals carried from the inputs of a network to its outputs."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.graph import Graph, Node
from corollary.graph.ops import Op
from corollary.graph.walk import forward
from corollary.verify.intervals.interval import Interval, Operand, apply_interval


def propagate(
    graph: Graph,
    inputs: Sequence[Operand],
    *,
    keep: Collection[Node] = (),
    stored: Mapping[str, Tensor] | None = None,
) -> dict[Node, Interval | Tensor]:
    """Bounds on the values of a network's nodes over all inputs in a box; differentiable by ends and parameters.

    Sound up to rounding: the ends are rounded to nearest, not outwards.

    Args:
        inputs: for each of `graph.inputs` an interval, or a tensor where the input is known; (batch, *input).
        keep: nodes wanted besides the outputs.
        stored: values to use instead of those in `graph.tensors`, by name.

    Returns: for each wanted node its interval; a tensor where it does not depend on an interval. Floating values have
        the dtype of the input intervals.

    Raises: NoRule, naming the node, for an op outside the vocabulary.
        BadInput, if no input is an interval.

    Source: Gowal et al. 2019, "Scalable verified training for provably robust image classification", section 3.
    """
    boxes = [value for value in inputs if isinstance(value, Interval)]
    if not boxes:
        raise BadInput("interval bounds need at least one input that is an Interval; a network of points is evaluated")
    dtype = boxes[0].dtype

    def apply(node: Node, op: Op, values: tuple[Any, ...]) -> Any:
        return _as_dtype(apply_interval(node, op, values), dtype)

    tensors = {**graph.tensors, **(stored or {})}
    return forward(
        graph,
        [_as_dtype(value, dtype) for value in inputs],
        {name: _as_dtype(tensor, dtype) for name, tensor in tensors.items()},
        apply,
        batch=boxes[0].shape[0],
        keep=keep,
    )


def _as_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Floating values in the dtype of the bounds; indices and truth values as they are."""
    floating = isinstance(value, Tensor | Interval) and value.dtype.is_floating_point
    return value.to(dtype) if floating and value.dtype != dtype else value
