r"""Where to cut the range of a neuron: the point that leaves the least area between the lines on both sides.

The best cut of [l, u] for what reads the neuron is looked up in a table over l and u that is built once a pattern:
$\arg\min_p \; \mathrm{area}(l, p) + \mathrm{area}(p, u)$, with the area between the default lines summed over the ops
that read the neuron. A factor of a product adds the volume between its planes, which is $(w_x w_y)^2 / 2$ for boxes of
these widths whatever their place: so a table has the other factor's width as a third axis, and no fourth.

Source: Shi et al. 2025, arXiv 2405.21063, section on pre-optimised branching points.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.base.files import atomic_write
from corollary.graph.ops import Op, Torch
from corollary.verify.relaxations import Lines, OneKink, Relaxation, relaxation
from corollary.verify.relaxations.piecewise import Step

VERSION = 1
"""Part of the name of every stored table: raised when lines, and with them the best cuts, change."""

REFINEMENT = 4
"""Candidates of a cut between two neighbouring ends of the table."""

WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Widths of the other factor of a product at which a table is built."""

CHUNK = 4_000_000
"""Entries of the largest temporary array."""


def area_between(lines: Lines, lower: Tensor, upper: Tensor) -> Tensor:
    """Area between the two lines over each box [lower, upper]."""
    gap = (lines.upper_slope - lines.lower_slope) * (upper**2 - lower**2) / 2
    if lines.upper_offset is not None:
        gap = gap + lines.upper_offset * (upper - lower)
    return gap if lines.lower_offset is None else gap - lines.lower_offset * (upper - lower)


def total_area(relaxations: Sequence[Relaxation], lower: Tensor, upper: Tensor) -> Tensor:
    """Area between the default lines over each box, summed over the ops."""
    area = torch.zeros_like(lower)
    for one in relaxations:
        area = area + area_between(one.lines(lower, upper), lower, upper)
    return area


