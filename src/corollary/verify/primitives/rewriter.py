"""Rewriting a graph op by op: constants computed, equal nodes merged, ops written out by the rules of other modules."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from corollary.base.errors import NoRule
from corollary.graph import Graph, Node
from corollary.graph.builder import Builder
from corollary.graph.ops import (
    ELU,
    GELU,
    Abs,
    Cast,
    Clamp,
    Cos,
    Erf,
    Exp,
    Floor,
    HardSigmoid,
    HardSwish,
    Input,
    LeakyReLU,
    Log,
    MatMul,
    Max,
    MaxPool,
    Mish,
    Multiply,
    Op,
    Power,
    Reciprocal,
    ReLU,
    Sigmoid,
    Sign,
    SiLU,
    Sin,
    Softplus,
    Sqrt,
    Stored,
    Tanh,
    Torch,
)
from corollary.verify.log_odds import LogOdds

Range: TypeAlias = tuple[float, float]
Parts: TypeAlias = Callable[..., Node]
"""parts(rewriter, op, *inputs) -> the node that computes the op."""

NONLINEAR = (
    ReLU, LeakyReLU, Abs, Clamp, HardSigmoid, HardSwish, ELU, GELU, SiLU, Mish, Softplus, Sigmoid, Tanh, Erf, Sin, Cos,
    Exp, Log, Sqrt, Reciprocal, Power, Sign, Floor, Multiply, MatMul, Max, MaxPool, LogOdds,
)  # fmt: skip
"""The ops besides affine ones that a graph of primitives may apply to values that depend on the network's inputs."""

WRITTEN_OUT: dict[type[Op], Parts] = {}
"""What ops are made of, by op class."""


def parts_of(*op_types: type[Op]) -> Callable[[Parts], Parts]:
    """Decorator: how these op classes are written out. Called only where an input depends on the network's inputs."""

    def enter(parts: Parts) -> Parts:
        WRITTEN_OUT.update(dict.fromkeys(op_types, parts))
        return parts

    return enter


def is_primitive(op: Op, moving: frozenset[int]) -> bool:
    """Whether bounds understand an op of which the inputs at `moving` depend on the network's inputs."""
    return isinstance(op, NONLINEAR) or op.affine_in(moving)


def primitives(graph: Graph) -> tuple[Graph, dict[Node, Range]]:
    """The same function in ops that bounds understand: `NONLINEAR` ones, and ops affine in what depends on the inputs.

    What does not depend on the inputs is computed and stored, so the result has no parameters. Equal nodes are
    merged. Nodes keep layer and source line of the op that they come from. A softmax is the sigmoid of log-odds;
    under a mask it is exp(x_k) / sum_i exp(x_i), without the usual shift by the largest, which would bring every input
    in twice: in single precision it overflows for x > 88, and bounds are infinite there.

    Returns: the graph; and values that nodes cannot leave although their ops could: a softmax stays in [0, 1], a
        standardised value of n within sqrt(n - 1).

    Raises: NoRule, naming the node, for an op that has no parts: a call outside the vocabulary, an index that depends
        on the inputs, a sort of more than 16, an Einstein sum of two unknowns that is no matrix product.
    """
    with torch.no_grad():
        return Rewriter(graph).run()


