"""A comparison in words, as tables, as a figure, and as a page."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sparsecraft.evaluation.budget.plots import COLORS, DASHED, MARKERS
from sparsecraft.evaluation.comparison.compare import ALL
from sparsecraft.evaluation.comparison.intervals import in_words
from sparsecraft.evaluation.pages.drawing import Drawing, Theme, drawn, lines
from sparsecraft.evaluation.pages.writing import render, write_report

MARK = 4  # points from the middle of a marker to its edge
# Points that a label of the figure may stand above or below its marker, the nearest first.
RISES = tuple(sign * (8 + 12 * step) for step in range(12) for sign in (1, -1))
FAR = 8.0  # times the fewest FLOPs, from which their axis is logarithmic


def labels(metrics: dict[str, Any]) -> list[str]:
    """Of every model the last part of its name, or all of it where that would be ambiguous."""
    return _short([model["name"] for model in metrics["models"]])


def _short(names: list[str]) -> list[str]:
    short = [Path(name).name or name for name in names]
    return short if len(set(short)) == len(short) else names


def sentences(metrics: dict[str, Any]) -> list[str]:
    """Of every model but the baseline, what is known of its loss over all rows."""
    first, *others = zip(labels(metrics), metrics["models"], strict=True)
    return [in_words(name, first[0], model["difference"][ALL]) for name, model in others]


# ------------------------------------------------------------------ tables
def rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for every model, numbers as they are."""
    return [
        {
            "model": name,
            **_of_loss(model, ALL),
            "parameters, M": model["total"] / 1e6,
            "active, M": model["active"] / 1e6,
            "MFLOPs a token": model["flops_per_token"] / 1e6,
            "weights, MB": model["bytes"] / 1e6,
            "tokens/s": model["tokens_per_second"],
            "experts": _span(model["experts"]),
            "of a token": _span(model["experts_per_token"]),
        }
        for name, model in zip(labels(metrics), metrics["models"], strict=True)
    ]


