"""Points that lie in a region, to attack bounds with: random ones, corners, and ends of projected gradient steps."""

import torch
from torch import Tensor

from corollary.graph import Graph, Node, values
from corollary.verify.layout import unpack
from corollary.verify.sets import Ball, Box, Region


def random_points(region: Region, count: int, generator: torch.Generator) -> Tensor:
    """(count, batch, *input); half of a box's are corners, half of a ball's lie on its surface."""
    if isinstance(region, Box):
        share = torch.rand((count, *region.lower.shape), generator=generator, dtype=torch.float64)
        share[::2] = share[::2].round()
        lower, upper = region.lower.double(), region.upper.double()
        return (lower + share * (upper - lower)).clamp(lower, upper)
    center = region.center.double()
    step = torch.randn((count, *center.shape), generator=generator, dtype=torch.float64)
    if region.norm == 1:  # the vertices of the ball
        flat = step.flatten(2)
        step = torch.zeros_like(flat).scatter(2, flat.abs().argmax(2, keepdim=True), 1.0) * flat.sign()
        step = step.reshape(count, *center.shape)
    length = 1 - 1e-12 - 0.9 * torch.rand((count, len(center)), generator=generator, dtype=torch.float64)
    length[::2] = 1 - 1e-12
    size = torch.linalg.vector_norm(step.flatten(2), ord=region.norm, dim=2)
    radius = region.radii.double().expand(len(center)) * length / size.clamp(min=1e-300)
    return center + step * radius.reshape(count, -1, *(1,) * (center.ndim - 1))


def projected(region: Region, points: Tensor) -> Tensor:
    """Points (count, batch, *input) brought back into the region."""
    if isinstance(region, Box):
        return points.clamp(region.lower.double(), region.upper.double())
    center = region.center.double()
    step = points - center
    size = torch.linalg.vector_norm(step.flatten(2), ord=region.norm, dim=2)
    share = ((1 - 1e-12) * region.radii.double() / size.clamp(min=1e-300)).clamp(max=1)
    return center + step * share.reshape(*share.shape, *(1,) * (center.ndim - 1))


def attacked_points(
    graph: Graph, regions: list[Region], start: list[Tensor], rows: Tensor, steps: int = 4
) -> list[Tensor]:
    """Points (count, batch, *input) moved to lower `rows` (count, batch, outputs) of the flattened output."""
    count, batch = start[0].shape[:2]
    points = [point.clone() for point in start]
    for step in range(steps):
        leaves = [point.requires_grad_() for point in points]
        value = output_of(graph, leaves)
        slopes = torch.autograd.grad((rows * value).sum(), leaves, allow_unused=True)
        points = []
        for region, leaf, slope in zip(regions, leaves, slopes, strict=True):
            box = region if isinstance(region, Box) else region.box()
            reach = (box.upper - box.lower).double() * 0.5**step
            direction = torch.zeros_like(leaf) if slope is None else slope.sign()
            points.append(projected(region, leaf.detach() - reach * direction))
    return [point.reshape(count, batch, *point.shape[2:]) for point in points]


def output_of(graph: Graph, points: list[Tensor]) -> Tensor:
    """The first output, (count, batch, outputs), at points (count, batch, *input)."""
    return values_at(graph, points, [graph.outputs[0]])[graph.outputs[0]]


def values_at(graph: Graph, points: list[Tensor], nodes: list[Node]) -> dict[Node, Tensor]:
    """Values (count, batch, entries) of nodes at points (count, batch, *input)."""
    count, batch = points[0].shape[:2]
    found = values(graph, tuple(point.flatten(0, 1) for point in points), nodes)
    return {node: unpack(node, found[node], count, batch).flatten(2) for node in nodes}


def outside(lower: Tensor, upper: Tensor, value: Tensor) -> float:
    """How far values (count, *bounds) lie outside of bounds, relative to their size; NaN bounds count as infinite."""
    assert not lower.isnan().any()
    assert not upper.isnan().any()
    gap = torch.maximum(lower.double() - value, value - upper.double())
    return float((gap / (1 + value.abs())).max())


def first_output(graph: Graph) -> Graph:
    """The graph with its first output alone."""
    if len(graph.outputs) == 1:
        return graph
    return Graph(graph.nodes, graph.inputs, graph.outputs[:1], graph.tensors, (), None, False, None, graph.origin)


def regions_around(inputs: tuple[Tensor, ...], kind: str, radius: float) -> list[Region]:
    """A region around each input: a lopsided box, or a ball with a radius for each sample."""
    if kind == "box":
        return [Box(x - radius * (1 + x.sin()), x + radius * (1 + x.cos())) for x in inputs]
    norm = {"ball 1": 1.0, "ball 2": 2.0, "ball inf": float("inf")}[kind]
    return [Ball(x, radius * torch.linspace(1, 2, len(x), dtype=x.dtype), norm) for x in inputs]


def points_in(graph: Graph, regions: list[Region], count: int = 32, seed: int = 1) -> list[Tensor]:
    """Random points, corners, and points where gradient steps drove single outputs up or down."""
    generator = torch.Generator().manual_seed(seed)
    start = [random_points(region, count, generator) for region in regions]
    value = output_of(graph, start)
    entry = torch.randint(value.shape[2], value.shape[:2], generator=generator)
    sign = 1 - 2 * torch.randint(2, entry.shape, generator=generator).double()
    rows = torch.zeros_like(value).scatter_(2, entry[..., None], sign[..., None])
    ends = attacked_points(graph, regions, start, rows)
    return [torch.cat(pair) for pair in zip(start, ends, strict=True)]
