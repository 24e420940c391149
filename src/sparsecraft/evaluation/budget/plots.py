"""Pictures of what was measured, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's colors, which people with any color vision can tell apart, dark ones first.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
GRAY = "#555555"
DASHED = (0, (5, 4))  # of lines that others are set beside: chance, an equal share, the baseline


def sweep_png(
    path: Path,
    rows: Sequence[dict[str, Any]],
    *,
    score: str,
    axis: str,
    title: str,
    note: str,
    batch_sizes: Sequence[int],
) -> None:
    """Score, and where it was measured latency, against the FLOPs of the split networks.

    Args:
        rows: as `sweep` gives them, the dense function first.
        score: the column to draw.
        axis: its name, with its unit.
        note: small print below: machine, data, size of the pass that was timed.
    """
    import textwrap

    # Not pyplot: it would open the user's display and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [row for row in rows if row.get(score) is not None]
    height = 7.4 if batch_sizes else 4.6
    figure = Figure(figsize=(6.4, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [1.15, 1] if batch_sizes else [1]
    axes = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    _score(axes[0], drawn, score, axis)
    figure.suptitle(title, fontsize=11)
    if batch_sizes:
        _latency(axes[1], drawn, batch_sizes)
    widest = max(100.0, *(100 * row["ffn_flops"] for row in drawn))
    axes[-1].set_xlim(0, widest * 1.04)
    axes[-1].set_xlabel("FLOPs of the split FFNs per token, routers included (% of the dense FFNs)")
    small = textwrap.fill(note, 105)
    figure.supxlabel(small, fontsize=6.5, color=GRAY, x=0.5)
    figure.savefig(path)


def _score(axes: Any, rows: Sequence[dict[str, Any]], score: str, axis: str) -> None:
    dense, sparse = rows[0], sorted(rows[1:], key=lambda row: row["ffn_flops"])
    axes.axhline(dense[score], color=GRAY, linewidth=1, linestyle=DASHED, zorder=1)
    axes.plot(
        [100 * row["ffn_flops"] for row in sparse],
        [row[score] for row in sparse],
        color=COLORS[0],
        marker=MARKERS[0],
        markersize=5,
        linewidth=1.8,
        label="routed",
        zorder=3,
    )
    axes.plot(
        [100],
        [dense[score]],
        color="black",
        marker="*",
        markersize=13,
        linestyle="none",
        label=f"every expert: {dense[score]:.3f}",
        zorder=4,
    )
    axes.set_ylabel(axis)
    _tidy(axes)


def _latency(axes: Any, rows: Sequence[dict[str, Any]], batch_sizes: Sequence[int]) -> None:
    ordered = sorted(rows, key=lambda row: row["ffn_flops"])
    axes.axhline(1, color=GRAY, linewidth=1, linestyle=DASHED, zorder=1)
    for number, size in enumerate(batch_sizes):
        dense = rows[0][f"latency_ms_{size}"]
        middle = [row[f"latency_ms_{size}"] / dense for row in ordered]
        low = [row[f"latency_low_{size}"] / dense for row in ordered]
        high = [row[f"latency_high_{size}"] / dense for row in ordered]
        places = [100 * row["ffn_flops"] for row in ordered]
        color = COLORS[number % len(COLORS)]
        axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0, zorder=2)
        axes.plot(
            places,
            middle,
            color=color,
            marker=MARKERS[number % len(MARKERS)],
            markersize=4.5,
            linewidth=1.6,
            label=f"batch {size} (all {dense:.3g} ms)",
            zorder=3,
        )
    axes.set_ylabel("measured latency of one pass\n(every expert = 1; band: quartiles)")
    axes.set_ylim(bottom=0)
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5)
