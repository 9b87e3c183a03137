"""Affine ops transposed: what a linear function of an op's output is as a function of its inputs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as convolution_gradients

from corollary.graph import Node
from corollary.graph.ops import (
    Add,
    BatchSize,
    Convolution,
    Linear,
    MatMul,
    Multiply,
    Negate,
    Op,
    Permute,
    Reshape,
    Subtract,
)

_CONVOLUTION_GRADIENTS: tuple[Any, ...] = (
    convolution_gradients.conv1d_input,
    convolution_gradients.conv2d_input,
    convolution_gradients.conv3d_input,
)


def transposed(
    node: Node, moving: Sequence[int], operands: Sequence[Tensor | None], rows: Tensor, batch: int
) -> tuple[Tensor, ...]:
    """The coefficients that reach the inputs at positions `moving` of an op that is affine in these jointly.

    Args:
        operands: values of the inputs that are held fixed, None at `moving`; those with a batch axis have `batch`.
        rows: coefficients of the op's output, in its layout with `batch` samples.
    """
    op = node.op.at(batch)
    written = _written(node, op, moving, operands, rows, batch)
    return written if written is not None else _by_derivative(node, op, moving, operands, rows, batch)


def size_at(node: Node, batch: int) -> tuple[int, ...]:
    """The shape of a node's value for so many samples."""
    return tuple(size.at(batch) if isinstance(size, BatchSize) else size for size in node.shape)


def _written(
    node: Node, op: Op, moving: Sequence[int], operands: Sequence[Tensor | None], rows: Tensor, batch: int
) -> tuple[Tensor, ...] | None:
    """Short forms of the commonest ops, the fast ones; None for the others."""
    sources = [node.inputs[i] for i in moving]
    if isinstance(op, Add | Subtract | Negate):
        if any(source.shape != node.shape for source in sources):
            return None
        minus = isinstance(op, Negate)
        return tuple(-rows if minus or (i == 1 and isinstance(op, Subtract)) else rows for i in moving)
    if len(moving) != 1:
        return None
    source, other = sources[0], operands[1 - moving[0]] if len(operands) > 1 else None
    if isinstance(op, Reshape):
        return (rows.reshape(size_at(source, batch)),)
    if isinstance(op, Permute):
        order = sorted(range(len(op.axes)), key=lambda axis: op.axes[axis] % len(op.axes))
        return (rows.permute(order),)
    if moving[0] == 0 and other is not None:
        if isinstance(op, Linear):
            return (rows @ other,)
        if isinstance(op, MatMul) and other.ndim == 2 and rows.ndim >= 2 and len(source.shape) == rows.ndim:
            return (rows @ other.T,)
        if isinstance(op, Convolution):
            size = size_at(source, batch)
            if len(op.stride) == 2 and op.groups == 1:
                return (_convolution_transposed(op, other, rows, size[2:]),)
            gradient = _CONVOLUTION_GRADIENTS[len(op.stride) - 1]
            return (gradient(size, other, rows.contiguous(), op.stride, op.padding, op.dilation, op.groups),)
    if isinstance(op, Multiply) and source.shape == node.shape and other is not None:
        return (rows * other,)
    return None


FEW_PLACES = 32
"""A convolution of fewer places whose windows tile the map is transposed by one matrix product over rows and places."""


def _convolution_transposed(op: Convolution, weight: Tensor, rows: Tensor, size: tuple[int, ...]) -> Tensor:
    """Columns by one product of matrices, added up where windows overlap: faster than the library's on few channels."""
    kernel, places = tuple(weight.shape[2:]), tuple(rows.shape[2:])
    tiles = op.stride == kernel and op.dilation == (1, 1) and not any(op.padding)
    if tiles and places[0] * places[1] < FEW_PLACES and size == (places[0] * kernel[0], places[1] * kernel[1]):
        patches = rows.permute(0, 2, 3, 1) @ weight.flatten(1)
        patches = patches.reshape(len(rows), *places, weight.shape[1], *kernel)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(rows), weight.shape[1], *size)
    columns = weight.flatten(1).T @ rows.flatten(2)
    fold: Any = F.fold
    return fold(columns, tuple(size), tuple(weight.shape[2:]), op.dilation, op.padding, op.stride)


def _by_derivative(
    node: Node, op: Op, moving: Sequence[int], operands: Sequence[Tensor | None], rows: Tensor, batch: int
) -> tuple[Tensor, ...]:
    """The vector-Jacobian product at zero, exact because the op is affine."""
    with torch.enable_grad():
        zeros = tuple(rows.new_zeros(size_at(node.inputs[i], batch)).requires_grad_() for i in moving)
        values = list(operands)
        for i, zero in zip(moving, zeros, strict=True):
            values[i] = zero
        output = op(*values)
        flows = torch.autograd.grad(output, zeros, rows, create_graph=rows.requires_grad, allow_unused=True)
    return tuple(zero.detach() if flow is None else flow for zero, flow in zip(zeros, flows, strict=True))
