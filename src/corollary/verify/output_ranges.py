"""Exact ranges of a small network's outputs over a box, by mixed-integer programming (branch and bound on its units).

Every value of the network is an affine function of the inputs and of one variable for each unit whose sign is open: for
$h = \\max(p, 0)$ with bounds $l < 0 < u$ of p,

$$h \\ge 0,\\quad h \\ge p,\\quad h \\le p - l (1 - a),\\quad h \\le u a,\\quad a \\in \\{0, 1\\}.$$

Other piecewise-linear functions of one variable are sums of such units, one for each kink. The affine functions are
read off one pass over the graph, on a batch of the points 0, $e_1$, $e_2$, ... of the variables.
"""

import time
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.graph import Graph, Node, forward
from corollary.graph.ops import Elementwise, Op
from corollary.verify.known import Known
from corollary.verify.layout import pack, unpack
from corollary.verify.prepared import Prepared, prepare
from corollary.verify.sets import Box
from corollary.verify.sweep import sweep

OPTIMAL = 0
"""The status of a program that was solved to the end."""


def output_ranges(
    model: nn.Module | Graph,
    region: Box,
    rows: Float[Tensor, "batch row output"] | None = None,
    *,
    timeout: float | int = 10,
) -> tuple[Float[Tensor, "batch row"], Float[Tensor, "batch row"]]:
    """Least and greatest values of linear functions of the output over each box, to a relative 1e-6.

    Args:
        rows: the functions; each output by itself where None.
        timeout: seconds for each sample.
    Returns: lower and upper ends in float64, NaN where the time was out.
    Raises: CannotCapture; NoRule; BadInput, naming the layer, for a nonlinearity that is not a piecewise-linear
        function of one variable.
    Source: Tjeng, Xiao and Tedrake 2019, arXiv 1711.07356, section 4.
    """
    network = prepare(model, region.lower[:2], dtype=torch.float64)
    for node in network.nonlinear:
        if not (isinstance(node.op, Elementwise) and node.op.kinks):
            raise BadInput(
                f"{node.op} ({node.where()}) is not a piecewise-linear function of one variable, of which exact ranges "
                "are found. Bound the network instead: BoundedGraph(...).bounds(region, method='alpha-crown')"
            )
    region = region.to(torch.float64)
    if rows is None:
        outputs = network.sizes[network.graph.outputs[0]]
        rows = torch.eye(outputs, dtype=torch.float64).expand(len(region), -1, -1)
    ends = [_program(network, region[i : i + 1]).ranges(rows[i].double().cpu(), timeout) for i in range(len(region))]
    found = torch.stack(ends).to(region.lower.device)
    return found[..., 0], found[..., 1]


@final
@dataclass(frozen=True, eq=False)
class _Program:
    """One network over one box: variables are the inputs in [-1, 1], the open units' values, and their signs.

    Attributes:
        outputs: offset and coefficients of each output, (1 + inputs + units, outputs).
        open: the same of the units' arguments, (1 + inputs + units, units), in multiples of `scale`.
        lower, upper: bounds of these arguments, (units,).
        scale: what a unit's variable is a multiple of.
    """

    outputs: Tensor
    open: Tensor
    lower: Tensor
    upper: Tensor
    scale: float

    def ranges(self, rows: Tensor, timeout: float) -> Tensor:
        """Least and greatest value of each row, (rows, 2); NaN where the time was out."""
        deadline = time.monotonic() + timeout
        values = (self.outputs @ rows.T).numpy()
        found = np.full((len(rows), 2), np.nan)
        for i, (offset, *slopes) in enumerate(values.T):
            for end, sign in enumerate((1.0, -1.0)):
                least = self._least(sign * np.asarray(slopes) / self.scale, deadline - time.monotonic())
                found[i, end] = offset + sign * least * self.scale
        return torch.from_numpy(found)

    def _least(self, slopes: np.ndarray, seconds: float) -> float:
        units = len(self.lower)
        if not units:
            return -float(np.abs(slopes).sum())
        if seconds <= 0:
            return np.nan
        inputs = len(slopes) - units
        lower: Any = np.repeat([-1.0, 0.0], [inputs, 2 * units])
        upper: Any = np.concatenate([np.ones(inputs), self.upper.numpy(), np.ones(units)])
        answer = milp(
            np.concatenate([slopes, np.zeros(units)]),
            constraints=self._constraints(inputs, units),
            bounds=Bounds(lower, upper),
            integrality=np.repeat([0, 1], [inputs + units, units]),
            options={"time_limit": seconds, "mip_rel_gap": 1e-7},
        )
        return float(answer.fun) if answer.status == OPTIMAL else np.nan

    def _constraints(self, inputs: int, units: int) -> list[LinearConstraint]:
        argument = self.open[1:].T.numpy()
        offset: Any = self.open[0].numpy()
        own, none = np.eye(units), np.zeros((units, units))
        value = np.hstack([np.zeros((units, inputs)), own])
        low: Any = self.lower.numpy()
        high = self.upper.numpy()
        return [
            LinearConstraint(np.hstack([value - argument, none]), offset, np.inf),
            LinearConstraint(np.hstack([value - argument, -low[:, None] * own]), -np.inf, offset - low),
            LinearConstraint(np.hstack([value, -high[:, None] * own]), -np.inf, 0.0),
        ]