@dataclass(frozen=True, eq=False)
class BranchingTable:
    """Best cuts of the boxes whose ends are on a grid.

    Args:
        low, high, step: the grid, the same for both ends.
        points: [width of the other factor, lower end, upper end]; one width where there is no product.
        at_zero: cut at zero every box around it (ReLU and its kin, and products by themselves).
    """

    low: float
    high: float
    step: float
    points: Tensor
    at_zero: bool = False

    @staticmethod
    def build(
        relaxations: Sequence[Relaxation],
        step: float = 0.05,
        low: float = -5.0,
        high: float = 5.0,
        *,
        product: bool = False,
    ) -> "BranchingTable":
        """The table of a neuron that ops of one variable with these relaxations read.

        Args: `product`: a product reads the neuron too.
        Raises: BadInput, for an empty grid or a step that does not divide it.
        """
        count = round((high - low) / step) + 1
        if count < 2 or abs((count - 1) * step - (high - low)) > 1e-6 * step:
            raise BadInput(f"a table needs a step that divides its range, got step {step} for [{low}, {high}]")
        if all(isinstance(one, OneKink | Step) for one in relaxations):
            return BranchingTable(low, high, step, torch.zeros(1, 0, 0), at_zero=True)
        fine = (count - 1) * REFINEMENT + 1
        grid = torch.linspace(low, high, fine, dtype=torch.float64)
        width = (grid[None, :] - grid[:, None]).clamp_min(0)
        areas = total_area(relaxations, grid[:, None].expand(fine, fine), grid[:, None] + width)
        # The volume beside a product, a mean over the other factor: a density, as the areas are.
        shares = [w / 2 * width**2 for w in WIDTHS] if product else [torch.zeros_like(width)]
        points = torch.stack([_best_cuts(areas + share, grid) for share in shares])
        return BranchingTable(low, high, step, points.to(torch.float32))

    def point(self, lower: Tensor, upper: Tensor, other_width: Tensor | None = None) -> Tensor:
        """Where to cut boxes: inside each, its middle where the table does not reach or the box is within a cell.

        Args: `other_width`: of the other factor's box, where the pattern has a product; it broadcasts.
        """
        middle = lower + (upper - lower) / 2
        if self.at_zero:
            return torch.where((lower < 0) & (upper > 0), 0.0, middle)
        last = self.points.shape[-1] - 1
        start, end = torch.ceil((lower - self.low) / self.step), torch.floor((upper - self.low) / self.step)
        known = (start >= 0) & (end <= last) & (end > start)
        row, column = (torch.where(known, place, 0).to(torch.int64) for place in (start, end))
        layer = torch.zeros_like(row) if other_width is None else self._layer(other_width).expand(row.shape)
        found = self.points.to(lower)[layer, row, column]
        return torch.where(known & (found > lower) & (found < upper), found, middle)

    def _layer(self, width: Tensor) -> Tensor:
        """Index of the tabulated width nearest to each, by ratio."""
        if len(self.points) == 1:
            return torch.zeros_like(width, dtype=torch.int64)
        first = torch.log2(width.new_tensor(WIDTHS[0]))
        place = torch.log2(width.clamp_min(WIDTHS[0])) - first
        return place.round().clamp_max(len(WIDTHS) - 1).to(torch.int64)

    def save(self, path: Path) -> None:
        """Write the table to a file."""
        about = {"low": self.low, "high": self.high, "step": self.step, "at_zero": int(self.at_zero)}
        content = save({"points": self.points}, {name: repr(value) for name, value in about.items()})
        atomic_write(path, content)

    @staticmethod
    def load(path: Path) -> "BranchingTable":
        """Read a table.

        Raises: BadInput, if the file is not one.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = {name: float(value) for name, value in (file.metadata() or {}).items()}
                points = file.get_tensor("points")
            return BranchingTable(about["low"], about["high"], about["step"], points, bool(about["at_zero"]))
        except (SafetensorError, KeyError, ValueError) as error:
            raise BadInput(f"{path} is not a table of branching points: {error}") from error


def _best_cuts(areas: Tensor, grid: Tensor) -> Tensor:
    """argmin over p of areas[l, p] + areas[p, u], for l and u at every REFINEMENT-th point of the grid.

    Of equal cuts the one nearest to the middle is taken.
    """
    count = len(grid)
    coarse = torch.arange(0, count, REFINEMENT)
    inside = torch.arange(count)[None, :, None]
    found = []
    for rows in coarse.split(max(1, CHUNK // (count * len(coarse)))):
        sums = areas[rows][:, :, None] + areas[:, coarse][None]  # [lower, cut, upper]
        off_middle = (grid[None, :, None] - (grid[rows][:, None, None] + grid[coarse][None, None]) / 2).abs()
        outside = (inside <= rows[:, None, None]) | (inside >= coarse[None, None])
        found.append(torch.where(outside, torch.inf, sums + 1e-9 * off_middle).argmin(1))
    return grid[torch.cat(found)]


@cache
def branching_table(ops: tuple[Op, ...], *, product: bool = False, step: float = 0.05) -> BranchingTable:
    """The table of a neuron that these ops read, from the user's cache, or built and kept there.

    Raises: BadInput, for an op without a relaxation.
    """
    known = [relaxation(op) for op in ops]
    missing = [str(op) for op, one in zip(ops, known, strict=True) if one is None]
    if missing:
        raise BadInput(f"no relaxation, and so no branching points, for {', '.join(missing)}")
    relaxations = [one for one in known if one is not None]
    # What a call outside the vocabulary computes is not in its name.
    path = None if any(isinstance(op, Torch) for op in ops) else _cache_path(ops, product, step)
    if path is not None and path.exists():
        try:
            return BranchingTable.load(path)
        except BadInput:
            path.unlink(missing_ok=True)
    table = BranchingTable.build(relaxations, step, product=product)
    if path is not None:
        try:
            table.save(path)
        except OSError:
            return table  # a cache that cannot be written costs the next process a second, no more
    return table


def _cache_path(ops: tuple[Op, ...], product: bool, step: float) -> Path:
    pattern = "|".join([str(VERSION), *sorted(map(str, ops)), f"product={product}", f"step={step}"])
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "corollary" / "branching" / f"{hashlib.sha256(pattern.encode()).hexdigest()[:24]}.safetensors"
