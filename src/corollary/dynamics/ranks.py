r"""The rank of each layer's weights, by measures that do not hang on a cutoff alone.

A convolution has two matrices: the kernel form `[out, in * positions of the kernel]`, which acts on one patch, and the
operator `[out * positions, in * positions]`, which acts on the whole image and holds every kernel entry many times.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from corollary.base.errors import BadInput, NothingMeasured
from corollary.base.network import Inputs, map_inputs
from corollary.evidence import PALETTE, Figure, Source, Table
from corollary.graph import Graph, GraphModule, Node, capture
from corollary.graph.ops import Convolution, ConvolutionTransposed, Linear, MatMul, Stored

GALANTI_2022 = Source(
    "galanti2022sgd",
    ("Tomer Galanti", "Zachary S. Siegel", "Aparna Gupte", "Tomaso Poggio"),
    "SGD and Weight Decay Provably Induce a Low-Rank Bias in Neural Networks",
    2022,
    arxiv="2206.05794",
)
Form = Literal["dense", "kernel", "operator"]
OPERATOR_ENTRIES = 2**22
"""Largest operator that is formed: 32 MiB in float64."""
SPECTRUM_POINTS = 96
"""Singular values of a layer that a figure holds at most."""
NAMED_CURVES = 10
"""Layers that a legend names; of more, only the first and the last."""

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_WEIGHTED = (Linear, MatMul, Convolution, ConvolutionTransposed)


class LayerRank(NamedTuple):
    """The singular values of one layer's weights in one form, in descending order, and its shape."""

    layer: str
    form: Form
    rows: int
    columns: int
    singular_values: Float[Tensor, "value"]

    @property
    def largest_possible(self) -> int:
        """The smaller side."""
        return min(self.rows, self.columns)

    def numerical(self, rtol: float = 1e-2) -> int:
        """Number of singular values above `rtol` times the largest; 0 for a matrix of zeros."""
        return int((self.singular_values > rtol * self.singular_values[0]).sum())

    @property
    def participation(self) -> float:
        r"""$(\sum \sigma)^2 / \sum \sigma^2$, between 1 and the number of values; 0 for zeros."""
        return _ratio(self.singular_values.sum().square(), self.singular_values.square().sum())

    @property
    def stable(self) -> float:
        r"""$\sum \sigma^2 / \sigma_1^2$, at most the rank; 0 for zeros."""
        return _ratio(self.singular_values.square().sum(), self.singular_values[0].square())

    @property
    def frobenius(self) -> float:
        """The Frobenius norm."""
        return float(torch.linalg.vector_norm(self.singular_values))


@dataclass(frozen=True)
class RankProfile:
    """Ranks of all layers, in the order of the network.

    Attributes:
        layers: one entry a form of a layer.
        rtol: singular values below `rtol` times the largest do not count for the numerical rank.
        skipped: layers, or forms of layers, that were not decomposed, with the reason.
    """

    layers: tuple[LayerRank, ...]
    rtol: float
    skipped: Mapping[str, str] = field(default_factory=dict)

    def table(self) -> Table:
        """A row for each form of a layer: its shape, its ranks, the largest possible one and the Frobenius norm."""
        return {
            "layer": [layer.layer for layer in self.layers],
            "form": [layer.form for layer in self.layers],
            "rows": [layer.rows for layer in self.layers],
            "columns": [layer.columns for layer in self.layers],
            "numerical": [layer.numerical(self.rtol) for layer in self.layers],
            "participation": [layer.participation for layer in self.layers],
            "stable": [layer.stable for layer in self.layers],
            "possible": [layer.largest_possible for layer in self.layers],
            "frobenius": [layer.frobenius for layer in self.layers],
        }

    def figure(self) -> Figure:
        """Singular values over the largest one, layer by layer; of a long spectrum, values evenly spaced."""
        columns: dict[str, list[Any]] = {"layer": [], "index": [], "share": [], "relative": []}
        for layer in self.layers:
            count = len(layer.singular_values)
            places = np.unique(np.linspace(0, count - 1, min(count, SPECTRUM_POINTS)).round().astype(int))
            largest = max(float(layer.singular_values[0]), 1e-300)
            columns["layer"] += [f"{layer.layer} ({layer.form})"] * len(places)
            columns["index"] += (places + 1).tolist()
            columns["share"] += ((places + 1) / count).tolist()
            columns["relative"] += (layer.singular_values.cpu().numpy()[places] / largest).tolist()
        return Figure(
            "singular-spectra",
            "Singular values of the layers",
            "Singular values over the largest one of each layer's weights, against their place in it. The dashed line "
            "is the cutoff of the numerical rank. A curve that falls off a cliff has a rank; one that decays has only "
            "a participation.",
            columns,
            lambda axes, data: _draw_spectra(axes, data, self.rtol),
        )


