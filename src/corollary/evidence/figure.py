"""A figure is its data and a way to draw it: both are kept, so a picture can always be checked and redrawn."""

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

INK = "#0a0b0c"
"""The colour of text and axes. In SVG it becomes `currentColor`, so that a page can be light, dark or printed."""

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
"""Okabe and Ito 2008: told apart by the colour-blind and in grey print."""

STYLE = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "savefig.transparent": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "image.cmap": "cividis",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Figure:
    """A picture with its data.

    Args:
        name: short, for file names and anchors.
        caption: what to see in it, in a sentence or two.
        data: the columns that are drawn.
        draw: `draw(axes, data)`; with `panels` other than (1, 1), `axes` is an array of that shape.
        size: width and height in inches.
    """

    name: str
    title: str
    caption: str
    data: Mapping[str, Any]
    draw: Callable[[Any, Mapping[str, Any]], None]
    size: tuple[float, float] = (6.4, 3.8)
    panels: tuple[int, int] = (1, 1)

    def svg(self) -> str:
        """The picture as a self-contained `<svg>` element that takes its ink from the text around it."""
        with self._drawn() as canvas:
            buffer = io.StringIO()
            canvas.savefig(buffer, format="svg", dpi=110, metadata={"Date": None, "Creator": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
        # Numbered ids (axes_1, patch_2) would collide between the figures of one page, and nothing refers to them.
        text = re.sub(r'(<g) id="[A-Za-z0-9_.]+?_\d+"', r"\1", text)
        return text.replace(INK, "currentColor")

    def png(self, dpi: int = 110) -> bytes:
        """The picture as a PNG file on white."""
        with self._drawn() as canvas:
            buffer = io.BytesIO()
            canvas.savefig(buffer, format="png", dpi=dpi, facecolor="white", transparent=False)
        return buffer.getvalue()

    def csv(self) -> str:
        """The data as CSV, one column a name; columns of unequal length are padded with empty cells."""
        columns = {name: np.asarray(column).reshape(-1) for name, column in self.data.items()}
        height = max((len(column) for column in columns.values()), default=0)
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        writer.writerow(columns)
        for i in range(height):
            writer.writerow([column[i] if i < len(column) else "" for column in columns.values()])
        return buffer.getvalue()

    def _repr_html_(self) -> str:
        return f"<figure>{self.svg()}<figcaption><b>{self.title}.</b> {self.caption}</figcaption></figure>"

    @contextmanager
    def _drawn(self) -> Iterator[Any]:
        import matplotlib
        from cycler import cycler
        from matplotlib.figure import Figure as Canvas

        style: Any = {**STYLE, "axes.prop_cycle": cycler(color=PALETTE), "svg.hashsalt": self.name}
        with matplotlib.rc_context(style):
            canvas = Canvas(figsize=self.size)
            self.draw(canvas.subplots(*self.panels), self.data)
            yield canvas
