"""The search for counterexamples: random points, projected gradient descent, and local search where inputs are few."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from corollary.base.errors import BadInput
from corollary.base.network import evaluating
from corollary.verify.counterexample import Counterexample, input_dtype, replay, settled
from corollary.verify.sets import Ball, Box
from corollary.verify.specification import Case, Specification

STEP = 0.25
"""First step of a descent, in widths of the box (or of the ball)."""
DECAYS = (0.99, 0.95, 0.9)
"""What a step is of the one before it, in turn over the restarts: far travel, and fine ends."""
LEAK = 0.2
"""Slope of the gradient given to ReLUs that are off (their values stay exact)."""
EXPLORED = 128
"""Random points in the first round."""
FEW = 20
"""Varying inputs up to which local search is worth its points."""
PARENTS, CHILDREN, GENERATIONS, SPREAD, SHRINK = 32, 15, 30, 0.2, 0.78
"""Local search: points in the first round, trials around each, how often, their spread in widths, its factor a time."""


def falsify(
    network: nn.Module | Callable[[Tensor], Tensor],
    specification: Specification,
    *,
    generator: torch.Generator,
    steps: int = 100,
    restarts: int = 30,
    batch: int = 512,
    deadline: float | None = None,
    confirm: Callable[[Tensor], Counterexample | None] | None = None,
) -> Counterexample | None:
    r"""Look for an input of the specification's regions with an unsafe output; None proves nothing.

    Rounds of doubling size run until the restarts are spent. A round draws points (the center, uniform points, corners,
    mixtures of both); goes down from the best and from new ones by projected sign gradients (in a ball, normalised
    gradients) of $\max_j r_j + \sum_j \max(0, r_j)$, $r = C_d\, y - b_d$, for every disjunct d of every case at once;
    and, where at most 20 inputs vary, moves points by random trials of shrinking spread. The first half of a descent
    lets gradients leak through ReLUs that are off, which finds what only those would open; the second half goes on from
    the best point met with true gradients.

    Args:
        network: takes inputs (batch, *input). A module is run in evaluation mode and is not written to. What has no
            gradients is searched by random steps.
        steps: of a descent; the first is a quarter of the width.
        restarts: descents for each disjunct.
        batch: points evaluated together.
        deadline: when to give up, by `time.monotonic`.
        confirm: called with a point (*input) whose output looks unsafe; gives the counterexample, or None to go on. By
            default the point is replayed on the network itself; give `lambda x: replay(program, specification, x)` with
            an `OnnxProgram` to replay it on the original file.
    Returns: what `confirm` accepted.
    Raises: BadInput, if the network's output is not one tensor of the length that the specification is about.
    Source: Madry et al. 2018, arXiv 1706.06083, for the descent.
    """
    if steps < 1 or restarts < 1 or batch < 1:
        raise BadInput(f"steps, restarts and batch must be at least 1, got {steps}, {restarts} and {batch}")
    accept = confirm or (lambda x: replay(network, specification, x))
    parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    corner = specification.cases[0].rows if parameter is None else parameter
    place = torch.empty(0, dtype=input_dtype(network, specification), device=corner.device)
    budget = _Budget(steps, batch, math.inf if deadline is None else deadline)
    with evaluating(network) if isinstance(network, nn.Module) else nullcontext(), torch.enable_grad():
        for cases in _by_kind(specification):
            regions, unsafe = _space(cases, place), _unsafe(cases, place)
            found = _Search(network, specification, regions, unsafe, generator, budget, accept).run(restarts)
            if found is not None:
                return found
    return None


@final
@dataclass(frozen=True)
class _Budget:
    steps: int
    batch: int
    deadline: float

    def spent(self) -> bool:
        return time.monotonic() > self.deadline


@final
@dataclass(frozen=True, eq=False)
class _Boxes:
    """Boxes of several cases; points are flat, (point, input), with the index of each one's `case`."""

    lower: Float[Tensor, "case input"]
    upper: Float[Tensor, "case input"]

    def varying(self) -> int:
        """How many inputs vary, at most."""
        return int((self.upper > self.lower).sum(1).max())

    def center(self) -> Tensor:
        return self.lower + (self.upper - self.lower) / 2

    def draw(self, case: Tensor, generator: torch.Generator) -> Tensor:
        """In equal parts uniform, corners, and each entry one or the other."""
        lower, upper = self.lower[case], self.upper[case]
        share = _random(torch.rand, lower, generator)
        edge = _random(torch.rand, lower[:, :1], generator) * 1.5 - 0.25  # the probability, cut to [0, 1], of an end
        share = torch.where(_random(torch.rand, lower, generator) < edge, share.round(), share)
        return torch.minimum(lower + share * (upper - lower), upper)

    def descended(self, points: Tensor, gradient: Tensor, share: Tensor, case: Tensor) -> Tensor:
        """Points moved down the gradient by a share (point, 1) of the width, and back into the region."""
        return self.stirred(points, -share * gradient.sign(), case)

    def stirred(self, points: Tensor, noise: Tensor, case: Tensor) -> Tensor:
        """Points moved by noise in units of the width, and back into the region."""
        lower, upper = self.lower[case], self.upper[case]
        return torch.minimum(torch.maximum(points + noise * (upper - lower), lower), upper)


