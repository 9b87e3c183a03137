"""A network's outputs at the points of a grid on a plane: what can be seen where regions are too many, or none."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from corollary.evidence import PALETTE
from corollary.geometry.polygons import Polygons
from corollary.geometry.slices import DecisionBoundary, Plane, SliceRegions, finish_slice

COLOURS = (*PALETTE[:6], "#f0e442", "#882255", "#332288", "#a6761d")
"""Of classes; where there are more, the smallest ones are drawn in one grey."""
INK = "#0a0b0c"
ENTRIES = 2**22
"""Numbers of inputs that are formed at once."""


@final
@dataclass(frozen=True, eq=False)
class SampledSlice:
    """Outputs at the middles of the cells of a grid on a box.

    Args:
        box: its corners; those of the plane's coordinates that are smallest come first.
        scores: of each point, the grid's first axis along u. A single one stands for a class where it is positive.
    """

    plane: Plane
    box: Float[Tensor, "4 2"]
    scores: Float[Tensor, "side side output"]

    @property
    def side(self) -> int:
        """Points along a side."""
        return len(self.scores)

    @cached_property
    def winners(self) -> Int64[Tensor, "side side"]:
        """The class at each point."""
        return self.scores.argmax(2) if self.scores.shape[2] > 1 else (self.scores[:, :, 0] > 0).long()

    def class_shares(self) -> Float[Tensor, "class"]:
        """Share of the points of each class."""
        found = torch.bincount(self.winners.flatten(), minlength=max(2, self.scores.shape[2]))
        return found.double() / self.winners.numel()

    def boundary(self) -> DecisionBoundary:
        """The decision boundary of the scores interpolated between the points, on two triangles for each four of them.

        What is finer than a step of the grid is not seen.
        """
        several = self.scores.shape[2] > 1
        seen = self.winners.unique() if several else torch.tensor([0, 1])
        points = torch.cat([self._points, self.scores[:, :, seen if several else [0]].double()], dim=2)
        a, b, c, d = points[:-1, :-1], points[1:, :-1], points[1:, 1:], points[:-1, 1:]
        triangles = torch.cat([torch.stack(corners, 2).flatten(0, 1) for corners in ((a, b, c), (c, d, a))])
        corners, scores = triangles.split([2, triangles.shape[2] - 2], dim=2)
        winner = scores.argmax(2) if several else (scores[:, :, 0] > 0).long()
        mixed = (winner != winner[:, :1]).any(1)  # of linear functions, one that leads in all corners leads throughout
        if not mixed.any():
            empty = torch.zeros(0, dtype=torch.int64)
            return DecisionBoundary(torch.zeros(0, 2, 2, dtype=torch.float64), empty, empty.reshape(0, 2))
        corners, scores = corners[mixed], scores[mixed]
        coefficients = torch.linalg.solve(torch.cat([torch.ones_like(corners[:, :, :1]), corners], dim=2), scores)
        polygons = Polygons(corners.numpy(), np.full(len(corners), 3))
        regions = SliceRegions(self.plane, self.box, polygons, torch.arange(len(corners)), coefficients)
        found = regions.boundary()
        return DecisionBoundary(found.ends, found.region, seen[found.classes])

    def columns(self, names: Sequence[str] = ()) -> dict[str, Any]:
        """What a drawing shows: the grid, the value at each point (u slowest) and, of classes, boundary and names.

        Args: `names`: of the classes, by number; without, the first output itself is shown.
        """
        u, v = self._points[:, 0, 0].numpy(), self._points[0, :, 1].numpy()
        found: dict[str, Any] = {"grid_u": u, "grid_v": v}
        if not names:
            return found | {"grid_value": self.scores[:, :, 0].flatten().double().numpy()}
        ends = self.boundary().ends.numpy().reshape(-1, 4).T
        columns = ("grid_boundary_u0", "grid_boundary_v0", "grid_boundary_u1", "grid_boundary_v1")
        return (
            found
            | {"grid_class": self.winners.flatten().numpy(), "grid_class_name": np.array(names)}
            | dict(zip(columns, ends, strict=True))
        )

    @cached_property
    def _points(self) -> Float[Tensor, "side side 2"]:
        return grid(self.box, self.side).reshape(self.side, self.side, 2)


def grid(box: Float[Tensor, "4 2"], side: int) -> Float[Tensor, "point 2"]:
    """The middles of the cells of a box that is cut into `side` times `side` of them, u slowest."""
    low, high = box.amin(0), box.amax(0)
    steps = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    return low + torch.cartesian_prod(steps, steps) * (high - low)


def sample_slice(
    outputs: Callable[[Tensor], Tensor],
    plane: Plane,
    box: Float[Tensor, "4 2"],
    side: int,
    *,
    dtype: torch.dtype = torch.float64,
) -> SampledSlice:
    """Evaluate a network at the points of a grid, as many at once as fit in memory.

    Args:
        outputs: gives the outputs [n, ...] of inputs [n, *input].
        side: points along a side of the grid.
        dtype: of the inputs that it is given.
    """
    uv = grid(box, side)
    parts = uv.split(max(1, min(4096, ENTRIES // max(1, plane.origin.numel()))))
    with torch.no_grad():
        scores = torch.cat([outputs(plane.points(part).to(dtype)).flatten(1).cpu() for part in parts])
    return SampledSlice(plane, box, scores.reshape(side, side, -1))


# -------------------------------------------------------------------------------------------------------- drawing


def draw_samples(axes: Any, data: Mapping[str, Any]) -> None:
    """Draw the columns of `SampledSlice.columns`, the part `exact_u`, `exact_v` if given, and the marks of a slice."""
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D
    from matplotlib.patches import Polygon

    u, v = np.asarray(data["grid_u"]), np.asarray(data["grid_v"])
    handles: list[Any] = []
    if "grid_class" in data:
        handles += _draw_classes(axes, data)
        ends = np.stack([data[f"grid_boundary_{name}"] for name in ("u0", "v0", "u1", "v1")], axis=1)
        axes.add_collection(LineCollection(list(ends.reshape(-1, 2, 2)), colors=INK, linewidths=1.2))
        handles.append(Line2D([], [], color=INK, lw=1.2, label="decision boundary, sampled"))
    else:
        image = np.asarray(data["grid_value"]).reshape(len(u), len(v)).T
        axes.figure.colorbar(axes.pcolormesh(u, v, image, rasterized=True), ax=axes, label="output")
    if "exact_u" in data:
        corners = np.stack([data["exact_u"], data["exact_v"]], axis=1)
        axes.add_patch(Polygon(corners, fill=False, edgecolor="white", lw=3.2, zorder=3))
        handles.append(axes.add_patch(Polygon(corners, fill=False, edgecolor=INK, lw=1.4, ls="--", zorder=3)))
        handles[-1].set_label("part mapped exactly")
    half = (u[1] - u[0]) / 2, (v[1] - v[0]) / 2
    axes.set(xlim=(u[0] - half[0], u[-1] + half[0]), ylim=(v[0] - half[1], v[-1] + half[1]))
    finish_slice(axes, data)
    if handles:
        axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)


def _draw_classes(axes: Any, data: Mapping[str, Any]) -> list[Any]:
    """The classes in colours, the largest first; returns what the legend shows of them."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    present, place, count = np.unique(data["grid_class"], return_inverse=True, return_counts=True)
    order = np.argsort(-count, kind="stable")
    shown = sorted(order[: len(COLOURS)])  # in the order of the classes
    colour = np.full(len(present), len(shown))
    colour[shown] = np.arange(len(shown))
    colours = [*COLOURS[: len(shown)], PALETTE[6]]
    u, v = data["grid_u"], data["grid_v"]
    image = colour[place].reshape(len(u), len(v)).T
    shades = ListedColormap(colours)
    axes.pcolormesh(u, v, image, cmap=shades, vmin=-0.5, vmax=len(shown) + 0.5, alpha=0.5, rasterized=True)
    names = [str(data["grid_class_name"][present[i]]) for i in shown]
    names += ["other classes"] if len(present) > len(shown) else []
    pairs = zip(colours[: len(names)], names, strict=True)
    return [Patch(facecolor=shade, alpha=0.5, label=_as_class(name)) for shade, name in pairs]


def _as_class(name: str) -> str:
    return f"class {name}" if name.isdigit() else name
