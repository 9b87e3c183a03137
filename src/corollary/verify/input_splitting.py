"""Branch and bound on the inputs: where few of them vary, boxes are cut until each is proved.

All nodes are bounded anew for a box, and the lines behind rows of the output optimised where they do not suffice. The
linear bounds of inner nodes hold on every part of a box: for some levels of cuts they are all that a part needs, at
the cost of a single pass from the output, so that several cuts of a box are tried and the best is kept. A linear bound
that is positive on a part of a box shows that part safe, so the box is clipped before it is cut.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from corollary.graph import Node, evaluate
from corollary.verify.forward_bounds import forward_bounds
from corollary.verify.known import Known
from corollary.verify.limit import OutOfTime
from corollary.verify.linear_bounds import Free, lower_bounds
from corollary.verify.mixtures import mixed_margins
from corollary.verify.planes import Planes
from corollary.verify.prepared import Prepared
from corollary.verify.queries import OpenBoxes, Queries
from corollary.verify.search import Ending, Margin, Outcome
from corollary.verify.sets import Box
from corollary.verify.slopes import Ascent, raised
from corollary.verify.sweep import sweep

COEFFICIENTS, MOST, AGAIN = 2**23, 1024, 2048
"""Boxes are bounded anew so many at once that the widest rows take about so many coefficients, at most `MOST`; their
parts `AGAIN` at once."""
LEVELS = 2
"""A box is cut so often before inner nodes are bounded anew."""
CUTS = 5
"""Inputs at which a cut is tried: those that move the open rows' bounds most."""
WIDE, BESIDE = 4096, 100
"""Networks with more entries that relaxations read, and so many times as many as inputs, are bounded forward, box by
box: bounding that many backward takes longer than cutting boxes more often."""
ASCENT = Ascent(iterations=5, learning_rate=0.25)
"""How the lines behind rows of the output are optimised."""


def split_inputs(
    network: Prepared,
    queries: Queries,
    margin: Margin,
    *,
    deadline: float,
    begin: OpenBoxes | None = None,
    at_once: int | None = None,
    confirm: Callable[[Tensor], bool] | None = None,
) -> Outcome:
    """Prove every open disjunct of `queries`, or find a point that is unsafe, by cutting boxes.

    Args:
        margin: what a bound must exceed to count as proof.
        deadline: by `time.monotonic`.
        begin: the parts of the regions that an earlier search left open; the regions themselves where None.
        at_once: boxes bounded together; by the size of the network where None.
        confirm: whether a point (1, *input) that is unsafe by the graph's arithmetic counts; others are passed over.
    Returns: the outcome, with the boxes left open. It is "stuck" where only boxes are left that cannot be cut, or that
        are proved but for the allowance for rounding: a finer dtype may decide these.
    """
    return _Search(network, queries, margin, deadline, at_once, confirm).run(begin)


@dataclass(frozen=True, eq=False)
class _Boxes:
    """Boxes in the search, and what is known of them.

    Args:
        queries: of each box; case: which region it is part of, (n,).
        origin: the box of the last full bounds that it is part of, (n,).
        slopes: of its rows' bounds at the input, (n, rows, inputs); lower: the bounds, (n, rows).
        margins: of the disjuncts, (n, disjuncts); allowance: what rounding took off them.
    """

    queries: Queries
    case: Tensor
    origin: Tensor
    slopes: Tensor
    lower: Tensor
    margins: Tensor
    allowance: Tensor

    def __len__(self) -> int:
        return len(self.case)

    def __getitem__(self, i: Tensor) -> "_Boxes":
        return _Boxes(
            self.queries[i], self.case[i], self.origin[i], self.slopes[i], self.lower[i], self.margins[i],
            self.allowance[i],
        )  # fmt: skip

    @property
    def box(self) -> Box:
        assert isinstance(self.queries.region, Box)
        return self.queries.region

    def left(self) -> OpenBoxes:
        return OpenBoxes(self.box, self.queries.open, self.case)


@dataclass(frozen=True, eq=False)
class _Base:
    """What the full bounds of some boxes give to their parts: bounds of inner nodes, and lines to begin with."""

    planes: dict[Node, Planes]
    free: Free