def rank_profile(
    net: nn.Module | Graph,
    *,
    rtol: float = 1e-2,
    inputs: Inputs | None = None,
    layers: Collection[str] | None = None,
    largest_operator: int = OPERATOR_ENTRIES,
) -> RankProfile:
    """Singular values and ranks of every weight matrix of a network, in float64.

    Args:
        net: a module or a captured graph, not written to. Every trainable or frozen parameter with two axes or more
            counts; the groups of a grouped convolution are the blocks of a block-diagonal matrix.
        rtol: relative cutoff of the numerical rank; in float32 weights carry noise of about 1e-7.
        inputs: one or more samples, from which the program is captured; then convolutions also get their operator form,
            which depends on the size of the image.
        layers: names of the weights to decompose, of those that `weight_names` gives; by default all.
        largest_operator: entries beyond which an operator is not formed.
    Raises: NothingMeasured, if there is no weight matrix; BadInput, for an unknown layer or a cutoff outside [0, 1);
        CannotCapture, if `inputs` are given and the program cannot be captured.
    Source: measures of rank as in Xu et al. 2023 and Galanti et al. 2022, arXiv 2206.05794.
    """
    if not 0 <= rtol < 1:
        raise BadInput(f"the cutoff of the numerical rank is relative to the largest singular value, got rtol={rtol}")
    matrices = _weights(net)
    graph = net if isinstance(net, Graph) else net.graph if isinstance(net, GraphModule) else None
    if graph is None and inputs is not None and isinstance(net, nn.Module):
        graph = capture(net, map_inputs(lambda tensor: tensor[:2], inputs))
    if unknown := sorted(set(layers or ()) - set(matrices)):
        raise BadInput(f"there are no weights called {unknown}. Known: {', '.join(matrices)}.")
    if not matrices:
        raise NothingMeasured("the network has no weight matrix: no parameter has two axes or more")
    nodes = _convolutions(graph)
    groups = _groups(net, nodes)
    found: list[LayerRank] = []
    skipped: dict[str, str] = {}
    for name, weight in matrices.items():
        if layers is not None and name not in layers:
            continue
        layer = name.removesuffix(".weight")
        if not bool(torch.isfinite(weight).all()):
            skipped[layer] = "it has NaN or infinite weights"
            continue
        found.append(_kernel(layer, weight, groups.get(name, 1)))
        if name in nodes:
            operator = _operator(nodes[name], weight, largest_operator)
            if isinstance(operator, str):
                skipped[f"{layer} (operator)"] = operator
            else:
                found.append(_decomposed(layer, "operator", operator))
    return RankProfile(tuple(found), rtol, skipped)


def weight_names(net: nn.Module | Graph) -> dict[str, tuple[int, int]]:
    """The names of the weights that have a rank, with the sides of their matrices."""
    return {name: (len(weight), weight[0].numel()) for name, weight in _weights(net).items()}


def unrolled_decay(
    initial: Float[Tensor, "*weight"],
    gradients: Float[Tensor, "step *weight"],
    *,
    learning_rate: float,
    weight_decay: float,
) -> Float[Tensor, "*weight"]:
    r"""Weights after T steps of SGD with decay: $(1 - \eta\lambda)^T W_0 - \eta \sum_s (1 - \eta\lambda)^{T-1-s} G_s$.

    Once the first term is gone, after some $3 / (\eta\lambda)$ steps, the weights are a sum of as many recent gradients
    as decay remembers, each of rank at most the batch size: the origin of low rank.

    Args: `gradients`: $G_s$ of each step, without the decay; `weight_decay`: as PyTorch's optimizers take it.
    Source: Xu et al. 2023, the section on low rank; Galanti et al. 2022, arXiv 2206.05794.
    """
    steps, factor = len(gradients), 1 - learning_rate * weight_decay
    weights = factor ** torch.arange(steps - 1, -1, -1, dtype=gradients.dtype, device=gradients.device)
    return factor**steps * initial - learning_rate * torch.tensordot(weights, gradients, dims=1)


