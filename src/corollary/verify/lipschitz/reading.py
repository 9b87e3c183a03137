"""Reading a network's linear maps and nonlinearities off its captured program."""

import math
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.graph import Graph, Node, capture, forward
from corollary.graph import ops as op
from corollary.verify.lipschitz.constraints import (
    Bounded,
    Nonlinearity,
    Slopes,
    reflected_groups,
    sorted_groups,
)
from corollary.verify.lipschitz.implicit import Equilibrium
from corollary.verify.lipschitz.system import System, Unit
from corollary.verify.sorting import Householder

LARGEST = 6000
"""Entries of the input and of all nonlinearities together; each linear map between them is held as a dense matrix."""
SLOPES: dict[type[op.Op], tuple[float, float]] = {  # of those that are not monotone, rounded outwards
    op.Abs: (-1.0, 1.0),
    op.GELU: (-0.1291, 1.1291),
    op.SiLU: (-0.0999, 1.0999),
    op.Mish: (-0.1127, 1.0885),
    op.HardSwish: (-0.5, 1.5),
}
TWO_SLOPES = (op.ReLU, op.LeakyReLU, op.Abs, op.Clamp, op.PReLU)


class UnsupportedLayer(BadInput, TypeError):
    """A layer from which no global Lipschitz bound can be made; the message names it."""


def system_of(model: nn.Module | Graph | System, example: Tensor | None = None) -> System:
    """The linear maps and nonlinearities of a network, in float64.

    Args:
        model: a module whose program can be captured, a graph, or an `nn.Sequential` with `Equilibrium` layers in it.
        example: an input batch; without one, the input is as wide as the first linear layer takes it.
    Raises: UnsupportedLayer (a TypeError), naming the layer, if no bound can be made from it. BadInput, if the network
        is too large, or has several inputs or outputs. CannotCapture, if there is no program.
    """
    if isinstance(model, System):
        return model
    if isinstance(model, Graph):
        return _of_graph(model, {})
    if isinstance(model, Equilibrium):
        return _of_equilibrium(model)
    if isinstance(model, nn.Sequential) and any(isinstance(child, Equilibrium) for child in model):
        return _of_parts(model, example)
    graph = capture(model, torch.zeros(2, *input_shape(model, example), dtype=torch.float64), dtype=torch.float64)
    return _of_graph(graph, {name: m for name, m in model.named_modules() if isinstance(m, Householder)})


def input_shape(model: nn.Module, example: Tensor | None = None) -> tuple[int, ...]:
    """The shape of one input: that of the example's samples, or as many numbers as the first linear layer takes.

    Raises: BadInput, if the model starts with another kind of layer.
    """
    if example is not None:
        return tuple(example.shape[1:])
    for module in model.modules():
        if isinstance(module, nn.Linear):
            return (module.in_features,)
        if isinstance(module, Equilibrium):
            return (module.input.shape[1],)
        if not list(module.children()) and list(module.parameters(recurse=False)):
            break
    raise BadInput("the shape of the network's input cannot be told from its layers: pass example=, an input batch")


def _of_parts(model: nn.Sequential, example: Tensor | None) -> System:
    """A sequence, cut at its equilibrium layers: these are loops, and no part of a program that is captured."""
    whole: System | None = None
    for implicit, layers in groupby(model, key=lambda layer: isinstance(layer, Equilibrium)):
        for part in layers if implicit else [nn.Sequential(*layers)]:
            given = example if whole is None else torch.zeros(2, len(whole.output))
            system = system_of(part, given)
            whole = system if whole is None else whole.then(system)
    assert whole is not None  # it has an equilibrium layer
    return whole


def _of_equilibrium(model: Equilibrium) -> System:
    """w = phi(W w + U x): the activation's own unit with W and U before it."""
    state, read = (weight.detach().double() for weight in (model.state, model.input))
    activation = system_of(nn.Sequential(model.activation), torch.zeros(2, len(state)))
    direct, *through = activation.parts(activation.output)
    if len(through) != 1 or direct.any():
        raise BadInput("an equilibrium layer needs an activation of one nonlinearity (nn.ReLU, MaxMin, Householder)")
    (unit,) = activation.units
    before = unit.map[:, : len(state)]
    loop = Unit(unit.nonlinearity, torch.cat([before @ read, before @ state @ through[0]], dim=1))
    return System(read.shape[1], (loop,), torch.cat([torch.zeros_like(read), through[0]], dim=1))