class _Search:
    def __init__(
        self,
        network: Prepared,
        queries: Queries,
        margin: Margin,
        deadline: float,
        at_once: int | None,
        confirm: Callable[[Tensor], bool] | None,
    ):
        self.network, self.queries, self.margin = network, queries, margin
        self.deadline, self.confirm = deadline, confirm
        self.forward = is_wide(network)
        self.at_once = at_once or _boxes_at_once(network, queries, self.forward)
        self.output = network.graph.outputs[0]
        self.stack: list[OpenBoxes] = []
        self.stuck: list[OpenBoxes] = []
        self.domains, self.worst = 0, -torch.inf
        self.found: Tensor | None = None

    def run(self, begin: OpenBoxes | None) -> Outcome:
        assert isinstance(self.queries.region, Box)
        every = torch.arange(len(self.queries), device=self.network.device)
        self.stack.append(begin or OpenBoxes(self.queries.region, self.queries.open, every))
        while self.stack:
            taken = self._take()
            try:
                if time.monotonic() > self.deadline:
                    raise OutOfTime
                self._advance(taken)
            except OutOfTime:
                return self._ended("timeout", [taken, *self.stack, *self.stuck])
            if self.found is not None:
                return self._ended("found", [])
        return self._ended("stuck", self.stuck) if self.stuck else self._ended("proved", [])

    def _ended(self, status: Ending, left: list[OpenBoxes]) -> Outcome:
        rest = OpenBoxes.joined(left) if left else None
        return Outcome(status, self.found, self.domains, self.worst, rest)

    def _take(self) -> OpenBoxes:
        """The last boxes entered, up to so many."""
        taken, count = [], 0
        while self.stack and count < self.at_once:
            block = self.stack.pop()
            if count + len(block) > self.at_once:
                cut = len(block) - (self.at_once - count)
                self.stack.append(block[torch.arange(cut)])
                block = block[torch.arange(cut, len(block))]
            taken.append(block)
            count += len(block)
        return OpenBoxes.joined(taken)

    def _advance(self, taken: OpenBoxes) -> None:
        """Bound boxes and, level by level, their parts; what is left then is entered."""
        boxes, base = self._bounded(taken)
        boxes = self._narrowed(boxes)
        for _ in range(LEVELS):
            if not len(boxes) or self.found is not None:
                return
            boxes = self._narrowed(self._cut(boxes, base))
        if len(boxes):
            self.stack.append(boxes.left())

    # ------------------------------------------------------------------------------------------------- bounding

    def _asked(self, boxes: OpenBoxes) -> Queries:
        return replace(self.queries[boxes.case], region=boxes.box, open=boxes.open)

    def _rows_bounded(
        self, queries: Queries, case: Tensor, origin: Tensor, known: Known, free: Free | None = None
    ) -> _Boxes:
        """Boxes with the bounds of their rows where those of inner nodes are known."""
        bound = lower_bounds(self.network, self.output, queries.on(self.output), [queries.region], known, free=free)
        lower = self.margin.below(bound, queries.offsets)
        (slopes,) = bound.slopes.values()
        slopes = slopes.expand(len(queries), *slopes.shape[1:])
        allowance = self.margin.allowance(bound, queries.offsets).amax(1, keepdim=True)
        margins = mixed_margins(queries, slopes, lower)
        return _Boxes(queries, case, origin, slopes, lower, margins, allowance.expand_as(margins))

    def _bounded(self, taken: OpenBoxes) -> tuple[_Boxes, _Base]:
        """Boxes with all nodes bounded anew and the lines behind open rows optimised; what is proved is left out."""
        planes: dict[Node, Planes] = {}
        queries, n = self._asked(taken), len(taken)
        if self.forward:
            known, _ = forward_bounds(self.network, [queries.region])
        else:
            known = sweep(self.network, [queries.region], collect=planes).known
        origin = torch.arange(n, device=self.network.device)
        boxes = self._rows_bounded(queries, taken.case, origin, known)
        self.domains += n
        left = (boxes.queries.open & ~(boxes.margins > 0)).any(1).nonzero()[:, 0]
        boxes, known = replace(boxes[left], origin=origin[: len(left)]), known.at(left)
        planes = {node: plane.at(left) for node, plane in planes.items()}
        if not len(left):
            return boxes, _Base(planes, {})
        rows = boxes.queries.on(self.output)
        goal = boxes.queries.offsets + 2 * boxes.allowance.amax(1, keepdim=True)
        _, free = raised(self.network, self.output, rows, [boxes.box], known, ASCENT, goal)
        again = self._rows_bounded(boxes.queries, boxes.case, boxes.origin, known, free)
        return _better(boxes, again), _Base(planes, free)

    def _parts_bounded(self, boxes: Queries, case: Tensor, origin: Tensor, base: _Base) -> _Boxes:
        """Parts of boxes, bounded by what is known of these."""
        found = []
        for i in torch.arange(len(case), device=case.device).split(self.at_once if self.forward else AGAIN):
            whole = origin[i]
            if self.forward:
                known, _ = forward_bounds(self.network, [boxes.region[i]])
            else:
                planes = {node: plane.at(whole) for node, plane in base.planes.items()}
                known = sweep(self.network, [boxes.region[i]], linear=False, planes=planes).known
            free = {node: (_at(low, whole), _at(high, whole)) for node, (low, high) in base.free.items()}
            found.append(self._rows_bounded(boxes[i], case[i], whole, known, free))
        return found[0] if len(found) == 1 else _side_by_side(found)

    # --------------------------------------------------------------------------------------------- narrowing, cutting

    def _narrowed(self, boxes: _Boxes) -> _Boxes:
        """The boxes with something left open, clipped, that can be cut; others are stuck. Unsafe points are found."""
        open_ = boxes.queries.open & ~(boxes.margins > 0)
        left = open_.any(1).nonzero()[:, 0]
        boxes = replace(boxes, queries=replace(boxes.queries, open=open_))[left]
        if not len(boxes):
            return boxes
        self.worst = float(torch.where(boxes.queries.open, boxes.margins, torch.inf).min())
        boxes, corner = _clipped(boxes)
        point = self._unsafe(boxes, corner) if len(boxes) else None
        if point is not None and (self.confirm is None or self.confirm(point)):
            self.found = point
        by_rounding = torch.where(boxes.queries.open, boxes.margins + boxes.allowance, torch.inf).amin(1) > 0
        able = _middles(boxes.box)[1].any(1) & ~by_rounding
        if not bool(able.all()):
            self.stuck.append(boxes[~able].left())
        return boxes[able]

    def _unsafe(self, boxes: _Boxes, corner: Tensor) -> Tensor | None:
        """An unsafe point among the middles of the boxes and the corners where the worst row's bound is least."""
        row = _worst_row(boxes)
        chosen = corner[torch.arange(len(boxes)), row].reshape(boxes.box.lower.shape)
        points = torch.stack([boxes.box.center, chosen])
        outputs = evaluate(self.network.graph, points.flatten(0, 1)).reshape(2, len(boxes), -1)
        hits = boxes.queries.violated(outputs).nonzero()
        return points[hits[0, 0], hits[0, 1]][None] if len(hits) else None

    def _cut(self, boxes: _Boxes, base: _Base) -> _Boxes:
        """Each box in two halves: of the cuts tried, the one that leaves least to prove."""
        n, shape = len(boxes), boxes.box.lower.shape[1:]
        middle, able = _middles(boxes.box)
        low, high = boxes.box.lower.flatten(1), boxes.box.upper.flatten(1)
        gain = boxes.slopes[torch.arange(n), _worst_row(boxes)].abs() * (high - low)
        gain = gain + 1e-3 * gain.amax(1, keepdim=True) * (high - low) / (high - low).amax(1, keepdim=True)
        tried = min(CUTS, low.shape[1])
        axis = torch.where(able, gain, -torch.inf).topk(tried, dim=1).indices
        valid, at = able.gather(1, axis), middle.gather(1, axis).reshape(-1, 1)
        box = torch.arange(n, device=axis.device).repeat_interleave(tried)
        entry = axis.reshape(-1, 1)
        left = torch.cat([low[box], low[box].scatter(1, entry, at)])
        right = torch.cat([high[box].scatter(1, entry, at), high[box]])
        box = torch.cat([box, box])
        halves = replace(boxes.queries[box], region=Box(left.reshape(-1, *shape), right.reshape(-1, *shape)))
        parts = self._parts_bounded(halves, boxes.case[box], boxes.origin[box], base)
        self.domains += 2 * n
        missing = torch.where(parts.queries.open, parts.margins, torch.inf).amin(1).clamp(max=0)
        score = torch.where(valid, missing.reshape(2, n, tried).sum(0), -torch.inf)
        best = torch.arange(n, device=axis.device) * tried + score.argmax(1)
        return parts[torch.cat([best, best + n * tried])]


