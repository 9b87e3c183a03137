"""What is asked of a network: input regions, and for each the outputs that must not occur."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.verify.sets import Ball, Box, Region


@dataclass(frozen=True, eq=False)
class Halfspaces:
    r"""All y with $C y \le b$, row by row: a conjunction. Without rows, every y.

    Args:
        matrix: $C$, (row, output).
        offset: $b$, (row,).
    Raises: BadInput, for lengths that differ, or entries that are not finite.
    """

    matrix: Tensor
    offset: Tensor

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2 or self.offset.shape != self.matrix.shape[:1]:
            raise BadInput(
                f"halfspaces need a matrix (row, output) and an offset (row,), got {tuple(self.matrix.shape)} "
                f"and {tuple(self.offset.shape)}"
            )
        if not (self.matrix.isfinite().all() and self.offset.isfinite().all()):
            raise BadInput("halfspaces need finite coefficients and offsets; leave a row out that bounds nothing")


@dataclass(frozen=True, eq=False)
class Case:
    r"""One input region and its unsafe outputs $U = \bigcup_d \{y : C_d\, y \le b_d\}$, each $d$ a disjunct.

    Args:
        region: a box or ball of one sample, (1, *input).
        unsafe: the disjuncts: an input of the region whose output is in any of them is a counterexample.
    Raises: BadInput, for a region of several samples, no disjunct, or disjuncts on outputs of different lengths.
    """

    region: Region
    unsafe: tuple[Halfspaces, ...]

    def __post_init__(self) -> None:
        if len(self.region) != 1:
            raise BadInput(f"a case is about one region, and {len(self.region)} are given: make a case of each of them")
        lengths = {piece.matrix.shape[1] for piece in self.unsafe}
        if len(lengths) != 1:
            raise BadInput(
                f"a case needs one or more unsafe sets on outputs of one length, got lengths {sorted(lengths)}"
            )

    @cached_property
    def rows(self) -> Float[Tensor, "row output"]:
        """The rows of all disjuncts, one after the other."""
        return torch.cat([piece.matrix for piece in self.unsafe])

    @cached_property
    def offsets(self) -> Float[Tensor, " row"]:
        """The right-hand side of each row."""
        return torch.cat([piece.offset for piece in self.unsafe])

    @cached_property
    def disjunct(self) -> Int[Tensor, " row"]:
        """The index of the disjunct that each row belongs to."""
        counts = torch.tensor([len(piece.offset) for piece in self.unsafe], device=self.rows.device)
        return torch.repeat_interleave(torch.arange(len(self.unsafe), device=self.rows.device), counts)

    def by_disjunct(self, values: Float[Tensor, "*batch row"]) -> Float[Tensor, "*batch disjunct"]:
        """The largest value among the rows of each disjunct; minus infinity for one without rows."""
        start = values.new_full((*values.shape[:-1], len(self.unsafe)), -math.inf)
        return start.scatter_reduce(-1, self.disjunct.to(values.device).expand(values.shape), values, "amax")

    def proved(self, lower: Float[Tensor, "*batch row"], *, above: float = 0.0) -> Bool[Tensor, "*batch"]:
        r"""Whether lower bounds of $C y - b$, row by row, exclude every disjunct: each needs one row `above` zero."""
        return (self.by_disjunct(lower) > above).all(dim=-1)

    def margins(self, outputs: Float[Tensor, "batch *output"]) -> Float[Tensor, " batch"]:
        r"""How far each output is from the unsafe set: $\min_d \max_j\, (C_d\, y - b_d)_j$, unsafe where it is <= 0."""
        flat = outputs.flatten(1)
        return self.by_disjunct(flat @ self.rows.to(flat).mT - self.offsets.to(flat)).amin(dim=-1)

    def reshape(self, input_shape: Sequence[int]) -> "Case":
        """The same case on inputs of the network's own shape, given without its batch axis."""
        return Case(_reshaped(self.region, tuple(input_shape)), self.unsafe)