def _of_graph(graph: Graph, reflections: Mapping[str, Householder]) -> System:
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise BadInput(
            f"a Lipschitz bound is for one input and one output tensor; this network has {len(graph.inputs)} and "
            f"{len(graph.outputs)}"
        )
    reader = _Reader(graph, reflections)
    entered = torch.zeros(reader.rows, reader.inputs, dtype=torch.float64)
    entered[: reader.inputs] = torch.eye(reader.inputs, dtype=torch.float64)
    stored = {name: t.double() if t.is_floating_point() else t for name, t in graph.tensors.items()}
    found = forward(graph, [entered.reshape(-1, *_shape(graph.inputs[0]))], stored, reader.apply, batch=reader.rows)
    end = found[graph.outputs[0]]
    if graph.outputs[0] not in reader.varying:
        raise BadInput("the network's output does not depend on its input: its Lipschitz constant is 0")
    used = reader.used
    units = tuple(Unit(unit.nonlinearity, unit.map[:, :used]) for unit in reader.units)
    return System(reader.inputs, units, end.flatten(1).T[:, :used].clone())


class _Reader:
    """Carries linear maps through a graph: a value is (source entry, *shape), the image of each source entry.

    The entries of the sources stand in the batch axis, so that an affine op serves as it is, less its offset.
    """

    def __init__(self, graph: Graph, reflections: Mapping[str, Householder]):
        self.varying = graph.depends_on_inputs()
        self.inputs = entries(graph.inputs[0])
        self.reflections = _reflecting(graph, reflections, self.varying)
        bending = [node for node in graph.computing() if self._bends(node)]
        self.rows = self.inputs + sum(entries(node) for node in bending)
        if self.rows > LARGEST:
            raise BadInput(
                f"the network's input and nonlinearities have {self.rows} entries, and a semidefinite Lipschitz bound "
                f"is for at most {LARGEST}: bound a part of it, or use a smaller input"
            )
        self.units: list[Unit] = []
        self.used = self.inputs
        self._distances: dict[tuple[Node, ...], Tensor] = {}
        self._entered: dict[str, Tensor] = {}

    def apply(self, node: Node, bound: op.Op, values: tuple[Any, ...]) -> Any:
        """The value of a node, as `forward` asks for it."""
        if node not in self.varying:
            return bound(*values)
        if node in self.reflections:
            return self._reflected(node, values)
        self._check(node)
        varies = [source in self.varying for source in node.inputs]
        if _affine(node, varies):
            still = tuple(torch.zeros_like(v) if moves else v for v, moves in zip(values, varies, strict=True))
            return bound(*values) - bound(*still)
        if isinstance(node.op, op.Maximum | op.Minimum):
            return self._larger(node, values, varies)
        if sum(varies) != 1 or not varies[0]:
            raise self._unsupported(node, "it multiplies or compares values that depend on the input")
        return self._unit(_nonlinearity(node, values), values[0], node)

    def _bends(self, node: Node) -> bool:
        if node in self.reflections:
            return self.reflections[node][1] is node
        return node in self.varying and not _affine(node, [source in self.varying for source in node.inputs])

    def _unit(self, nonlinearity: Nonlinearity, read: Tensor, node: Node) -> Tensor:
        """Add a unit that reads a value; its output is a source of its own."""
        self.units.append(Unit(nonlinearity, read.flatten(1).T))
        size = nonlinearity.outputs
        output = read.new_zeros(self.rows, size)
        output[self.used : self.used + size] = torch.eye(size, dtype=read.dtype)
        self.used += size
        return output.reshape(self.rows, *_shape(node))

    def _larger(self, node: Node, values: tuple[Any, ...], varies: list[bool]) -> Tensor:
        """max(a, b) = (a + b + |a - b|) / 2, min with the same distance: a pair of both keeps its sum."""
        a, b = (v if moves else torch.zeros_like(v) for v, moves in zip(values, varies, strict=True))
        a, b = torch.broadcast_tensors(a, b)
        key = tuple(sorted(node.inputs, key=id))
        if key not in self._distances:
            one = torch.ones(entries(node), dtype=a.dtype)
            self._distances[key] = self._unit(Slopes(node.name, -one, one, pieces=True), a - b, node)
        sign = 1 if isinstance(node.op, op.Maximum) else -1
        return (a + b + sign * self._distances[key]) / 2

    def _reflected(self, node: Node, values: tuple[Any, ...]) -> Any:
        """A Householder layer as one unit: its value is made at its last node, from what its first one read."""
        module, last = self.reflections[node]
        outside = [
            v for v, s in zip(values, node.inputs, strict=True) if s in self.varying and s not in self.reflections
        ]
        if outside:
            self._entered.setdefault(node.layer, outside[0])
        if node is not last:
            return values[0]  # never read: the nodes inside compute nothing
        read = self._entered.pop(node.layer)
        index = _runs(torch.arange(entries(node)).reshape(read.shape[1:]), module.size)
        direction = module.unit().detach().double().reshape(-1, module.size)
        each = index.shape[0] // (read.shape[1] // module.size)
        direction = direction.expand(read.shape[1] // module.size, module.size).repeat_interleave(each, dim=0)
        return self._unit(reflected_groups(node.layer, index, direction), read, node)

    def _check(self, node: Node) -> None:
        axes = getattr(node.op, "axes", ()) if not isinstance(node.op, op.Permute) else ()
        mixes = getattr(node.op, "axis", None) == 0 or 0 in axes
        if mixes or not node.shape or node.shape[0] != op.BatchSize():
            raise self._unsupported(node, "it mixes samples, or moves the batch axis")

    def _unsupported(self, node: Node, reason: str) -> UnsupportedLayer:
        return UnsupportedLayer(f"no global Lipschitz bound passes {node.op} ({node.where()}): {reason}")


def entries(node: Node) -> int:
    """Numbers in one sample of a node's value."""
    return math.prod(_shape(node))


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(size for size in node.shape[1:] if isinstance(size, int))


def _affine(node: Node, varies: list[bool]) -> bool:
    return node.op.affine_in(frozenset(i for i, moves in enumerate(varies) if moves))


def _nonlinearity(node: Node, values: tuple[Any, ...]) -> Nonlinearity:
    """What is known of an op of one varying input.

    Raises: UnsupportedLayer, if that is nothing.
    """
    name = node.layer or node.name
    place = torch.arange(values[0][0].numel()).reshape(values[0].shape[1:])
    if isinstance(node.op, op.Sort):
        return sorted_groups(name, place.movedim(node.op.axis - 1, -1).flatten(0, -2))
    if isinstance(node.op, op.PReLU):
        weight = values[1].double().reshape(-1, *(1,) * (place.ndim - 1)).expand(place.shape).flatten()
        return Slopes(name, weight.clamp(max=1), weight.clamp(min=1), pieces=True)
    constant = node.op.lipschitz
    if constant is None:
        raise UnsupportedLayer(
            f"no global Lipschitz bound passes {node.op} ({node.where()}): its slope has no bound that is known"
        )
    if not isinstance(node.op, op.Elementwise):
        return Bounded(name, place.numel(), entries(node), constant)
    low, high = _slopes(node.op, constant)
    one = torch.ones(place.numel(), dtype=torch.float64)
    return Slopes(name, low * one, high * one, pieces=isinstance(node.op, TWO_SLOPES))


def _slopes(bends: op.Elementwise, constant: float) -> tuple[float, float]:
    if isinstance(bends, op.LeakyReLU):
        return min(bends.slope, 1.0), max(bends.slope, 1.0)
    if bends.monotone:
        return (0.0, constant) if bends.monotone > 0 else (-constant, 0.0)
    return SLOPES.get(type(bends), (-constant, constant))


def _runs(places: Tensor, size: int) -> Tensor:
    """Groups of consecutive channels (axis 0), position by position: (group, size)."""
    return places.unflatten(0, (-1, size)).movedim(1, -1).flatten(0, -2)


def _reflecting(
    graph: Graph, reflections: Mapping[str, Householder], varying: frozenset[Node]
) -> dict[Node, tuple[Householder, Node]]:
    """The nodes of each Householder layer that is called once, with the last of them."""
    found: dict[Node, tuple[Householder, Node]] = {}
    for name, module in reflections.items():
        inside = [node for node in graph.nodes if node.layer == name and node in varying]
        entering = {source for node in inside for source in node.inputs if source in varying} - set(inside)
        if len(entering) == 1:
            found.update(dict.fromkeys(inside, (module, inside[-1])))
    return found
