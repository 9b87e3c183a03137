"""What is to be proved, in the form that bounds answer: rows on the output, for each of many boxes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.graph import Node
from corollary.verify.layout import Rows, pack, sample_shape
from corollary.verify.sets import Ball, Box, Region
from corollary.verify.specification import Specification


@dataclass(frozen=True, eq=False)
class Queries:
    """For each region: outputs y are unsafe where, for some disjunct, every row of it has row . y <= offset.

    Args:
        region: of `n` samples.
        rows: (n, r, outputs); offsets: (n, r).
        disjunct: which disjunct a row belongs to, (n, r), from 0.
        open: disjuncts not yet proved impossible, (n, disjuncts).
    """

    region: Region
    rows: Tensor
    offsets: Tensor
    disjunct: Tensor
    open: Tensor

    @classmethod
    def of(cls, specification: Specification, dtype: torch.dtype, device: torch.device) -> "Queries":
        """The cases of a specification side by side; those with fewer rows repeat their last.

        Raises: BadInput, for boxes and balls, or balls of several norms, in one specification.
        """
        cases = specification.enclosing(dtype).cases
        most = max(len(case.offsets) for case in cases)
        fill = [torch.arange(most).clamp(max=len(case.offsets) - 1) for case in cases]
        rows = torch.stack([case.rows[index] for case, index in zip(cases, fill, strict=True)])
        offsets = torch.stack([case.offsets[index] for case, index in zip(cases, fill, strict=True)])
        disjunct = torch.stack([case.disjunct[index] for case, index in zip(cases, fill, strict=True)])
        opened = torch.zeros(len(cases), int(disjunct.max()) + 1, dtype=torch.bool)
        opened.scatter_(1, disjunct, True)
        region = _side_by_side([case.region for case in cases])
        parts = (rows.to(dtype), offsets.to(dtype), disjunct, opened)
        return cls(region.to(device), *(part.to(device) for part in parts))

    def __len__(self) -> int:
        return len(self.region)

    def __getitem__(self, samples: Tensor | slice) -> "Queries":
        return Queries(
            self.region[samples], self.rows[samples], self.offsets[samples], self.disjunct[samples], self.open[samples]
        )

    def only_open(self) -> "Queries":
        """Those of one region without the rows of disjuncts that are closed."""
        rows = self.open[0][self.disjunct[0]].nonzero()[:, 0]
        return replace(self, rows=self.rows[:, rows], offsets=self.offsets[:, rows], disjunct=self.disjunct[:, rows])

    def on(self, output: Node) -> Rows:
        """The rows as linear functions of the network's output."""
        batch, count, _ = self.rows.shape
        values = self.rows.reshape(batch, count, *sample_shape(output))
        return Rows(pack(output, values), batch, count)

    def functions(self, output: Node, index: Tensor) -> Rows | Tensor:
        """Some rows of one region's query as functions of the output, for each of several domains.

        Args: `index`: of rows, (domains, count).
        """
        values = self.rows[0][index]
        return Rows(pack(output, values.reshape(*index.shape, *sample_shape(output))), *index.shape)

    def margins(self, lower: Tensor) -> Tensor:
        """The best row of each disjunct, (n, disjuncts), from lower bounds (n, r) of row . y - offset.

        A disjunct is impossible over the region where this is positive; for disjuncts without rows it is infinite.
        """
        best = lower.new_full(self.open.shape, -torch.inf)
        best = best.scatter_reduce(1, self.disjunct, lower, "amax", include_self=True)
        return torch.where(self.open, best, torch.inf)

    def violated(self, outputs: Tensor) -> Tensor:
        """Whether outputs (k, n, outputs) are unsafe for the query of the sample, (k, n)."""
        values = torch.einsum("nro,kno->knr", self.rows, outputs) - self.offsets
        worst = values.new_full((*values.shape[:2], self.open.shape[1]), -torch.inf)
        worst = worst.scatter_reduce(2, self.disjunct.expand_as(values), values, "amax", include_self=True)
        return ((worst <= 0) & self.open).any(2)


@dataclass(frozen=True, eq=False)
class OpenBoxes:
    """Parts of the regions of queries that are not proved.

    Args:
        box: of `n` samples; open: disjuncts not yet proved impossible, (n, disjuncts); case: whose part each is, (n,).
    """

    box: Box
    open: Tensor
    case: Tensor

    def __len__(self) -> int:
        return len(self.case)

    def __getitem__(self, boxes: Tensor) -> "OpenBoxes":
        return OpenBoxes(self.box[boxes], self.open[boxes], self.case[boxes])

    @classmethod
    def joined(cls, parts: "list[OpenBoxes]") -> "OpenBoxes":
        """Those of several parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        box = Box(torch.cat([part.box.lower for part in parts]), torch.cat([part.box.upper for part in parts]))
        return cls(box, torch.cat([part.open for part in parts]), torch.cat([part.case for part in parts]))

    def within(self, queries: Queries) -> "OpenBoxes":
        """The same in the dtype of queries that hold the same regions, cut to these."""
        whole = queries[self.case].region
        assert isinstance(whole, Box)
        box = self.box.to(whole.lower.dtype)
        lower = torch.minimum(torch.maximum(box.lower, whole.lower), whole.upper)
        return OpenBoxes(Box(lower, torch.maximum(torch.minimum(box.upper, whole.upper), lower)), self.open, self.case)


def _side_by_side(regions: list[Region]) -> Region:
    """Regions of one sample each as one region."""
    boxes = [region for region in regions if isinstance(region, Box)]
    balls = [region for region in regions if isinstance(region, Ball)]
    if not balls:
        return Box(torch.cat([box.lower for box in boxes]), torch.cat([box.upper for box in boxes]))
    if boxes or len({ball.norm for ball in balls}) > 1:
        raise BadInput("the cases of one specification must be all boxes, or all balls of one norm")
    return Ball(torch.cat([b.center for b in balls]), torch.cat([b.radii for b in balls]), balls[0].norm)