@final
@dataclass(frozen=True, eq=False)
class _Balls:
    """Balls of one norm; the questions are those of `_Boxes`."""

    middle: Float[Tensor, "case input"]
    radius: Float[Tensor, "case 1"]
    norm: float

    def varying(self) -> int:
        return self.middle.shape[1]

    def center(self) -> Tensor:
        return self.middle

    def draw(self, case: Tensor, generator: torch.Generator) -> Tensor:
        """In random directions, half of them on the sphere."""
        direction = _random(torch.randn, self.middle[case], generator)
        share = (2 * _random(torch.rand, direction[:, :1], generator)).clamp(max=1) ** (1 / direction.shape[1])
        length = torch.linalg.vector_norm(direction, self.norm, dim=1, keepdim=True)
        return self.middle[case] + direction * (share * self.radius[case] / length)

    def descended(self, points: Tensor, gradient: Tensor, share: Tensor, case: Tensor) -> Tensor:
        """Steps are the steepest in the norm (Euclidean for norm 1, where the projection is too)."""
        scaled = gradient / gradient.abs().amax(1, keepdim=True)  # powers of small gradients would round to zero
        steepest = scaled if self.norm == 1 else scaled.sign() * scaled.abs() ** (1 / (self.norm - 1))
        length = torch.linalg.vector_norm(steepest, max(self.norm, 2), dim=1, keepdim=True)
        return self.stirred(points, -share * steepest / length, case)

    def stirred(self, points: Tensor, noise: Tensor, case: Tensor) -> Tensor:
        middle, radius = self.middle[case], self.radius[case]
        return middle + _into_ball(points + 2 * noise * radius - middle, radius, self.norm)


_Space: TypeAlias = _Boxes | _Balls


def _into_ball(change: Float[Tensor, "point input"], radius: Float[Tensor, "point 1"], norm: float) -> Tensor:
    """The nearest point of the ball for norms 1 (Duchi et al. 2008, figure 1) and 2, else the one on the way in."""
    length = torch.linalg.vector_norm(change, norm, dim=1, keepdim=True)
    if norm != 1:
        return change * torch.where(length > radius, radius / length, 1)
    size = change.abs().sort(dim=1, descending=True).values
    mean = (size.cumsum(1) - radius) / torch.arange(1, size.shape[1] + 1, device=size.device)
    threshold = mean.gather(1, (size > mean).sum(1, keepdim=True).clamp(min=1) - 1)
    return torch.where(length > radius, change.sign() * (change.abs() - threshold).clamp(min=0), change)


@final
@dataclass(frozen=True, eq=False)
class _Unsafe:
    """The unsafe sets of several cases, padded: rows that always hold (offset inf), disjuncts that never do (-inf).

    Args: `targets`: (case, disjunct) of each disjunct there is.
    """

    matrix: Float[Tensor, "case disjunct row output"]
    offset: Float[Tensor, "case disjunct row"]
    targets: Int[Tensor, "target 2"]

    def margins(self, y: Float[Tensor, "case point output"]) -> Float[Tensor, "case point disjunct"]:
        """The worst row of each disjunct; a disjunct holds where it is <= 0."""
        rows = y @ self.matrix.flatten(1, 2).mT - self.offset.flatten(1)[:, None]
        return _number(rows.unflatten(2, self.offset.shape[1:]).amax(3))

    def rows(self, y: Float[Tensor, "point output"], target: Int[Tensor, "point 2"]) -> Float[Tensor, "point row"]:
        """The rows of one disjunct for each point."""
        case, disjunct = target.unbind(1)
        return torch.einsum("pjm,pm->pj", self.matrix[case, disjunct], y) - self.offset[case, disjunct]


