"""Normalisation by stored statistics, Einstein sums and pools in products, matrix products and maxima."""

import math
from itertools import product

from corollary.graph import Node
from corollary.graph.ops import (
    AdaptiveMaxPool,
    Add,
    BatchNorm,
    BatchSize,
    Concatenate,
    Convolution,
    ConvolutionTransposed,
    Einsum,
    Linear,
    MatMul,
    Max,
    MaxPool,
    Min,
    Multiply,
    Negate,
    Permute,
    Reciprocal,
    Reshape,
    Size,
    Slice,
    Sqrt,
    Subtract,
    Sum,
)
from corollary.verify.primitives.rewriter import Rewriter, parts_of


@parts_of(Linear)
def _linear(to: Rewriter, op: Linear, x: Node, weight: Node, bias: Node | None = None) -> Node:
    if not (to.moves(x) and to.moves(weight)):
        return to.keep(op, *(node for node in (x, weight, bias) if node is not None))
    found = to.emit(MatMul(), x, to.emit(Permute((1, 0)), weight))
    return found if bias is None else to.emit(Add(), found, bias)


@parts_of(MatMul)
def _matrix_product(to: Rewriter, op: MatMul, a: Node, b: Node) -> Node:
    """A product by a constant matrix on the right is a linear layer."""
    weight = to.value(b)
    if weight is None or weight.ndim != 2 or len(a.shape) < 2:
        return to.keep(op, a, b)
    return to.keep(Linear(), a, to.constant(weight.T.contiguous(), "weight"))


@parts_of(Add)
def _sum(to: Rewriter, op: Add, a: Node, b: Node) -> Node:
    """A constant row added to a linear layer without one is its bias."""
    layer, row = (a, b) if to.moves(a) else (b, a)
    bias = to.value(row)
    plain = isinstance(layer.op, Linear) and len(layer.inputs) == 2
    if not plain or bias is None or tuple(bias.shape) != (layer.shape[-1],):
        return to.keep(op, a, b)
    return to.keep(Linear(), *layer.inputs, row)


@parts_of(BatchNorm)
def _batch_norm(to: Rewriter, op: BatchNorm, x: Node, mean: Node, variance: Node, weight: Node, bias: Node) -> Node:
    spread = to.emit(Sqrt(), to.emit(Add(), variance, to.number(op.epsilon, variance)))
    scale = to.emit(Multiply(), weight, to.emit(Reciprocal(), spread))
    shift = to.emit(Subtract(), bias, to.emit(Multiply(), mean, scale))
    if _folds(to, x) and not to.moves(scale) and not to.moves(shift):
        return _folded(to, x, scale, shift)
    by_channel = Reshape((-1, *(1,) * (len(x.shape) - 2)))
    return to.emit(Add(), to.emit(Multiply(), x, to.emit(by_channel, scale)), to.emit(by_channel, shift))


def _folds(to: Rewriter, x: Node) -> bool:
    """Whether a normalised value comes from an affine layer whose weights can take the scale of each channel."""
    if not isinstance(x.op, Linear | Convolution | ConvolutionTransposed) or to.moves(x.inputs[1]):
        return False
    source = to.origin.inputs[0]
    if source.op != x.op or len(to.users[source]) > 1 or source in to.graph.outputs:
        return False
    if isinstance(x.op, Linear):
        return len(x.shape) == 2
    return isinstance(x.op, Convolution) or x.op.groups == 1


def _folded(to: Rewriter, x: Node, scale: Node, shift: Node) -> Node:
    source, weight, *bias = x.inputs
    after = len(weight.shape) - 1
    by_row = (1, -1, *(1,) * (after - 1)) if isinstance(x.op, ConvolutionTransposed) else (-1, *(1,) * after)
    scaled = to.emit(Multiply(), weight, to.emit(Reshape(by_row), scale))
    moved = to.emit(Add(), to.emit(Multiply(), bias[0], scale), shift) if bias else shift
    return to.emit(x.op, source, scaled, moved)


@parts_of(Min)
def _min(to: Rewriter, op: Min, x: Node) -> Node:
    return to.emit(Negate(), to.emit(Max(op.axes, op.keep_axes), to.emit(Negate(), x)))


