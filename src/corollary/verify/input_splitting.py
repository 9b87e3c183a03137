"""Branch and bound on the inputs: where few of them vary, boxes are cut until each is proved.

Every box is bounded anew, so the relaxations tighten as it shrinks; and a linear bound that is positive on a part of a
box shows that part safe, so the box is clipped before it is cut.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from corollary.graph import evaluate
from corollary.verify.limit import OutOfTime
from corollary.verify.linear_bounds import lower_bounds
from corollary.verify.prepared import Prepared
from corollary.verify.queries import Queries
from corollary.verify.search import Margin, Outcome
from corollary.verify.sets import Box, Region
from corollary.verify.sweep import sweep

COEFFICIENTS = 2**25
"""Boxes are bounded so many at once that the widest rows take about so many coefficients."""


def split_inputs(
    network: Prepared,
    queries: Queries,
    margin: Margin,
    *,
    deadline: float,
    at_once: int | None = None,
    confirm: Callable[[Tensor], bool] | None = None,
) -> Outcome:
    """Prove every open disjunct of `queries`, or find a point that is unsafe, by cutting boxes.

    Args:
        margin: what a bound must exceed to count as proof.
        deadline: by `time.monotonic`.
        at_once: boxes bounded together; by the size of the network where None.
        confirm: whether a point (1, *input) that is unsafe by the graph's arithmetic counts; others are passed over.
    """
    assert isinstance(queries.region, Box)
    at_once = at_once or _boxes_at_once(network, queries)
    stack = [queries]
    waiting, domains, worst, stuck = len(queries), 0, -torch.inf, False
    while stack:
        if time.monotonic() > deadline:
            return Outcome("timeout", None, domains, worst)
        batch, rest = _take(stack, at_once)
        waiting -= len(batch)
        if rest is not None:
            stack.append(rest)
        domains += len(batch)
        try:
            batch, slopes, lower = _bound(network, batch, margin)
        except OutOfTime:
            return Outcome("timeout", None, domains, worst)
        if not len(batch):
            continue
        worst = float(batch.margins(lower).min())
        batch, slopes, lower, point = _clipped(network, batch, slopes, lower)
        if point is not None and (confirm is None or confirm(point)):
            return Outcome("found", point, domains, worst)
        able = _has_middle(batch.region)
        stuck = stuck or not bool(able.all())
        batch, slopes, lower = batch[able], slopes[able], lower[able]
        if not len(batch):
            continue
        cuts = 1
        while waiting + len(batch) * 2 ** (cuts + 1) <= at_once and cuts < 6:
            cuts += 1
        for _ in range(cuts):
            batch, slopes, lower = _halves(batch, slopes, lower)
        stack.append(batch)
        waiting += len(batch)
    return Outcome("stuck" if stuck else "proved", None, domains, worst)


def _has_middle(region: Region) -> Tensor:
    """Whether a box can be cut: some input has a number between its ends."""
    assert isinstance(region, Box)
    middle = region.center
    return ((region.lower < middle) & (middle < region.upper)).flatten(1).any(1)


def _boxes_at_once(network: Prepared, queries: Queries) -> int:
    widest = max(node_size for node_size in network.sizes.values())
    rows = 2 * max((network.sizes[node] for node in network.bounded), default=queries.rows.shape[1])
    return max(4, min(4096, COEFFICIENTS // (widest * max(rows // 4, 1))))


def _take(stack: list[Queries], most: int) -> tuple[Queries, Queries | None]:
    """The last boxes entered, up to so many, and what is left of the block they were cut from."""
    taken, count = [], 0
    rest = None
    while stack and count < most:
        block = stack.pop()
        if count + len(block) > most:
            cut = len(block) - (most - count)
            rest, block = block[slice(None, cut)], block[slice(cut, None)]
        taken.append(block)
        count += len(block)
    return joined(taken), rest


def joined(parts: list[Queries]) -> Queries:
    """The queries of several parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    boxes = [part.region for part in parts if isinstance(part.region, Box)]
    box = Box(torch.cat([b.lower for b in boxes]), torch.cat([b.upper for b in boxes]))
    fields = ("rows", "offsets", "disjunct", "open")
    return Queries(box, *(torch.cat([getattr(part, name) for part in parts]) for name in fields))


def _bound(network: Prepared, batch: Queries, margin: Margin) -> tuple[Queries, Tensor, Tensor]:
    """The boxes with something left open; slopes of their rows at the input, and the lower bounds of the rows."""
    found = sweep(network, [batch.region])
    output = network.graph.outputs[0]
    bound = lower_bounds(network, output, batch.on(output), [batch.region], found.known)
    lower = margin.below(bound, batch.offsets)
    margins = batch.margins(lower)
    (slopes,) = bound.slopes.values()
    slopes = slopes.expand(len(batch), *slopes.shape[1:])
    if batch.rows.shape[1] > batch.open.shape[1]:
        margins = torch.maximum(margins, _mixed(batch, slopes, lower))
    still = batch.open & ~(margins > 0)
    left = still.any(1)
    batch = replace(batch, open=still)
    return batch[left], slopes[left], lower[left]