def _program(network: Prepared, region: Box) -> _Program:
    """Write the network over one box as a program, by one pass over its graph."""
    known = sweep(network, [region]).known
    radius = region.radius.flatten()
    scale = float(radius.max()) or 1.0
    free = radius.nonzero()[:, 0]
    units = {node: _open(known, node) for node in network.nonlinear}
    count = sum(int(mask.sum()) for masks in units.values() for mask in masks)
    size = 1 + len(free) + count
    points = region.center.flatten().repeat(size, 1)
    points[1 + torch.arange(len(free)), free] += radius[free]
    walk = _Walk(known, units, size, scale, 1 + len(free))
    inputs = pack(network.graph.inputs[0], points.reshape(size, 1, *region.lower.shape[1:]))
    values = forward(network.graph, [inputs], network.graph.tensors, walk.apply, batch=size)
    output = network.graph.outputs[0]
    empty = torch.zeros(0, dtype=torch.float64)
    return _Program(
        _coefficients(unpack(output, values[output], size, 1).flatten(1)).cpu(),
        torch.cat(walk.arguments, 1).cpu() if count else torch.zeros(size, 0, dtype=torch.float64),
        torch.cat(walk.lower).cpu() if count else empty,
        torch.cat(walk.upper).cpu() if count else empty,
        scale,
    )


def _coefficients(values: Tensor) -> Tensor:
    """Offset and slopes of affine functions from their values at 0 and at the unit points."""
    return torch.cat([values[:1], values[1:] - values[:1]])


def _open(known: Known, node: Node) -> list[Tensor]:
    """For each kink of a node's function, which entries can lie on both sides of it."""
    lower, upper = (end[0] for end in known.flat(node.inputs[0]))
    assert isinstance(node.op, Elementwise)  # `output_ranges` has asked
    return [(lower < kink) & (kink < upper) for kink in node.op.kinks]


@final
class _Walk:
    """The pass over the graph: the values of nodes at 0 and at the unit points of the variables.

    Args:
        units: the open entries of each nonlinear node by kink.
        size: number of points; scale: value of a unit's variable at its point; first: the place of the first unit.
    """

    def __init__(self, known: Known, units: dict[Node, list[Tensor]], size: int, scale: float, first: int):
        self.known, self.units, self.size, self.scale, self.next = known, units, size, scale, first
        self.arguments: list[Tensor] = []
        self.lower: list[Tensor] = []
        self.upper: list[Tensor] = []

    def apply(self, node: Node, op: Op, values: tuple[Any, ...]) -> Tensor:
        """The value of a node; a nonlinear one is the line left of its first kink and a unit for each kink."""
        if node not in self.units:
            return op(*values)
        assert isinstance(op, Elementwise)
        given = unpack(node.inputs[0], values[0], self.size, 1)
        argument = given.flatten(1)
        ends = tuple(end[0] for end in self.known.flat(node.inputs[0]))
        kinks = torch.tensor(op.kinks, dtype=argument.dtype, device=argument.device)
        around = torch.cat([kinks[:1] - 1, kinks, kinks[-1:] + 1])
        slopes = op(around).diff() / around.diff()
        found = op(kinks[:1]) + slopes[0] * (argument - kinks[0])
        for kink, bend, mask in zip(kinks, slopes.diff(), self.units[node], strict=True):
            found = found + bend * self._unit(argument - kink, ends[0] - kink, ends[1] - kink, mask)
        return pack(node, found.reshape(given.shape))

    def _unit(self, argument: Tensor, lower: Tensor, upper: Tensor, mask: Tensor) -> Tensor:
        """max(argument, 0), by a variable of its own where the sign is open."""
        found = torch.where(lower >= 0, argument, torch.zeros_like(argument))
        entries = mask.nonzero()[:, 0]
        self.arguments.append(_coefficients(argument[:, entries]) / self.scale)
        self.lower.append(lower[entries] / self.scale)
        self.upper.append(upper[entries] / self.scale)
        found[:, entries] = 0.0
        found[self.next + torch.arange(len(entries)), entries] = self.scale
        self.next += len(entries)
        return found
