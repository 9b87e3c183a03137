"""The last affine layer of a classifier: what goes into it, its weights, and what the network answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import Inputs, batch_length, batches, call, evaluating, map_inputs
from corollary.graph import Graph, GraphModule, Node, capture, values
from corollary.graph.ops import Convolution, ConvolutionTransposed, Einsum, Linear, MatMul
from corollary.linalg.problem import Data

_AFFINE = (Linear, MatMul, Convolution, ConvolutionTransposed, Einsum)


class LastLayer(NamedTuple):
    """What a classifier does last, over a data set.

    Fields:
        name: of the layer, or of its node in the program.
        features: its input, flattened by sample.
        labels: of the data.
        predictions: the labels that the network gives.
        weight: its matrix, a row an output; None where the named layer is not `nn.Linear`.
    """

    name: str
    features: Float[Tensor, "sample feature"]
    labels: Int64[Tensor, "sample"]
    predictions: Int64[Tensor, "sample"]
    weight: Float[Tensor, "score feature"] | None


def last_layer_on(net: nn.Module | Graph, data: Data, *, layer: str | None, batch_size: int = 1024) -> LastLayer:
    """Run the network over `data` and keep what goes into its last affine layer, or into the module called `layer`.

    Raises: BadInput, if there is no such layer; CannotCapture, if the program is needed and cannot be captured.
    """
    parts = list(batches(data, batch_size))
    if not parts:
        raise BadInput("the data is empty: at least one batch is needed")
    labels = torch.cat([_labels(targets) for _, targets in parts])
    if layer is not None:
        name, features, outputs, weight = _by_hook(net, [inputs for inputs, _ in parts], layer)
    else:
        name, features, outputs, weight = _by_graph(net, [inputs for inputs, _ in parts])
    return LastLayer(name, features, labels, _predictions(outputs, labels.to(outputs.device)), weight)


def _by_graph(net: nn.Module | Graph, inputs: list[Inputs]) -> tuple[str, Tensor, Tensor, Tensor]:
    source = net.graph if isinstance(net, GraphModule) else net
    graph = source if isinstance(source, Graph) else capture(source, map_inputs(lambda t: t[:2], inputs[0]))
    node = last_affine(graph)
    before, weight = node.inputs[0], node.inputs[1]
    features, outputs = [], []
    with torch.no_grad():
        for part in inputs:
            found = values(graph, part, (before, weight))
            features.append(found[before].detach().flatten(1))
            outputs.append(found[graph.outputs[0]].detach())
    matrix = found[weight].detach()
    matrix = matrix.T if isinstance(node.op, MatMul) else matrix
    return node.layer or node.name, torch.cat(features), torch.cat(outputs), matrix


def last_affine(graph: Graph) -> Node:
    """The node that multiplies features by a matrix of weights, behind which no other layer stands.

    Raises: BadInput, if the last layer is of another kind, if a path leads around it, or if the network has several
        outputs.
    """
    if len(graph.outputs) != 1 or len(graph.outputs[0].shape) not in (1, 2):
        shapes = ", ".join("x".join(map(str, node.shape)) for node in graph.outputs)
        raise BadInput(f"a classifier returns one tensor, [n, classes] or [n]; this network returns {shapes}")
    moving, before = graph.depends_on_inputs(), _ancestors(graph, graph.outputs[0])
    found = [node for node in graph.nodes if isinstance(node.op, _AFFINE) and node in moving and node in before]
    if not found:
        raise BadInput(
            "the network's program has no affine layer with weights: name the module whose input to take as features, "
            "with layer='...'"
        )
    last = found[-1]
    plain = isinstance(last.op, Linear | MatMul) and len(last.inputs[0].shape) == 2 and last.inputs[1] not in moving
    if not plain:
        raise BadInput(
            f"the last affine layer is {last.op} ({last.where()}), not a matrix applied to one vector of features a "
            "sample: name the module whose input to take as features, with layer='...'"
        )
    behind = {last}
    for node in graph.nodes:
        if node in before and any(source in behind for source in node.inputs):
            behind.add(node)
            if around := [source for source in node.inputs if source in moving and source not in behind]:
                raise BadInput(
                    f"a path through {around[0].where()} leads around the last affine layer ({last.where()}): name the "
                    "module whose input to take as features, with layer='...'"
                )
    return last


def _ancestors(graph: Graph, end: Node) -> frozenset[Node]:
    found = {end}
    for node in reversed(graph.nodes):
        if node in found:
            found.update(node.inputs)
    return frozenset(found)


def _by_hook(net: nn.Module | Graph, inputs: list[Inputs], layer: str) -> tuple[str, Tensor, Tensor, Tensor | None]:
    modules = dict(net.named_modules()) if isinstance(net, nn.Module) else {}
    if layer not in modules or not layer:
        known = [name for name, module in modules.items() if name and not list(module.children())]
        raise BadInput(
            f"there is no module {layer!r} in the network whose input could be taken. "
            f"Known: {', '.join(known[:30]) or 'none'}{', ...' if len(known) > 30 else ''}."
        )
    assert isinstance(net, nn.Module)  # a graph has no modules
    module = modules[layer]
    features, outputs = [], []
    with torch.no_grad(), evaluating(net), _recording(module) as seen:
        for part in inputs:
            seen.clear()
            outputs.append(call(net, part))
            if len(seen) != 1 or len(seen[0]) != batch_length(part):
                raise BadInput(
                    f"module {layer!r} was called {len(seen)} times in one pass"
                    + (f" with {len(seen[0])} rows for {batch_length(part)} samples" if len(seen) == 1 else "")
                    + ": features are the input of a module that is called once, with a row a sample"
                )
            features.append(seen[0].flatten(1))
    weight = module.weight.detach() if isinstance(module, nn.Linear) else None
    if weight is not None and weight.shape[1] != features[0].shape[1]:
        weight = None  # it was applied to several positions of each sample
    return layer, torch.cat(features), torch.cat(outputs), weight


@contextmanager
def _recording(module: nn.Module) -> Iterator[list[Tensor]]:
    """The first positional input of each call of `module` inside the block."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            seen.append(args[0].detach())

    handle = module.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _labels(targets: Tensor) -> Tensor:
    if targets.ndim == 2 and targets.shape[1] > 1:
        return targets.argmax(dim=1)
    flat = targets.reshape(len(targets), -1)
    whole = not flat.is_floating_point() or bool((flat == flat.round()).all())
    if flat.shape[1] != 1 or not whole:
        raise BadInput(
            f"labels are integers [n] or one-hot rows [n, classes], got {targets.dtype} {list(targets.shape)}: "
            "neural collapse is of classifiers"
        )
    return flat[:, 0].long()


def _predictions(outputs: Tensor, labels: Tensor) -> Tensor:
    if outputs.ndim == 2 and outputs.shape[1] > 1:
        if int(labels.max()) >= outputs.shape[1] or int(labels.min()) < 0:
            raise BadInput(
                f"labels run from {int(labels.min())} to {int(labels.max())}, but the network has {outputs.shape[1]} "
                "outputs: classes are numbered from 0"
            )
        return outputs.argmax(dim=1)
    if outputs.ndim not in (1, 2):
        raise BadInput(f"a classifier returns [n, classes] or [n], got {list(outputs.shape)}")
    classes = labels.unique()
    if len(classes) > 2:
        raise BadInput(f"the network has one output, which tells two classes apart; the labels have {len(classes)}")
    return classes[(outputs.reshape(-1) > 0).long().clamp(max=len(classes) - 1)]
