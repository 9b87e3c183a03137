"""Half-spaces in which a network's units are on: their normals by layer, and whether samples of a kind share them."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from corollary.base.errors import BadInput, NoRule
from corollary.geometry.affine import as_graph, local_rows, sample_size
from corollary.geometry.alignment import kernel_alignment, linear_kernel
from corollary.geometry.codes import ActivationCodes, hamming_distances
from corollary.geometry.patterns import smooth_nodes, switching_nodes, unit_nodes
from corollary.graph import Graph, Node
from corollary.graph.ops import Elementwise, PReLU

LEAST_LENGTH = 1e-12
"""A normal shorter than this share of the longest of its layer is that of a unit that the inputs do not move."""


@final
@dataclass(frozen=True, eq=False)
class LayerNormals:
    """Normals of the half-spaces in which units of one layer are on, of length 1, in the space of the inputs.

    Args:
        exact: whether the unit's half-space is one and the same for all inputs; otherwise each normal is that of the
            local affine map around one sample.
        sample: which sample each is taken at; 0 throughout where they are exact.
        units: number of units of the layer, of which some may have been drawn.
        unmoved: units drawn, over all samples, that the inputs do not move there: they have no normal.
    """

    name: str
    normals: Float[Tensor, "row d"]
    exact: bool
    sample: Int64[Tensor, "row"]
    units: int
    unmoved: int = 0


def half_space_normals(
    graph: Graph,
    x: Float[Tensor, "sample *input"],
    layers: Mapping[str, Node],
    *,
    most: int,
    generator: torch.Generator | None = None,
) -> tuple[tuple[LayerNormals, ...], dict[str, str]]:
    r"""Where units switch: the hyperplane of unit i is $\{z : a_i(z) = t\}$ with a kink t, its normal $\nabla_z a_i$.

    In front of the first switch the pre-activation a is affine in the input, and its normal the same everywhere. Behind
    it, a is affine on pieces: the normal is that of the piece each sample lies on.

    Args:
        x: samples at which to take the normals of deeper layers.
        layers: units, as nodes of `unit_nodes(graph)`, by name.
        most: normals of a layer; of more, units are drawn at random.
    Returns: the layers, and for each that has no normals the reason.
    Raises: BadInput, if the network takes several inputs.
    """
    if len(graph.inputs) != 1:
        raise BadInput(f"half-spaces lie in the space of one input tensor; this network takes {len(graph.inputs)}")
    graph, x = as_graph(graph, x, dtype=torch.float64), x.double()
    found, skipped = [], {}
    for name, node in layers.items():
        if not isinstance(node.op, Elementwise | PReLU):
            skipped[name] = f"a unit of {node.op} compares several values"
            continue
        before, exact = node.inputs[0], before_all_switches(graph, node)
        units, points = sample_size(before), x[:1] if exact else x
        drawn = torch.randperm(units, generator=generator)[: max(1, most // len(points))].sort().values.tolist()
        try:
            rows, _ = local_rows(graph, points, before, graph.inputs, drawn)
        except NoRule as reason:
            skipped[name] = str(reason)
            continue
        sample = torch.arange(len(points), device=rows.device).expand(len(drawn), -1).flatten()
        rows = rows.flatten(0, 1)
        length = rows.norm(dim=1)
        moved = length > LEAST_LENGTH * length.max()
        normals = normalize(rows[moved], dim=1)
        found.append(LayerNormals(name, normals, exact, sample[moved], units, int((~moved).sum())))
    return tuple(found), skipped


def before_all_switches(graph: Graph, node: Node) -> bool:
    """Whether the node's first input is one affine function of the network's inputs."""
    bent, before = {*switching_nodes(graph), *smooth_nodes(graph)}, {node.inputs[0]}
    for other in reversed(graph.nodes):
        if other in before:
            before.update(other.inputs)
    return not (bent & before)


def named_units(graph: Graph, codes: ActivationCodes) -> dict[str, Node]:
    """The nodes whose sides make up codes that were taken of the graph, by the names they have there."""
    return dict(zip(codes.layers, unit_nodes(graph), strict=True))


def principal_plane(layers: Sequence[Float[Tensor, "_ d"]]) -> Float[Tensor, "2 d"]:
    """The two directions that hold most of the squared length of the layers' normals, each layer counting alike.

    About zero, not about their mean: a normal is a direction.
    """
    d = layers[0].shape[1]
    weighted = torch.cat([normals / max(1, len(normals)) ** 0.5 for normals in layers])
    directions = torch.linalg.svd(weighted, full_matrices=False).Vh[:2]
    directions = directions * torch.where(directions.sum(dim=1, keepdim=True) < 0, -1.0, 1.0)  # a sign to count on
    return torch.cat([directions, directions.new_zeros(2 - len(directions), d)])


# ------------------------------------------------------------------------------------------------- overlap kernels


@final
@dataclass(frozen=True, eq=False)
class OverlapAlignment:
    """How far gates make those samples alike that have like targets, by layer.

    Args:
        alone: alignment of each layer's own overlap kernel with the kernel of the targets; NaN where all samples have
            the same gates.
        through: of the product over all layers up to this one, the share of paths that are open at both samples.
        inputs: of the inputs themselves.
    """

    layers: tuple[str, ...]
    alone: tuple[float, ...]
    through: tuple[float, ...]
    inputs: float


def overlap_alignment(
    kernels: Mapping[str, Float[Tensor, "n n"]], x: Float[Tensor, "n *input"], targets: Float[Tensor, "n n"]
) -> OverlapAlignment:
    r"""Centred alignment, unbiased, of each layer's $\langle G_l(x), G_l(z) \rangle / w_l$ and of their products.

    Args:
        kernels: the factors by layer, in order.
        targets: kernel of the targets.
    Source: Yadav, Ramaswamy and Lakshminarayanan 2024, arXiv 2404.04312; alignment as in `kernel_alignment`.
    """
    alone, through = [], []
    product = torch.ones_like(targets)
    for kernel in kernels.values():
        product = product * kernel
        alone.append(_aligned(kernel, targets))
        through.append(_aligned(product, targets))
    inputs = _aligned(linear_kernel(x.double().flatten(1)), targets)
    return OverlapAlignment(tuple(kernels), tuple(alone), tuple(through), inputs)


def code_kernels(codes: ActivationCodes) -> dict[str, Float[Tensor, "n n"]]:
    r"""For each layer the share of its units that are on at both samples, $\langle G_l(x), G_l(z) \rangle / w_l$."""
    found = {}
    for name, layer in codes.layers.items():
        packed = codes.packed[:, layer.bytes]
        on = hamming_distances(packed, torch.zeros_like(packed[:1]))  # distance from the code without units on
        shared = (on + on.T - hamming_distances(packed, packed)) / 2
        found[name] = shared.double() / (layer.bits.stop - layer.bits.start)
    return found


def target_kernel(y: Tensor, *, classes: bool) -> Float[Tensor, "n n"]:
    """Similarity of targets: 1 for equal classes and 0 otherwise, or products of standardised numbers."""
    if classes:
        return linear_kernel(one_hot(y.long()).double())
    rows = y.double().reshape(len(y), -1)
    return linear_kernel((rows - rows.mean(0)) / rows.std(0).clamp_min(torch.finfo(torch.float64).tiny))


def _aligned(kernel: Float[Tensor, "n n"], targets: Float[Tensor, "n n"]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a constant kernel gives NaN, which the caller reports
        found = float(kernel_alignment(kernel, targets, unbiased=True))
    return found if math.isfinite(found) else math.nan