def is_wide(network: Prepared) -> bool:
    """Whether the network has so many entries beside its inputs that it is bounded forward."""
    entries = sum(network.sizes[node] for node in network.bounded)
    return entries > max(WIDE, BESIDE * sum(network.sizes[node] for node in network.graph.inputs))


def _boxes_at_once(network: Prepared, queries: Queries, forward: bool) -> int:
    widest = max(network.sizes.values())
    if forward:
        rows = 2 * (1 + sum(network.sizes[node] for node in network.graph.inputs))
    else:
        rows = max((network.sizes[node] for node in network.bounded), default=queries.rows.shape[1]) // 2
    return max(4, min(MOST, COEFFICIENTS // (widest * max(rows, 1))))


def _at(part: Tensor | None, boxes: Tensor) -> Tensor | None:
    return None if part is None else part[boxes]


def _side_by_side(parts: list[_Boxes]) -> _Boxes:
    queries = Queries(
        Box(torch.cat([part.box.lower for part in parts]), torch.cat([part.box.upper for part in parts])),
        *(torch.cat([getattr(p.queries, name) for p in parts]) for name in ("rows", "offsets", "disjunct", "open")),
    )
    fields = ("case", "origin", "slopes", "lower", "margins", "allowance")
    return _Boxes(queries, *(torch.cat([getattr(part, name) for part in parts]) for name in fields))


def _better(a: _Boxes, b: _Boxes) -> _Boxes:
    """The same boxes with the better bound of each row and disjunct."""
    higher = b.lower > a.lower
    return replace(
        a,
        slopes=torch.where(higher[..., None], b.slopes, a.slopes),
        lower=torch.where(higher, b.lower, a.lower),
        margins=torch.maximum(a.margins, b.margins),
    )


def _worst_row(boxes: _Boxes) -> Tensor:
    """Of the disjunct that is farthest from proof, the row that is nearest to it, (n,)."""
    disjunct = torch.where(boxes.queries.open, boxes.margins, torch.inf).argmin(1, keepdim=True)
    return torch.where(boxes.queries.disjunct == disjunct, boxes.lower, -torch.inf).argmax(1)


def _middles(box: Box) -> tuple[Tensor, Tensor]:
    """The middles of boxes, (n, inputs), and which inputs have a number between their ends."""
    low, high = box.lower.flatten(1), box.upper.flatten(1)
    middle = low + (high - low) / 2
    return middle, (low < middle) & (middle < high)


def _clipped(boxes: _Boxes) -> tuple[_Boxes, Tensor]:
    """The boxes without the parts that linear bounds show safe, and the corners (n, rows, inputs) of least bounds.

    Where a row's bound is s . x + d, an unsafe x has s . x + d <= 0, so each coordinate moves from the corner of the
    least bound by at most -lower / |s|. A disjunct needs all its rows; a box is kept for any of its open disjuncts.
    """
    box, queries, slopes, lower = boxes.box, boxes.queries, boxes.slopes, boxes.lower
    low, high = box.lower.flatten(1)[:, None], box.upper.flatten(1)[:, None]
    reach = (-lower).clamp(min=0)[..., None] / slopes.abs().clamp(min=1e-30)
    # 4e-7 of the numbers themselves: what rounding may move an end by
    slack = 1e-9 * (high - low) + 4 * torch.finfo(lower.dtype).eps * torch.maximum(low.abs(), high.abs())
    reach = reach * (1 + 1e-6) + slack
    top = torch.where(slopes > 0, torch.minimum(high, low + reach), high)
    bottom = torch.where(slopes < 0, torch.maximum(low, high - reach), low)
    corner = torch.where(slopes > 0, low, high)
    # All rows of a disjunct hold at once: the intersection; disjuncts are alternatives: the hull.
    place = queries.disjunct[..., None].expand_as(top)
    shape = (*queries.open.shape, top.shape[2])
    tops = top.new_full(shape, torch.inf).scatter_reduce(1, place, top, "amin")
    bottoms = top.new_full(shape, -torch.inf).scatter_reduce(1, place, bottom, "amax")
    closed = ~queries.open[..., None] | (bottoms > tops).any(2, keepdim=True)
    new_high = torch.where(closed, -torch.inf, tops).amax(1)
    new_low = torch.where(closed, torch.inf, bottoms).amin(1)
    kept = (~closed).any(1)[:, 0]
    new_box = Box(
        torch.where(kept[:, None], new_low, low[:, 0]).reshape(box.lower.shape),
        torch.where(kept[:, None], new_high, high[:, 0]).reshape(box.lower.shape),
    )
    clipped = replace(queries, region=new_box, open=queries.open & ~closed[..., 0])
    return replace(boxes, queries=clipped)[kept], corner[kept]
