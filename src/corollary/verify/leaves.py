"""Domains with nothing left to split, by linear programs: the best multipliers of their constraints, and a worst input.

Where every neuron that matters is held to one piece, the network is affine on the domain, and its bound with the best
multipliers is exact. Gradient steps only come near these, and a proof that is short by little needs them to the digit.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from corollary.graph import Node
from corollary.verify.known import Known
from corollary.verify.linear_bounds import lower_bounds
from corollary.verify.prepared import Prepared
from corollary.verify.sets import Ball, Region

INFEASIBLE = 2
"""The status by which scipy says that no point satisfies the constraints."""


@dataclass(frozen=True, eq=False)
class Constraints:
    """Split constraints of one domain: sign * z <= sign * point for entries of nodes.

    Args:
        node: of each, an index into `nodes`; `entry`, `sign`, `point`: (constraints,); sign 0 stands for none.
    """

    nodes: tuple[Node, ...]
    node: Tensor
    entry: Tensor
    sign: Tensor
    point: Tensor


def multipliers_and_point(
    network: Prepared, region: Region, known: Known, constraints: Constraints, slopes: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """What linear programs say of one domain.

    Args:
        region: of one sample.
        known: bounds of its neurons.
        slopes, offsets: linear functions that lie below its rows, (rows, inputs) and (rows,).
    Returns: multipliers (rows, constraints), each row's own best; and the input (inputs,), in the region, where the
        largest of the rows is least.
    """
    matrix, limits = _below(network, region, known, constraints)
    box = region.box() if isinstance(region, Ball) else region
    ends = np.stack([box.lower.flatten().double().cpu().numpy(), box.upper.flatten().double().cpu().numpy()], axis=1)
    rows, constants = slopes.detach().double().cpu().numpy(), offsets.detach().double().cpu().numpy()
    found = np.stack(
        [_multipliers(row, constant, matrix, limits, ends) for row, constant in zip(rows, constants, strict=True)]
    )
    like = {"dtype": network.dtype, "device": network.device}
    point = torch.as_tensor(_worst(rows, constants, matrix, limits, ends), **like)
    return torch.as_tensor(found, **like), _inside(point, region)


def _below(network: Prepared, region: Region, known: Known, constraints: Constraints) -> tuple[np.ndarray, np.ndarray]:
    """The constraints as conditions matrix . x <= limits that every input of the domain satisfies."""
    inputs = (region.center if isinstance(region, Ball) else region.lower).flatten(1).shape[1]
    matrix = np.zeros((len(constraints.sign), inputs))
    limits = np.zeros(len(constraints.sign))
    for index, node in enumerate(constraints.nodes):
        place = ((constraints.node == index) & (constraints.sign != 0)).nonzero()[:, 0]
        if not len(place):
            continue
        sign = constraints.sign[place]
        rows = (sign * (constraints.entry[place] + 1)).long()[None]
        bound = lower_bounds(network, node, rows, [region], known)
        slopes: Mapping[Node, Tensor] = bound.slopes
        where = place.cpu().numpy()
        for values in slopes.values():
            matrix[where] = values[0].detach().double().cpu().numpy()
        limits[where] = (sign * constraints.point[place] - bound.offset[0]).detach().double().cpu().numpy()
    return matrix, limits


def _multipliers(
    row: np.ndarray, constant: float, matrix: np.ndarray, limits: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """The dual of min row . x over the domain; where that is empty, what proves it so, large enough for the row."""
    found = linprog(row, A_ub=matrix, b_ub=limits, bounds=ends, method="highs")
    if found.status == 0:
        return -found.ineqlin.marginals.clip(max=0)
    if found.status != INFEASIBLE:
        return np.zeros(len(limits))
    # min s with matrix . x - s <= limits: s > 0, and its dual shows it.
    shortest = linprog(
        np.append(np.zeros(len(row)), 1.0),
        A_ub=np.hstack([matrix, -np.ones((len(limits), 1))]),
        b_ub=limits,
        bounds=[*ends, (0, None)],
        method="highs",
    )
    if shortest.status != 0 or shortest.fun <= 0:
        return np.zeros(len(limits))
    least = constant + np.minimum(row * ends[:, 0], row * ends[:, 1]).sum()
    return -shortest.ineqlin.marginals.clip(max=0) * (2 * abs(least) + 1) / shortest.fun


def _worst(
    rows: np.ndarray, constants: np.ndarray, matrix: np.ndarray, limits: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """Where the largest row is least; the middle of the box where the domain is empty."""
    count, inputs = rows.shape
    found = linprog(
        np.append(np.zeros(inputs), 1.0),
        A_ub=np.vstack([np.hstack([rows, -np.ones((count, 1))]), np.hstack([matrix, np.zeros((len(limits), 1))])]),
        b_ub=np.concatenate([-constants, limits]),
        bounds=[*ends, (None, None)],
        method="highs",
    )
    return found.x[:-1] if found.status == 0 else ends.mean(axis=1)


def _inside(point: Tensor, region: Region) -> Tensor:
    """The point, moved into the region."""
    if not isinstance(region, Ball):
        return torch.minimum(torch.maximum(point, region.lower.flatten()), region.upper.flatten())
    change = point - region.center.flatten()
    length = torch.linalg.vector_norm(change, region.norm)
    return region.center.flatten() + change * (region.radii[0] / length).clamp(max=1.0) if length > 0 else point