class Rewriter:
    """The state of one rewriting; rules call `emit`, which writes out, folds and merges."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.users = graph.users()
        self.origin = graph.nodes[0]
        self.ranges: dict[Node, Range] = {}
        self._builder = Builder(graph.origin)
        self._builder.device = next((tensor.device for tensor in graph.tensors.values()), torch.device("cpu"))
        self._moving: set[Node] = set()
        self._merged: dict[Any, Node] = {}
        self._values: dict[Node, Any] = {}
        self._new: dict[Node, Node] = {}

    def run(self) -> tuple[Graph, dict[Node, Range]]:
        """Rewrite node by node."""
        for node in self.graph.nodes:
            if isinstance(node.op, Stored):
                self._values[node] = self.graph.tensors[node.op.name]
            elif isinstance(node.op, Input):
                self._new[node] = self._builder.input(node.op.name, node.shape, node.dtype)
                self._moving.add(self._new[node])
            elif self._foldable(node):
                self._values[node] = node.op(*(self._values[source] for source in node.inputs))
            else:
                sources = [self._taken(source) for source in node.inputs]
                self._place(node)
                self._new[node] = self.emit(node.op, *sources)
        outputs = [self._taken(node) for node in self.graph.outputs]
        graph = self._builder.finish(
            outputs, output_names=self.graph.output_names, returns_tuple=self.graph.returns_tuple
        )
        present = set(graph.nodes)
        return graph, {node: range for node, range in self.ranges.items() if node in present}

    def emit(self, op: Op, *inputs: Node) -> Node:
        """The node of an op: written out where it has parts, computed where all inputs are constants."""
        if not any(map(self.moves, inputs)):
            return self.keep(op, *inputs)
        inputs = self._of_one_dtype(inputs)
        parts = WRITTEN_OUT.get(type(op))
        if parts is None:
            return self.keep(op, *inputs)
        node = parts(self, op, *inputs)
        if node.op is not op:
            self.hold(node, op.range)
        return node

    def keep(self, op: Op, *inputs: Node) -> Node:
        """The node of an op as it is; the same node for the same op and inputs."""
        moving = frozenset(i for i, source in enumerate(inputs) if self.moves(source))
        if moving and not is_primitive(op, moving):
            raise self.declined(op)
        key = None if isinstance(op, Torch) else (op, inputs)
        if key is not None and key in self._merged:
            return self._merged[key]
        own = type(op) is type(self.origin.op)
        name = self.origin.name if own else f"{self.origin.name}/{type(op).__name__.lower()}"
        node = self._builder.emit(op, *inputs, name=name)
        if moving:
            self._moving.add(node)
        if key is not None:
            self._merged[key] = node
        return node

    def hold(self, node: Node, range: Range) -> None:
        """Note values that a node cannot leave."""
        known = self.ranges.get(node, (-math.inf, math.inf))
        found = max(known[0], range[0]), min(known[1], range[1])
        if self.moves(node) and found != (-math.inf, math.inf):
            self.ranges[node] = found

    def moves(self, node: Node) -> bool:
        """Whether the node depends on the network's inputs."""
        return node in self._moving

    def value(self, node: Node) -> Tensor | None:
        """The value of a constant; None where it depends on the inputs, or on the batch."""
        return self._builder.value(node) if self._builder.is_constant(node) else None

    def constant(self, value: Tensor, name: str = "constant") -> Node:
        """A tensor as a node."""
        return self._builder.constant(f"{self.origin.name}/{name}", value)

    def number(self, value: float, like: Node) -> Node:
        """A number in the dtype of a node."""
        return self._builder.scalar(value, like.dtype)

    def declined(self, op: Op, reason: str = "") -> NoRule:
        """The error for an op that cannot be written out at the present node."""
        return NoRule(
            f"{op} cannot be written out in primitive ops ({self.origin.where()}){': ' + reason if reason else ''}.\n"
            "Linear bounds need an op that is affine in what depends on the input, or one with a relaxation; "
            "interval bounds may still have a rule for it."
        )

    def _foldable(self, node: Node) -> bool:
        known = all(source in self._values for source in node.inputs)
        return known and node.op.at(1) is node.op and not node.op.random

    def _taken(self, node: Node) -> Node:
        """The new node of an old one; a constant becomes a node when it is first read."""
        if node not in self._new:
            self._place(node)
            self._new[node] = self._builder.constant(node.name, self._values[node])
        return self._new[node]

    def _place(self, node: Node) -> None:
        self.origin, self._builder.layer, self._builder.source = node, node.layer, node.source

    def _of_one_dtype(self, inputs: tuple[Node, ...]) -> tuple[Node, ...]:
        """Floating constants in the dtype of what they meet: casts between floating types are left out."""
        dtype = next(node.dtype for node in inputs if self.moves(node))
        if not dtype.is_floating_point:
            return inputs
        return tuple(
            self.keep(Cast(dtype), node) if node.dtype.is_floating_point and node.dtype != dtype else node
            for node in inputs
        )
