"""A figure in a light and a dark form, and what all figures share.

Colors are Okabe and Ito's, and differ in lightness and marker too; heat maps are matplotlib's
`cividis`, and `BrBG` around a middle.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WRITTEN = 160  # cells of a heat map up to which numbers stand in them
WIDTH = 7.2  # inches


@dataclass(frozen=True, slots=True)
class Theme:
    """Colors of what is written and of lines behind it."""

    text: str
    grid: str


LIGHT, DARK = Theme("#1b1b1b", "#dddddd"), Theme("#e8e8e8", "#444444")


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure of a report.

    Attributes:
        name: of its file.
        title: with what it shows, and units.
        says: the same in words and numbers.
        light, dark: PNG files.
    """

    name: str
    title: str
    says: str
    light: bytes
    dark: bytes

    def write(self, folder: Path) -> None:
        (folder / f"{self.name}.png").write_bytes(self.light)


def drawn(name: str, title: str, says: str, draw: Callable, rows: int, height: float) -> Drawing:
    """Draw in both themes.

    Args:
        draw: (figure, its axes, theme).
    """
    # Not pyplot: it would open the user's display and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = []
    for theme in (LIGHT, DARK):
        figure = Figure(figsize=(WIDTH, height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, 1, squeeze=False)[:, 0] if rows else None
        draw(figure, axes, theme)
        for axis in figure.axes:
            _tidy(axis, theme)
        face = {} if theme is DARK else {"facecolor": "white"}
        figure.savefig(file := io.BytesIO(), format="png", transparent=theme is DARK, **face)
        found.append(file.getvalue())
    return Drawing(name, title, says, *found)


def _tidy(axis: Any, theme: Theme) -> None:
    for side in axis.spines.values():
        side.set_color(theme.grid)
    axis.tick_params(colors=theme.text, labelsize=8)
    for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
        text.set(color=theme.text, fontsize=9)
    if legend := axis.get_legend():
        for text in legend.get_texts():
            text.set_color(theme.text)


def whole(*axes: Any) -> None:
    """Whole numbers alone on these axes, which count layers or experts."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True))


def mark(bar: Any, theme: Theme, label: str = "") -> None:
    """A color bar like all others."""
    bar.outline.set_visible(False)
    bar.set_label(label, color=theme.text, fontsize=8)
    bar.ax.tick_params(colors=theme.text, labelsize=8)


def lines(axis: Any, theme: Theme) -> None:
    axis.grid(True, color=theme.grid, linewidth=0.6)
    axis.set_axisbelow(True)


def legend(axis: Any) -> None:
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def heat(
    axis: Any,
    values: np.ndarray,
    theme: Theme,
    written: Callable = "{:.2f}".format,
    label: str = "",
    **how: Any,
) -> None:
    """A heat map with its color bar, and its numbers where they have room."""
    image = axis.imshow(values, aspect="auto", interpolation="nearest", **how)
    if values.size <= WRITTEN:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                light = 0.3 * red + 0.6 * green + 0.1 * blue > 0.5
                color = "black" if light else "white"
                text = written(value)
                axis.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    bar = axis.figure.colorbar(image, ax=axis, pad=0.01)
    mark(bar, theme, label)