def rows_of_files(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for every file and model; none of a single file, which is all rows."""
    files = [file for file in metrics["files"] if file != ALL]
    return [
        {"file": short, "model": name, **_of_loss(model, file)}
        for file, short in zip(files, _short(files), strict=True)
        for name, model in zip(labels(metrics), metrics["models"], strict=True)
        if len(files) > 1
    ]


def _of_loss(model: dict[str, Any], file: str) -> dict[str, Any]:
    found = model["difference"] and model["difference"][file]
    accuracy = {"accuracy": model["accuracy"][file]} if "accuracy" in model else {}
    return {
        "loss": model["loss"][file],
        **accuracy,
        "difference": found and found["difference"],
        "95 % from": found and found["low"],
        "to": found and found["high"],
        "loss is": found["verdict"] if found else "baseline",
    }


def _span(numbers: list[float]) -> str | None:
    """The numbers of all layers: one, or the least and the most."""
    ends = [f"{number:g}" for number in (numbers[0], numbers[-1])] if numbers else []
    return "-".join(dict.fromkeys(ends)) or None


def tables(metrics: dict[str, Any], width: int) -> list[Table]:
    """Of models and, where there are several, of files.

    Args:
        width: characters of a line; what is wider stands on its side, a model in a column.
    """
    found = [_in_words(table) for table in (rows(metrics), rows_of_files(metrics)) if table]
    upright = _table(found[0])
    if Console(width=1000).measure(upright).maximum > width:
        upright = _table(_turned(found[0]))
    return [upright, *map(_table, found[1:])]


def _in_words(table: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{key: _text(key, value) for key, value in row.items()} for row in table]


def _turned(table: list[dict[str, str]]) -> list[dict[str, str]]:
    first, *keys = table[0]
    return [{"": key, **{row[first]: row[key] for row in table}} for key in keys]


def _table(found: list[dict[str, str]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, key in enumerate(found[0]):
        words = number == 0 or key in ("model", "loss is")
        style = {"justify": "left" if words else "right", "overflow": "fold"}
        table.add_column(key, no_wrap=number == 0, **style)
    for row in found:
        table.add_row(*row.values())
    return table


def _text(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if key in ("loss", "accuracy"):
        return f"{value:.4f}"
    if key in ("difference", "95 % from", "to"):
        return f"{value:+.4f}"
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


# ------------------------------------------------------------------ figure
def drawing(metrics: dict[str, Any]) -> Drawing:
    """Differences of losses against FLOPs."""
    names, models = labels(metrics), metrics["models"]
    x = np.array([model["flops_per_token"] for model in models], dtype=float)
    found = [(model["difference"] or {}).get(ALL) for model in models]
    y = np.array([one["difference"] if one else 0.0 for one in found])
    names[0] += " (baseline)"

    def draw(figure, axes, theme):
        from matplotlib.ticker import EngFormatter

        axis = axes[0]
        axis.axhline(0, color=theme.text, linewidth=0.8, linestyle=DASHED)
        for number, one in enumerate(found):
            style = {
                "color": COLORS[number % len(COLORS)],
                "marker": MARKERS[number % len(MARKERS)],
            }
            ends = None
            if one and one["low"] is not None:  # percentiles may leave the difference outside
                ends = np.maximum(0, [[y[number] - one["low"]], [one["high"] - y[number]]])
            axis.errorbar(
                x[number], y[number], ends, markersize=7, capsize=3, linewidth=1.2, **style
            )
        axis.set(
            xlabel="FLOPs of a token, forward",
            ylabel="nats per label more than the baseline\n(bars: 95 % intervals)",
        )
        if x.max() > FAR * x.min():
            axis.set_xscale("log")
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.margins(x=0.15, y=0.15)
        lines(axis, theme)
        _label(axis, x, y, names, theme)

    title = "Loss against FLOPs of a token, with 95 % intervals over documents"
    height = max(3.2, 1.0 + 0.25 * len(names))
    return drawn("comparison", title, " ".join(sentences(metrics)), draw, 1, height)


def _label(axis: Any, x: np.ndarray, y: np.ndarray, names: list[str], theme: Theme) -> None:
    """A name beside each point, and where another stands there, above or below with a line."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    axis.figure.draw_without_rendering()  # the layout, by which places are known
    pixels = axis.transData.transform(np.stack([x, y], 1))
    room = axis.figure.dpi / 72 * MARK
    taken = [Bbox([point - room, point + room]) for point in pixels]
    line = {"arrowstyle": "-", "color": theme.text, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4}
    for name, *at in zip(names, x, y, strict=True):
        for rise, (aside, align) in itertools.product(RISES, ((7, "left"), (-7, "right"))):
            text = axis.annotate(
                name, at, (aside, rise), textcoords="offset points", ha=align, va="center",
                fontsize=8, color=theme.text, arrowprops=line if abs(rise) > RISES[0] else None,
            )  # fmt: skip
            text.update_positions(axis.figure.canvas.get_renderer())
            box = Text.get_window_extent(text)  # without the line, which an annotation's has
            inside = axis.bbox.x0 < box.x0 and box.x1 < axis.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            axis.annotate(name, at, fontsize=8, color=theme.text)
        taken.append(box)


# ------------------------------------------------------------------ page
def write_page(metrics: dict[str, Any], drawing: Drawing, out: str | Path) -> list[str]:
    """Write a report of what `compare` found, with its `drawing`; see `write_report`."""
    return write_report(metrics, [drawing], page(metrics, drawing), out)


def page(metrics: dict[str, Any], drawing: Drawing) -> str:
    """The report as HTML."""
    title = f"{len(metrics['models'])} models beside each other"
    values = {"rows": rows(metrics), "by_file": rows_of_files(metrics), "text": _text}
    given = {"metrics": metrics, "sentences": sentences(metrics), "all": ALL, **values}
    return render("comparison.html.j2", [drawing], title, **given)