@final
@dataclass(frozen=True, eq=False)
class _Search:
    network: Callable[[Tensor], Tensor]
    specification: Specification
    space: _Space
    unsafe: _Unsafe
    generator: torch.Generator
    budget: _Budget
    confirm: Callable[[Tensor], Counterexample | None]

    def run(self, restarts: int) -> Counterexample | None:
        """Rounds until the restarts or the time are spent."""
        return next((found for found in self._attempts(restarts) if found is not None), None)

    def _attempts(self, restarts: int) -> Iterator[Counterexample | None]:
        size = 1
        while restarts > 0 and not self.budget.spent():
            points, margins, found = self._explored(EXPLORED * size)
            yield found
            yield from self._descents(points, margins, min(size, restarts))
            restarts -= size
            if self.space.varying() <= FEW:
                yield from self._local_searches(points, margins, PARENTS * size)
            size *= 2

    def _explored(self, amount: int) -> tuple[Tensor, Tensor, Counterexample | None]:
        """Random points (case, point, input), their margins (case, point, disjunct), and the best if it is unsafe."""
        cases = len(self.unsafe.offset)
        case = torch.arange(cases, device=self.unsafe.offset.device).repeat_interleave(max(2, amount // cases))
        points = self.space.draw(case, self.generator).unflatten(0, (cases, -1))
        points[:, 0] = self.space.center()
        margins = self.unsafe.margins(self._outputs(points.flatten(0, 1)).unflatten(0, (cases, -1)))
        return points, margins, self._confirmed(points.flatten(0, 1), margins.amin(2).flatten())

    def _best(self, points: Tensor, margins: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The best `count` points for each target, (count, target, input), and the targets, the nearest first."""
        case, disjunct = self.unsafe.targets.unbind(1)
        values, index = margins[case, :, disjunct].topk(min(count, margins.shape[1]), dim=1, largest=False)
        order = values[:, 0].argsort()
        return points[case[order, None], index[order]].transpose(0, 1), self.unsafe.targets[order]

    def _descents(self, points: Tensor, margins: Tensor, count: int) -> Iterator[Counterexample | None]:
        """From `count` points for each target: the better half found, and new ones."""
        best, targets = self._best(points, margins, (count + 1) // 2)
        target = targets.repeat(count, 1)
        start = self.space.draw(target[:, 0], self.generator)
        start[: best.shape[0] * best.shape[1]] = best.flatten(0, 1)
        restart = torch.arange(count, device=start.device).repeat_interleave(len(targets))
        decay = start.new_tensor(DECAYS)[(restart + count) % len(DECAYS), None]
        chunks = zip(*(part.split(self.budget.batch) for part in (start, target, decay)), strict=True)
        for chunk in chunks:
            if self.budget.spent():
                return
            yield self._descent(*chunk)

    def _descent(self, points: Tensor, target: Tensor, decay: Tensor) -> Counterexample | None:
        """Half of the steps with leaky gradients; then, from the best point met, the others with true ones."""
        best, least = points, torch.full_like(points[:, 0], math.inf)
        half = self.budget.steps // 2
        for k in range(self.budget.steps):
            points = (points if k != half else best).detach().requires_grad_()
            with _LeakyGradients(LEAK) if k < half else nullcontext():
                rows = self.unsafe.rows(self._output(points), target)
            worst = rows.amax(1)
            margin = _number(worst.detach())
            found = self._confirmed(points, margin)
            if found is not None or self.budget.spent():
                return found
            best = torch.where((margin < least)[:, None], points.detach(), best)
            least = torch.minimum(margin, least)
            gradient = self._gradient(worst + rows.clamp(min=0).sum(1), points)
            share = STEP * decay ** (k if k < half else k - half)
            points = self.space.descended(points.detach(), gradient, share, target[:, 0])
        return None

    def _gradient(self, loss: Tensor, points: Tensor) -> Tensor:
        """The gradient of each point's loss; a random direction where there is none."""
        random = _random(torch.rand, points, self.generator) - 0.5
        if not loss.requires_grad:
            return random
        (gradient,) = torch.autograd.grad(loss.sum(), points)
        gradient = gradient.nan_to_num()
        return torch.where((gradient == 0).all(1, keepdim=True), random, gradient)

    def _local_searches(self, points: Tensor, margins: Tensor, parents: int) -> Iterator[Counterexample | None]:
        """From so many points, spread over the nearest targets: the better half found, and new ones."""
        best, targets = self._best(points, margins, math.ceil(parents / 2 / len(self.unsafe.targets)))
        best, target = best[:, :parents].flatten(0, 1), targets[:parents].repeat(len(best), 1)
        start = torch.cat([best, self.space.draw(target[:, 0], self.generator)])
        together = max(1, self.budget.batch // (CHILDREN + 1))
        for chunk in zip(start.split(together), target.repeat(2, 1).split(together), strict=True):
            if self.budget.spent():
                return
            yield self._local_search(*chunk)

    def _local_search(self, points: Tensor, target: Tensor) -> Counterexample | None:
        """Each point moves to the best of itself and some points around it, ever nearer."""
        target = target.repeat_interleave(CHILDREN + 1, dim=0)
        here = torch.arange(len(points), device=points.device)
        for generation in range(GENERATIONS):
            family = points.repeat_interleave(CHILDREN + 1, dim=0)
            noise = SPREAD * SHRINK**generation * _random(torch.randn, family, self.generator)
            noise = noise * (_random(torch.rand, family, self.generator) < 0.5)  # few entries at a time go further
            noise[:: CHILDREN + 1] = 0
            family = self.space.stirred(family, noise, target[:, 0])
            margin = _number(self.unsafe.rows(self._outputs(family), target).amax(1))
            found = self._confirmed(family, margin)
            if found is not None or self.budget.spent():
                return found
            points = family.unflatten(0, (len(points), -1))[here, margin.unflatten(0, (len(points), -1)).argmin(1)]
        return None

    def _confirmed(self, points: Tensor, margins: Tensor) -> Counterexample | None:
        """The point with the smallest margin, if its output is unsafe and it is confirmed."""
        best = int(margins.argmin())
        if not margins[best] <= 0:
            return None
        return self.confirm(points[best].detach().reshape(self.specification.input_shape))

    def _outputs(self, points: Tensor) -> Tensor:
        """Outputs without gradients, so many points at a time; NaN for those that the deadline leaves out."""
        found, wanted = [], len(points)
        with torch.no_grad():
            for part in points.split(self.budget.batch):
                found.append(self._output(part))
                if self.budget.spent():
                    break
        missing = found[0].new_full((wanted - sum(map(len, found)), self.specification.outputs), math.nan)
        return torch.cat([*found, missing])

    def _output(self, points: Tensor) -> Tensor:
        y = self.network(points.reshape(-1, *self.specification.input_shape))
        wanted = self.specification.outputs
        if not isinstance(y, Tensor) or y.shape[:1] != points.shape[:1] or y[0].numel() != wanted:
            shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise BadInput(
                f"the specification is about {wanted} outputs, and the network gives {shape} for {len(points)} inputs; "
                f"wanted a tensor ({len(points)}, {wanted})"
            )
        return y.flatten(1)


class _LeakyGradients(TorchFunctionMode):
    """ReLUs keep their values and get the gradient of a leaky ReLU, in any network."""

    def __init__(self, leak: float):
        super().__init__()
        self.leak = leak

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_):
            return func(*args, **(kwargs or {}))
        below = -torch.relu(-args[0])  # of the negative, a new tensor: the call may change its argument in place
        return func(*args, **(kwargs or {})) + self.leak * (below - below.detach())


def _by_kind(specification: Specification) -> list[list[Case]]:
    """The cases in groups that can be searched together: boxes, and balls of each norm."""

    def kind(case: Case) -> float:
        return case.region.norm if isinstance(case.region, Ball) else math.inf

    return [list(group) for _, group in itertools.groupby(sorted(specification.cases, key=kind), kind)]


def _space(cases: list[Case], place: Tensor) -> _Space:
    """The regions in the dtype of `place`, boxes rounded inwards."""
    first = cases[0].region
    if isinstance(first, Ball) and not math.isinf(first.norm):
        centers = torch.cat([case.region.center.flatten(1) for case in cases if isinstance(case.region, Ball)])
        radii = torch.stack([case.region.radii[:1] for case in cases if isinstance(case.region, Ball)])
        return _Balls(centers.to(place), radii.to(place), first.norm)
    boxes = [case.region.box() if isinstance(case.region, Ball) else case.region for case in cases]
    lower, upper = (torch.cat([getattr(box, end).flatten(1) for box in boxes]) for end in ("lower", "upper"))
    return _Boxes(*(settled(Box(lower, upper), end, place.dtype).to(place) for end in (lower, upper)))


def _unsafe(cases: list[Case], place: Tensor) -> _Unsafe:
    most = max(len(case.unsafe) for case in cases)
    rows = max(1, *(len(piece.offset) for case in cases for piece in case.unsafe))
    matrix = place.new_zeros(len(cases), most, rows, cases[0].rows.shape[1])
    offset = place.new_full((len(cases), most, rows), -math.inf)
    targets = [(c, d) for c, case in enumerate(cases) for d in range(len(case.unsafe))]
    for c, d in targets:
        piece = cases[c].unsafe[d]
        matrix[c, d, : len(piece.offset)] = piece.matrix.to(place)
        offset[c, d] = math.inf
        offset[c, d, : len(piece.offset)] = piece.offset.to(place)
    return _Unsafe(matrix, offset, torch.tensor(targets, device=place.device))


def _random(draw: Callable[..., Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers shaped like a tensor, drawn where the generator is."""
    return draw(like.shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def _number(margins: Tensor) -> Tensor:
    """Margins with infinity for NaN: an output that is no number violates nothing."""
    return torch.where(margins.isnan(), math.inf, margins)