@parts_of(AdaptiveMaxPool)
def _adaptive_max_pool(to: Rewriter, op: AdaptiveMaxPool, x: Node) -> Node:
    """A pool where the windows are equal; else a maximum over each window, joined axis by axis."""
    before = len(x.shape) - len(op.output)
    sizes = [size for size in x.shape[before:] if isinstance(size, int)]
    if all(size % out == 0 for size, out in zip(sizes, op.output, strict=True)):
        window = tuple(size // out for size, out in zip(sizes, op.output, strict=True))
        return to.emit(MaxPool(window, window, (0,) * len(window), (1,) * len(window)), x)
    axes = tuple(range(before, len(x.shape)))
    windows = [
        [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]
        for size, out in zip(sizes, op.output, strict=True)
    ]
    found = []
    for window in product(*windows):
        part = x
        for axis, (start, stop) in zip(axes, window, strict=True):
            part = to.emit(Slice(axis, start, stop), part)
        found.append(to.emit(Max(axes, keep_axes=True), part))
    for axis, out in reversed(list(zip(axes, op.output, strict=True))):
        found = [to.emit(Concatenate(axis), *found[i : i + out]) for i in range(0, len(found), out)]
    return found[0]


@parts_of(Einsum)
def _einsum(to: Rewriter, op: Einsum, *operands: Node) -> Node:
    """With one unknown operand affine; of two a matrix product for each setting of the labels that all share."""
    if sum(map(to.moves, operands)) == 1:
        return to.keep(op, *operands)
    terms, _, result = op.equation.replace(" ", "").partition("->")
    labels = terms.split(",")
    plain = "->" in op.equation and all(term.isalpha() and len(set(term)) == len(term) for term in labels)
    if len(operands) == 1 or not plain:
        raise to.declined(op, "of several operands that depend on the input, only products without repeated labels are")
    if len(operands) > 2:
        return _two_joined(to, operands, labels, result)
    (a, first), (b, second) = (
        _without_lone(to, node, term, other + result)
        for node, term, other in zip(operands, labels, reversed(labels), strict=True)
    )
    shared = [label for label in first if label in second and label in result]
    summed = [label for label in first if label in second and label not in result]
    rows = [label for label in first if label not in second]
    columns = [label for label in second if label not in first]
    sizes = dict(zip(first + second, (*a.shape, *b.shape), strict=True))
    left = _grouped(to, a, first, shared, (rows, summed), sizes)
    right = _grouped(to, b, second, shared, (summed, columns), sizes)
    found = to.emit(MatMul() if summed else Multiply(), left, right)
    order = [*shared, *rows, *columns]
    found = to.emit(Reshape(tuple(sizes[label] for label in order)), found)
    return to.emit(Permute(tuple(order.index(label) for label in result)), found)


def _two_joined(to: Rewriter, operands: tuple[Node, ...], labels: list[str], result: str) -> Node:
    """Two of the operands made one; a constant, where there is one, joins an unknown first, which is affine."""
    i = next(place for place, node in enumerate(operands) if to.moves(node))
    others = [place for place in range(len(operands)) if place != i]
    j = next((place for place in others if not to.moves(operands[place])), others[0])
    rest = [place for place in others if place != j]
    needed = set(result).union(*(labels[place] for place in rest))
    kept = "".join(dict.fromkeys(label for label in labels[i] + labels[j] if label in needed))
    joined = to.emit(Einsum(f"{labels[i]},{labels[j]}->{kept}"), operands[i], operands[j])
    terms = ",".join([kept, *(labels[place] for place in rest)])
    return to.emit(Einsum(f"{terms}->{result}"), joined, *(operands[place] for place in rest))


def _without_lone(to: Rewriter, node: Node, term: str, kept: str) -> tuple[Node, str]:
    """Sum over the labels that nothing else has."""
    lone = tuple(axis for axis, label in enumerate(term) if label not in kept)
    return (to.emit(Sum(lone), node) if lone else node), "".join(label for label in term if label in kept)


def _grouped(
    to: Rewriter, node: Node, term: str, shared: list[str], pair: tuple[list[str], list[str]], sizes: dict[str, Size]
) -> Node:
    """The operand as a stack of matrices: the shared axes, then one axis for each group of labels."""
    order = [*shared, *pair[0], *pair[1]]
    turned = to.emit(Permute(tuple(term.index(label) for label in order)), node)
    shape = [sizes[label] for label in shared] + [_product([sizes[label] for label in group]) for group in pair]
    return to.emit(Reshape(tuple(shape)), turned)


def _product(sizes: list[Size]) -> Size:
    """The number of entries of axes, of which at most one depends on the batch."""
    fixed = math.prod(size for size in sizes if isinstance(size, int))
    by_batch = [size for size in sizes if isinstance(size, BatchSize)]
    return BatchSize(by_batch[0].scale * fixed, by_batch[0].offset * fixed) if by_batch else fixed