def _weights(net: nn.Module | Graph) -> dict[str, Tensor]:
    """Every parameter with two axes or more; of a graph, also the weights of layers that are not trained."""
    if isinstance(net, Graph):
        stored = (node.inputs[1].op for node in net.nodes if isinstance(node.op, _WEIGHTED))
        used = [op.name for op in stored if isinstance(op, Stored)]
        named = {name: net.tensors[name] for name in dict.fromkeys((*net.parameter_names, *used))}
    else:
        named = dict(net.named_parameters())
    return {name: p.detach() for name, p in named.items() if p.ndim >= 2 and p.numel()}


def _convolutions(graph: Graph | None) -> dict[str, Node]:
    """The nodes that convolve with stored weights, by the name of these."""
    found = {}
    for node in graph.nodes if graph is not None else ():
        if isinstance(node.op, Convolution | ConvolutionTransposed) and isinstance(node.inputs[1].op, Stored):
            found[node.inputs[1].op.name] = node
    return found


def _groups(net: nn.Module | Graph, nodes: Mapping[str, Node]) -> dict[str, int]:
    modules = net.named_modules() if isinstance(net, nn.Module) else ()
    found = {f"{name}.weight".lstrip("."): m.groups for name, m in modules if isinstance(m, _CONVOLUTIONS)}
    return found | {name: node.op.groups for name, node in nodes.items() if isinstance(node.op, Convolution)}


def _kernel(layer: str, weight: Tensor, groups: int) -> LayerRank:
    form: Form = "dense" if weight.ndim == 2 else "kernel"
    if groups == 1:
        return _decomposed(layer, form, weight.flatten(1))
    blocks = weight.flatten(1).unflatten(0, (groups, -1)).double()
    values = torch.linalg.svdvals(blocks).flatten().sort(descending=True).values
    return LayerRank(layer, form, len(weight), groups * blocks.shape[2], values)


def _decomposed(layer: str, form: Form, matrix: Tensor) -> LayerRank:
    return LayerRank(layer, form, matrix.shape[0], matrix.shape[1], torch.linalg.svdvals(matrix.double()))


def _operator(node: Node, weight: Tensor, largest: int) -> Tensor | str:
    """The matrix of a convolution on the whole image, or the reason why it was not formed."""
    into, out = ([size for size in n.shape[1:] if isinstance(size, int)] for n in (node.inputs[0], node))
    if len(into) + 1 < len(node.inputs[0].shape):
        return "the size of its image depends on the batch"
    columns, rows = math.prod(into), math.prod(out)
    if rows * columns > largest:
        return f"{rows} x {columns} is too large to form"
    basis = torch.eye(columns, dtype=torch.float64, device=weight.device).reshape(columns, *into)
    return node.op.at(columns)(basis, weight.double()).flatten(1).T


def _ratio(above: Tensor, below: Tensor) -> float:
    return float(above / below) if bool(below > 0) else 0.0


def _draw_spectra(axes: Any, data: Mapping[str, Any], rtol: float) -> None:
    from matplotlib import colormaps

    layers = np.asarray(data["layer"])
    names = list(dict.fromkeys(layers.tolist()))
    for i, name in enumerate(names):
        own = layers == name
        if len(names) <= NAMED_CURVES:
            style = {"color": PALETTE[i % len(PALETTE)], "ls": "-" if i < len(PALETTE) else ":", "label": name}
        else:
            style = {"color": colormaps["viridis"](i / (len(names) - 1)), "lw": 0.9}
            style |= {"label": name} if i in (0, len(names) - 1) else {}
        axes.plot(np.asarray(data["share"])[own], np.asarray(data["relative"])[own], **style)
    axes.axhline(rtol, color=PALETTE[6], lw=1, ls="--")
    axes.set(xlabel="place among the layer's singular values", ylabel="singular value / largest", yscale="log")
    axes.set_ylim(bottom=np.clip(np.min(data["relative"]) / 2, 1e-8, 1e-3), top=1.5)
    axes.legend()
