"""A network made ready for bounds: primitive ops, constants evaluated, a relaxation for each nonlinear node."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from corollary.base.errors import BadInput, NoRule
from corollary.base.network import Inputs
from corollary.graph import Graph, Node, capture, forward
from corollary.graph.ops import (
    Add,
    Elementwise,
    Input,
    MatMul,
    Max,
    MaxPool,
    Multiply,
    Negate,
    Op,
    Permute,
    Reshape,
    Sigmoid,
    Stored,
    Subtract,
)
from corollary.verify.layout import pack, sample_axis, sample_size, unpack
from corollary.verify.log_odds import LogOdds
from corollary.verify.primitives import primitives
from corollary.verify.relaxations import Relaxation, relaxation
from corollary.verify.transpose import size_at

Ranges = Mapping[Node, tuple[float, float]]
"""Values that a node cannot leave, whatever the input: what the op it was written out from is known to keep."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A graph of primitive ops with what every bound of it needs.

    Args:
        graph: of primitive ops; its floating tensors have `dtype` and lie on `device`.
        ranges: values that nodes cannot leave.
        matrices: convolutions of small windows, written out as they are needed.
    """

    graph: Graph
    ranges: Ranges
    dtype: torch.dtype
    device: torch.device
    _offsets: dict[Node, Tensor | None] = field(default_factory=dict)
    _upstream: dict[Node, frozenset[Node]] = field(default_factory=dict)
    matrices: dict[tuple[Node, int, int], Tensor] = field(default_factory=dict)

    @cached_property
    def perturbed(self) -> frozenset[Node]:
        """The nodes that depend on the network's inputs."""
        return self.graph.depends_on_inputs()

    @cached_property
    def constants(self) -> dict[Node, Tensor]:
        """The values of the other nodes, for one sample where they have a batch axis."""
        wanted = {source for node in self.perturbed for source in node.inputs} - self.perturbed
        wanted |= set(self.graph.outputs) - self.perturbed
        held = [node for node in self.graph if node not in self.perturbed]
        part = Graph(tuple(held), (), tuple(wanted), self.graph.tensors, ())
        return forward(part, (), self.graph.tensors, _compute, batch=1, keep=wanted)

    @cached_property
    def relaxations(self) -> dict[Node, Relaxation]:
        """The relaxation of each nonlinear node of one variable."""
        found = {}
        for node in self.nonlinear:
            if not isinstance(node.op, Multiply | MatMul | Max | MaxPool | LogOdds):
                known = relaxation(node.op)
                assert known is not None
                found[node] = known
        return found

    @cached_property
    def shares(self) -> dict[Node, int]:
        """Nodes whose entries sum to one along an axis, and the axis, counted from the last of a sample."""
        found = {}
        for node in self.nonlinear:
            if isinstance(node.op, Sigmoid) and isinstance(node.inputs[0].op, LogOdds):
                found[node] = sample_axis(node, node.inputs[0].op.axis)
        return found

    def moving(self, node: Node) -> tuple[int, ...]:
        """Positions of the inputs of a node that depend on the network's inputs."""
        return tuple(i for i, source in enumerate(node.inputs) if source in self.perturbed)

    def is_nonlinear(self, node: Node) -> bool:
        """Whether the node is not affine in what depends on the network's inputs."""
        return not node.op.affine_in(frozenset(self.moving(node)))

    @cached_property
    def nonlinear(self) -> tuple[Node, ...]:
        """The nodes that need a relaxation, in order.

        Raises: NoRule, naming the node, for an op that is no product of two, no maximum, and has no relaxation.
        """
        found = []
        for node in self.graph:
            if node not in self.perturbed or isinstance(node.op, Input | Stored) or not self.is_nonlinear(node):
                continue
            several = isinstance(node.op, Multiply | MatMul | Max | MaxPool | LogOdds)
            if not several and (len(node.inputs) != 1 or relaxation(node.op) is None):
                raise NoRule(
                    f"linear bounds have no relaxation for {node.op} ({node.where()}).\n"
                    "Register one with corollary.verify.register_function, or use method='interval'."
                )
            found.append(node)
        return tuple(found)

    @cached_property
    def exact(self) -> frozenset[Node]:
        """Nodes whose interval bounds over a box are exact: one mixing of entries that vary independently."""
        independent: set[Node] = set(self.graph.inputs)
        exact: set[Node] = set(self.graph.inputs)
        for node in self.graph:
            moving = self.moving(node)
            if len(moving) != 1 or node.inputs[moving[0]] not in exact:
                continue
            source = node.inputs[moving[0]]
            entrywise = isinstance(node.op, Elementwise | Reshape | Permute | Negate) or (
                isinstance(node.op, Add | Subtract | Multiply) and source.shape == node.shape
            )
            if entrywise and source in independent:
                independent.add(node)
            if entrywise or source in independent:
                exact.add(node)
        return frozenset(exact)

    @cached_property
    def sizes(self) -> dict[Node, int]:
        """Entries of one sample's value, of the nodes that depend on the inputs."""
        return {node: sample_size(node) for node in self.graph if node in self.perturbed}

    @cached_property
    def bounded(self) -> frozenset[Node]:
        """The nodes whose bounds a relaxation reads."""
        return frozenset(source for node in self.nonlinear for source in node.inputs if source in self.perturbed)

    def upstream(self, start: Node) -> frozenset[Node]:
        """The nodes that `start` depends on, itself among them."""
        if start not in self._upstream:
            found = {start}
            for node in reversed(self.graph.nodes):
                if node in found:
                    found.update(node.inputs)
            self._upstream[start] = frozenset(found)
        return self._upstream[start]

    def until(self, node: Node) -> "Prepared":
        """The part of the network that a node depends on, with this node as its output."""
        held = self.graph
        nodes = tuple(other for other in held.nodes if other in self.upstream(node))
        return replace(self, graph=Graph(nodes, held.inputs, (node,), held.tensors, ()))

    def operand(self, node: Node, batch: int) -> Tensor:
        """The value of a constant node for so many samples."""
        value = self.constants[node]
        if any(not isinstance(size, int) for size in node.shape):
            if value.shape == size_at(node, batch):
                return value
            one = unpack(node, value, 1, 1)
            return pack(node, one.expand(batch, *one.shape[1:]))
        return value

    def operands(self, node: Node, batch: int) -> list[Tensor | None]:
        """The constant inputs of a node, None for the others."""
        return [None if source in self.perturbed else self.operand(source, batch) for source in node.inputs]

    def offset(self, node: Node) -> Tensor | None:
        """The value of an affine node at zero, (1, 1, *sample); None where it is zero."""
        if node not in self._offsets:
            values = [
                self.graph_zero(source) if value is None else value
                for source, value in zip(node.inputs, self.operands(node, 1), strict=True)
            ]
            value = unpack(node, node.op.at(1)(*values), 1, 1)
            self._offsets[node] = value if bool(value.any()) else None
        return self._offsets[node]

    def graph_zero(self, node: Node) -> Tensor:
        """Zeros in the shape of one sample's value."""
        return torch.zeros(size_at(node, 1), dtype=self.dtype, device=self.device)


def prepare(model: nn.Module | Graph, example: Inputs | None = None, *, dtype: torch.dtype | None = None) -> Prepared:
    """Capture (where a module is given), rewrite in primitive ops, bring to one dtype.

    Args: `dtype`: the network's own where None.
    Raises: CannotCapture, NoRule.
    """
    if isinstance(model, Graph):
        graph = model
    elif example is None:
        raise BadInput("a module needs an example of its input to be captured with")
    else:
        graph = capture(model, example, dtype=dtype)
    simple, ranges = primitives(graph)
    first = graph.inputs[0]
    dtype = dtype or first.dtype
    device = next((tensor.device for tensor in graph.tensors.values()), torch.device("cpu"))
    tensors = {
        name: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in simple.tensors.items()
    }
    held = Graph(
        simple.nodes, simple.inputs, simple.outputs, tensors, (), simple.output_names, simple.returns_tuple, None,
        simple.origin,
    )  # fmt: skip
    return Prepared(held, ranges, dtype, device)


def _compute(node: Node, op: Op, values: tuple) -> Tensor:
    return op(*values)