@dataclass(frozen=True, eq=False)
class Specification:
    r"""A property of a network f, by its counterexamples: x in the region of a case, with f(x) unsafe in that case.

    It holds ("unsat") if there is none. Every comparison is non-strict: a point on the boundary of an unsafe set is a
    counterexample.

    Raises: BadInput, without cases, or for cases on inputs or outputs of different sizes.
    """

    cases: tuple[Case, ...]

    def __post_init__(self) -> None:
        sizes = {(tuple(_corner(case.region).shape), case.rows.shape[1]) for case in self.cases}
        if len(sizes) != 1:
            raise BadInput(
                "a specification needs one or more cases, all on inputs of one shape and outputs of one length, got "
                + (", ".join(f"{shape} to {outputs}" for shape, outputs in sorted(sizes)) or "no case")
            )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch axis."""
        return tuple(_corner(self.cases[0].region).shape[1:])

    @property
    def outputs(self) -> int:
        """Length of an output, flattened."""
        return self.cases[0].rows.shape[1]

    @classmethod
    def robustness(
        cls,
        x: Tensor,
        radius: float,
        label: int,
        classes: int,
        *,
        clip: tuple[float, float] | None = None,
        norm: float = math.inf,
    ) -> "Specification":
        r"""No x' with $\|x' - x\|_p \le$ `radius` has another class's output as high as that of `label`.

        Args:
            x: one sample, (1, *input).
            clip: the range of the data, to which the box is cut; for the infinite norm only.
            norm: $p$.
        Raises: BadInput, for a label that is no class, fewer than two classes, or a clip of a ball that is no box.
        """
        if classes < 2 or not 0 <= label < classes:
            raise BadInput(
                f"the label must be one of 0 to {classes - 1} of two or more classes, got {label} of {classes}"
            )
        region: Region = Ball(x, radius, norm)
        if math.isinf(norm):
            region = region.box()
        if clip is not None:
            region = _clipped(region, clip)
        others = [k for k in range(classes) if k != label]
        matrix = torch.zeros(len(others), 1, classes, dtype=x.dtype, device=x.device)
        matrix[:, 0, label] = 1.0
        matrix[range(len(others)), 0, others] = -1.0
        return cls((Case(region, tuple(Halfspaces(rows, rows.new_zeros(1)) for rows in matrix)),))

    @classmethod
    def output_bounds(
        cls,
        region: Region,
        lower: Float[Tensor, " output"] | None = None,
        upper: Float[Tensor, " output"] | None = None,
    ) -> "Specification":
        """Every output lies strictly between `lower` and `upper`, for all inputs of the region (one case a sample).

        Args: `lower`, `upper`: infinite, or None, where there is no bound.
        Raises: BadInput, if nothing is bounded, or the lengths differ.
        """
        unsafe = []
        for sign, ends in ((1.0, lower), (-1.0, upper)):
            if ends is not None:
                unit = sign * torch.eye(len(ends), dtype=ends.dtype, device=ends.device)
                unsafe += [Halfspaces(unit[k : k + 1], sign * ends[k : k + 1]) for k in _finite(ends)]
        if not unsafe:
            raise BadInput("no output is bounded: give lower or upper bounds, at least one of them finite")
        return cls(tuple(Case(region[i : i + 1], tuple(unsafe)) for i in range(len(region))))

    def violated(self, x: Tensor, y: Tensor, *, tolerance: float = 0.0) -> bool:
        """Whether input x with output y is a counterexample, compared in float64.

        Args:
            x, y: one sample each, of any shape; x must be in a region exactly.
            tolerance: how far from the unsafe set y may be.
        Raises: BadInput, for another number of inputs or outputs.
        """
        inputs = math.prod(self.input_shape)
        if x.numel() != inputs or y.numel() != self.outputs:
            raise BadInput(
                f"the specification is about {inputs} inputs and {self.outputs} outputs of one sample, got shapes "
                f"{tuple(x.shape)} and {tuple(y.shape)}"
            )
        output = y.double().reshape(1, -1)
        return any(contains(case.region, x) and bool(case.margins(output) <= tolerance) for case in self.cases)

    def reshape(self, input_shape: Sequence[int]) -> "Specification":
        """The same property on inputs of the network's own shape, given without its batch axis.

        Raises: BadInput, if that shape holds another number of inputs.
        """
        return Specification(tuple(case.reshape(input_shape) for case in self.cases))

    def enclosing(self, dtype: torch.dtype) -> "Specification":
        """The specification in `dtype`, its regions and unsafe sets rounded outwards: proved of it, this one holds.

        Raises: BadInput, for a coefficient of an output that `dtype` cannot hold.
        """
        return Specification(
            tuple(
                Case(
                    _enclosing_region(case.region, dtype), tuple(_enclosing_set(piece, dtype) for piece in case.unsafe)
                )
                for case in self.cases
            )
        )


def contains(region: Region, x: Tensor) -> bool:
    """Whether one sample, of any shape, is in a region of one sample; compared in float64."""
    flat = x.double().flatten()
    if isinstance(region, Ball):
        distance = torch.linalg.vector_norm(flat - region.center.double().flatten(), region.norm)
        return bool(distance <= region.radii.double()[0])
    return bool(((region.lower.double().flatten() <= flat) & (flat <= region.upper.double().flatten())).all())


def rounded(values: Tensor, dtype: torch.dtype, *, up: bool) -> Tensor:
    """`values` in `dtype`, rounded up or down rather than to nearest."""
    nearest = values.to(dtype)
    wrong = nearest.double() < values.double() if up else nearest.double() > values.double()
    return torch.where(
        wrong, torch.nextafter(nearest, torch.full_like(nearest, math.inf if up else -math.inf)), nearest
    )


def _corner(region: Region) -> Tensor:
    return region.center if isinstance(region, Ball) else region.lower


def _finite(ends: Tensor) -> list[int]:
    return [int(k) for k in ends.isfinite().nonzero().flatten()]


def _clipped(region: Region, clip: tuple[float, float]) -> Box:
    if isinstance(region, Ball):
        raise BadInput(
            f"a ball of norm {region.norm:g} cut to the range {clip} is no ball: leave clip out (what is proved then "
            "holds inside the range too), or use norm=inf"
        )
    low, high = clip
    if bool((region.upper < low).any()) or bool((region.lower > high).any()):
        raise BadInput(f"the box leaves the range {clip} altogether: is x scaled to that range?")
    return Box(region.lower.clamp(min=low), region.upper.clamp(max=high))


def _reshaped(region: Region, input_shape: tuple[int, ...]) -> Region:
    corner = _corner(region)
    if math.prod(input_shape) != corner.numel():
        raise BadInput(
            f"the region has {corner.numel()} inputs, shaped {tuple(corner.shape[1:])}, and shape {input_shape} holds "
            f"{math.prod(input_shape)}: do network and property belong together?"
        )
    shape = (1, *input_shape)
    if isinstance(region, Ball):
        return Ball(region.center.reshape(shape), region.radius, region.norm)
    return Box(region.lower.reshape(shape), region.upper.reshape(shape))


def _enclosing_region(region: Region, dtype: torch.dtype) -> Region:
    if isinstance(region, Box):
        return Box(rounded(region.lower, dtype, up=False), rounded(region.upper, dtype, up=True))
    center = region.center.to(dtype)
    moved = torch.linalg.vector_norm((center.double() - region.center.double()).flatten(), region.norm)
    # The sum of two float64 numbers is itself rounded: one more step up covers that.
    radius = torch.nextafter(region.radii.double() + moved, moved.new_tensor(math.inf))
    return Ball(center, rounded(radius, dtype, up=True), region.norm)


def _enclosing_set(piece: Halfspaces, dtype: torch.dtype) -> Halfspaces:
    matrix = piece.matrix.to(dtype)
    if not torch.equal(matrix.double(), piece.matrix.double()):
        raise BadInput(f"the specification has coefficients of outputs that {dtype} cannot hold: use torch.float64")
    return Halfspaces(matrix, rounded(piece.offset, dtype, up=True))
