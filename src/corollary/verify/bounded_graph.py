"""Bounds of a network's outputs over regions of its inputs: the face of the bound engine."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import Inputs
from corollary.graph import Graph, Node
from corollary.verify.forward_bounds import Between, ends_of, forward_bounds
from corollary.verify.intervals import Interval, propagate
from corollary.verify.known import Known
from corollary.verify.layout import Rows, pack, sample_shape
from corollary.verify.linear_bounds import lower_bounds
from corollary.verify.prepared import Prepared, prepare
from corollary.verify.sets import Box, Region
from corollary.verify.slopes import Ascent, optimised
from corollary.verify.sweep import check, sweep

Method = Literal["interval", "forward", "interval+crown", "forward+crown", "crown", "alpha-crown"]
TOGETHER = 2**24
"""Samples are optimised together while their rows at the widest node have at most so many coefficients."""


class BoundedGraph:
    """A network made ready for bounds; what it computes once is kept between calls.

    Args:
        model: a module or a captured graph with one output.
        example: an input that a module is captured with.
        dtype: of the bounds; the network's own where None.

    Raises: CannotCapture; NoRule, naming the op, where the network has one that bounds do not understand.
    """

    def __init__(self, model: nn.Module | Graph, example: Inputs | None = None, *, dtype: torch.dtype | None = None):
        if isinstance(model, nn.Module) and example is None:
            raise BadInput("a module needs an example of its input to be captured with")
        self.network: Prepared = prepare(model, example, dtype=dtype)
        if len(self.network.graph.outputs) != 1:
            raise BadInput(f"bounds are of one output; the network returns {len(self.network.graph.outputs)}")

    @property
    def output(self) -> Node:
        """The node whose value is bounded."""
        return self.network.graph.outputs[0]

    def bounds(
        self,
        region: Region | Sequence[Region],
        rows: Tensor | None = None,
        *,
        method: Method = "crown",
        iterations: int = 20,
        learning_rate: float = 0.25,
    ) -> tuple[Tensor, Tensor]:
        r"""Lower and upper bounds of linear functions of the output, for every sample's region.

        Args:
            region: one for each input of the network, each with the same number of samples.
            rows: the functions, (rows, outputs) or (batch, rows, outputs); each output by itself where None.
            method: "interval"; "crown", linear bounds from every node that a relaxation reads; "interval+crown", these
                bounded by intervals and the output alone by linear bounds (cheaper, looser); "forward", linear bounds
                carried forward, for few inputs; "forward+crown", nodes bounded by these and the output by a backward
                pass; "alpha-crown", with all free parameters of the relaxations optimised.
            iterations, learning_rate: of the optimisation.
        Returns: (batch, rows) each.
        Raises: BadInput, for regions or rows that do not fit the network.
        Source: Zhang et al. 2018, arXiv 1811.00866; Xu et al. 2020, arXiv 2002.12920; Xu et al. 2021, arXiv 2011.13824.
        """
        regions = [region] if not isinstance(region, Sequence) else list(region)
        regions = [part.to(self.network.dtype).to(self.network.device) for part in regions]
        check(self.network, regions)
        matrix = self._matrix(rows, len(regions[0]))
        if method == "interval":
            return self._by_intervals(regions, matrix)
        both = torch.cat([matrix, -matrix], dim=1)
        gradient = torch.is_grad_enabled() and any(t.requires_grad for t in self.network.graph.tensors.values())
        with torch.set_grad_enabled(gradient):
            if method == "alpha-crown":
                lower = torch.cat(
                    [
                        self._optimised(part, both if len(both) == 1 else both[index], iterations, learning_rate)
                        for index, part in self._parts(regions, both)
                    ]
                )
            elif method == "forward":
                lower = self._forward(regions, both)
            else:
                if method == "forward+crown":
                    known, _ = forward_bounds(self.network, regions)
                else:
                    known = sweep(self.network, regions, linear=method == "crown").known
                lower = lower_bounds(self.network, self.output, self._rows(both), regions, known).lower
        count = matrix.shape[1]
        low, high = lower[:, :count], -lower[:, count:]
        interval_low, interval_high = self._by_intervals(regions, matrix)
        return torch.maximum(low, interval_low), torch.minimum(high, interval_high)

    def _forward(self, regions: list[Region], rows: Tensor) -> Tensor:
        """Lower bounds of the rows from the linear bounds of the output."""
        _, found = forward_bounds(self.network, regions)
        middle, half = (part.flatten(2).mT for part in (found.middle, found.half))
        lower, _ = ends_of(Between((rows @ middle).mT, (rows.abs() @ half).mT), regions)
        return torch.where(lower.isnan(), -torch.inf, lower)

    def _parts(self, regions: list[Region], rows: Tensor) -> list[tuple[Tensor, list[Region]]]:
        """Samples to optimise together."""
        widest = max(self.network.sizes.values())
        batch = len(regions[0])
        together = max(
            1, TOGETHER // (widest * 2 * max([self.network.sizes[n] for n in self.network.bounded], default=1))
        )
        return [(part, [region[part] for region in regions]) for part in torch.arange(batch).split(together)]

    def _optimised(self, regions: list[Region], rows: Tensor, iterations: int, learning_rate: float) -> Tensor:
        found = sweep(self.network, regions)
        ascent = Ascent(iterations, learning_rate)
        return optimised(self.network, self.output, self._rows(rows), regions, found, ascent=ascent).lower

    def _matrix(self, rows: Tensor | None, batch: int) -> Tensor:
        outputs = self.network.sizes[self.output]
        like = {"dtype": self.network.dtype, "device": self.network.device}
        if rows is None:
            return torch.eye(outputs, **like)[None]
        matrix = rows.to(**like)
        matrix = matrix[None] if matrix.ndim == 2 else matrix
        if matrix.ndim != 3 or matrix.shape[2] != outputs or matrix.shape[0] not in (1, batch):
            raise BadInput(
                f"rows must be (rows, {outputs}) or ({batch}, rows, {outputs}) for this network and region, got "
                f"{tuple(rows.shape)}"
            )
        return matrix

    def _rows(self, matrix: Tensor) -> Rows:
        batch, count, _ = matrix.shape
        shaped = matrix.reshape(batch, count, *sample_shape(self.output))
        return Rows(pack(self.output, shaped), batch, count)

    def _by_intervals(self, regions: list[Region], matrix: Tensor) -> tuple[Tensor, Tensor]:
        boxes = [region if isinstance(region, Box) else region.box() for region in regions]
        ends = propagate(self.network.graph, [Interval(box.lower, box.upper) for box in boxes])[self.output]
        assert isinstance(ends, Interval)
        known = Known(self.network, len(regions[0]), {self.output: ends})
        low, high = known.flat(self.output)
        positive, negative = matrix.clamp(min=0), matrix.clamp(max=0)
        lower = (positive @ low[..., None] + negative @ high[..., None])[..., 0]
        upper = (positive @ high[..., None] + negative @ low[..., None])[..., 0]
        return lower.nan_to_num(nan=-math.inf, neginf=-math.inf), upper.nan_to_num(nan=math.inf, posinf=math.inf)