def _mixed(batch: Queries, slopes: Tensor, lower: Tensor) -> Tensor:
    """Margins of the disjuncts from means of two of their rows, (boxes, disjuncts).

    All rows of a disjunct are at most zero at an unsafe input, so every mean of them is; the best row of each disjunct
    is mixed with each of the others, in nine shares.
    """
    box = batch.region
    assert isinstance(box, Box)
    disjuncts = batch.open.shape[1]
    best = lower.new_full((len(batch), disjuncts), -torch.inf)
    best = best.scatter_reduce(1, batch.disjunct, lower, "amax")
    rows = torch.arange(lower.shape[1], device=lower.device).expand_as(lower)
    is_best = lower >= best.gather(1, batch.disjunct)
    leader = torch.zeros_like(best, dtype=torch.long)
    leader = leader.scatter_reduce(1, batch.disjunct, torch.where(is_best, rows, 0), "amax").gather(1, batch.disjunct)
    first, last = box.lower.flatten(1)[:, None, None], box.upper.flatten(1)[:, None, None]
    # s . x + d, from its least value on the box
    corner = torch.where(slopes > 0, first[:, :, 0], last[:, :, 0])
    constant = lower - (slopes * corner).sum(2)
    share = torch.linspace(0.1, 0.9, 9, dtype=lower.dtype, device=lower.device)[:, None]
    other = slopes.gather(1, leader[..., None].expand_as(slopes))
    mixed = share * slopes[:, :, None] + (1 - share) * other[:, :, None]
    least = torch.minimum(mixed * first, mixed * last).sum(3)
    least = least + share[:, 0] * constant[..., None] + (1 - share[:, 0]) * constant.gather(1, leader)[..., None]
    found = lower.new_full((len(batch), disjuncts), -torch.inf)
    return found.scatter_reduce(1, batch.disjunct, least.amax(2), "amax")


def _clipped(
    network: Prepared, batch: Queries, slopes: Tensor, lower: Tensor
) -> tuple[Queries, Tensor, Tensor, Tensor | None]:
    """The boxes without the parts that the linear bounds show safe; or a point that is unsafe, if one was met.

    Where a row's bound is s . x + d, an unsafe x has s . x + d <= 0, so each coordinate moves from the corner of the
    least bound by at most -lower / |s|. A disjunct needs all its rows; a box is kept for any of its open disjuncts.
    """
    box = batch.region
    assert isinstance(box, Box)
    low, high = box.lower.flatten(1)[:, None], box.upper.flatten(1)[:, None]
    reach = (-lower).clamp(min=0)[..., None] / slopes.abs().clamp(min=1e-30)
    reach = reach * (1 + 1e-6) + 1e-9 * (high - low)
    top = torch.where(slopes > 0, torch.minimum(high, low + reach), high)
    bottom = torch.where(slopes < 0, torch.maximum(low, high - reach), low)
    corner = torch.where(slopes > 0, low, high)
    point = _unsafe(network, batch, corner, lower)
    # All rows of a disjunct hold at once: the intersection; disjuncts are alternatives: the hull.
    disjuncts = batch.open.shape[1]
    place = batch.disjunct[..., None].expand_as(top)
    shape = (len(batch), disjuncts, top.shape[2])
    tops = top.new_full(shape, torch.inf).scatter_reduce(1, place, top, "amin")
    bottoms = top.new_full(shape, -torch.inf).scatter_reduce(1, place, bottom, "amax")
    closed = ~batch.open[..., None] | (bottoms > tops).any(2, keepdim=True)
    new_high = torch.where(closed, -torch.inf, tops).amax(1)
    new_low = torch.where(closed, torch.inf, bottoms).amin(1)
    kept = (~closed).any(1)[:, 0]
    new_box = Box(
        torch.where(kept[:, None], new_low, low[:, 0]).reshape(box.lower.shape),
        torch.where(kept[:, None], new_high, high[:, 0]).reshape(box.lower.shape),
    )
    clipped = replace(batch, region=new_box, open=batch.open & ~closed[..., 0])
    return clipped[kept], slopes[kept], lower[kept], point


def _unsafe(network: Prepared, batch: Queries, corner: Tensor, lower: Tensor) -> Tensor | None:
    """An unsafe point among the middles of the boxes and the corners where the worst row's bound is least."""
    box = batch.region
    assert isinstance(box, Box)
    row = torch.where(batch.open.gather(1, batch.disjunct), lower, torch.inf).argmin(1)
    chosen = corner[torch.arange(len(batch)), row].reshape(box.lower.shape)
    points = torch.stack([box.center, chosen])
    with torch.no_grad():
        outputs = evaluate(network.graph, points.flatten(0, 1)).reshape(2, len(batch), -1)
    hits = batch.violated(outputs).nonzero()
    return points[hits[0, 0], hits[0, 1]][None] if len(hits) else None


def _halves(batch: Queries, slopes: Tensor, lower: Tensor) -> tuple[Queries, Tensor, Tensor]:
    """Each box cut in the middle of the input that moves the open rows' bounds most."""
    box = batch.region
    assert isinstance(box, Box)
    width = (box.upper - box.lower).flatten(1)
    # the disjunct that is farthest from proof, by the row that is nearest to it
    nearest = torch.where(batch.open, batch.margins(lower), torch.inf).argmin(1, keepdim=True)
    row = torch.where(batch.disjunct == nearest, lower, -torch.inf).argmax(1)
    gain = slopes[torch.arange(len(batch)), row].abs() * width
    gain = gain + 1e-3 * gain.amax(1, keepdim=True) * width / width.amax(1, keepdim=True).clamp(min=1e-30)
    gain = torch.where(gain.amax(1, keepdim=True) > 0, gain, width)
    axis = torch.where(width > 0, gain, -torch.inf).argmax(1, keepdim=True)
    low, high = box.lower.flatten(1), box.upper.flatten(1)
    middle = (low + (high - low) / 2).gather(1, axis)
    left, right = high.scatter(1, axis, middle), low.scatter(1, axis, middle)
    shape = (2 * len(batch), *box.lower.shape[1:])
    halves = Box(torch.cat([low, right]).reshape(shape), torch.cat([left, high]).reshape(shape))
    twice = Queries(
        halves, *(torch.cat([part, part]) for part in (batch.rows, batch.offsets, batch.disjunct, batch.open))
    )
    return twice, torch.cat([slopes, slopes]), torch.cat([lower, lower])
