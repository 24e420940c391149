"""The page on a training run, and its figures. S log lines, L layers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from sparsecraft.evaluation.budget.plots import COLORS, DASHED, MARKERS
from sparsecraft.evaluation.pages.drawing import Drawing, Theme, drawn, heat, legend, lines
from sparsecraft.evaluation.pages.writing import render, short, write_report

# Measure of a layer -> what it is called, with its unit.
MEASURES = {
    "load_entropy": "load entropy, all even = 1",
    "router_entropy": "router entropy, undecided = 1",
    "max_load": "largest load, equal share = 1",
    "dead_experts": "experts without tokens",
    "saturation": "choices that stayed",
    "computing_experts": "computing experts of a token",
    "dropped": "share of slots dropped",
}
TICKS = 8  # of a heat map's steps


def write_page(
    metrics: dict[str, Any], drawn: list[Drawing], out: str | Path, title: str
) -> list[str]:
    """Write a report of what `training_series` found, with its `drawings`; see `write_report`."""
    values = {"metrics": metrics, "rows": layer_rows(metrics), "stages": stage_rows(metrics)}
    return write_report(metrics, drawn, render("training.html.j2", drawn, title, **values), out)


def drawings(metrics: dict[str, Any]) -> list[Drawing]:
    """The figures for which there is something to show."""
    return [found for draw in (loss, measures, evenness) if (found := draw(metrics)) is not None]


# ------------------------------------------------------------------ tables
def stage_rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """First and last loss of each stage, a column each."""
    found = []
    for stage in metrics["stages"]:
        ends = stage["begun"] + stage["steps"]
        inside = [stage["begun"] < step <= ends for step in metrics["steps"]]
        values = [v for v, own in zip(metrics["series"]["loss"], inside, strict=True) if own]
        found.append(
            {
                "stage": stage["stage"],
                "steps": stage["steps"],
                "log lines": len(values),
                "first loss": values[0],
                "last loss": values[-1],
            }
        )
    return found


def layer_rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The first and the last value of each measure, a row for each layer."""
    kinds = [kind for kind in MEASURES if kind in metrics["layers"]]
    names = dict.fromkeys(name for kind in kinds for name in metrics["layers"][kind])
    found = []
    for name in names:
        row: dict[str, Any] = {"layer": short(name)}
        for kind in kinds:
            known = [v for v in metrics["layers"][kind].get(name, ()) if v is not None]
            row |= {f"{_words(kind)}, first": known[0] if known else None}
            row |= {f"{_words(kind)}, last": known[-1] if known else None}
        found.append(row)
    return found


# ------------------------------------------------------------------ figures
def loss(metrics: dict) -> Drawing:
    """The loss, and the auxiliary losses below it."""
    series, steps = metrics["series"], np.array(metrics["steps"])
    own = [key for key in series if key.endswith("_loss") and any(map(bool, series[key]))]

    def draw(figure, axes, theme):
        for axis, keys in zip(axes, [["loss"], own], strict=False):
            for at, key in enumerate(keys):
                values_S = _values(series[key])
                live_S = ~np.isnan(values_S)
                style = {"color": COLORS[at % len(COLORS)], "markersize": 2.5}
                form, name = f"{MARKERS[at % len(MARKERS)]}-", _words(key.removesuffix("_loss"))
                axis.plot(steps[live_S], values_S[live_S], form, label=name, **style)
            _tidied(axis, metrics, theme)
        axes[0].set(ylabel="nats, all losses")
        axes[-1].set(xlabel="step")
        if own:
            axes[1].set(ylabel="auxiliary losses")
            legend(axes[1])

    values = [value for value in series["loss"] if value is not None] or [math.nan]
    says = f"From {values[0]:.3f} to {values[-1]:.3f} nats over {steps[-1]:,} steps."
    if own:
        ends = (f"{_words(key)} {_last(series[key]):.4g}" for key in own)
        says += f" At the end, before their coefficients: {', '.join(ends)}."
    rows = 2 if own else 1
    return drawn("loss", "Loss over the steps of training", says, draw, rows, 2.3 * rows)


def measures(metrics: dict) -> Drawing | None:
    """Each measure of the routers: its mean over layers, between the lowest and the highest."""
    layers = metrics["layers"]
    kinds = [kind for kind in MEASURES if kind in layers and _known(layers[kind])]
    if not kinds:
        return None
    steps = np.array(metrics["steps"])

    def draw(figure, axes, theme):
        for axis, kind in zip(axes, kinds, strict=True):
            values_LS = _table(layers[kind])
            live_S = ~np.isnan(values_LS).all(0)
            at, values_LS = steps[live_S], values_LS[:, live_S]
            low, high = np.nanmin(values_LS, 0), np.nanmax(values_LS, 0)
            axis.fill_between(at, low, high, color=COLORS[0], alpha=0.25, linewidth=0)
            axis.plot(at, np.nanmean(values_LS, 0), "o-", color=COLORS[0], markersize=2.5)
            axis.set_title(MEASURES[kind])
            if kind == "dead_experts":
                most = max(1, high.max())
                axis.set_ylim(-0.06 * most, 1.06 * most)
            _tidied(axis, metrics, theme)
        axes[-1].set(xlabel="step")

    says = "Lines are means over layers, bands reach from the lowest layer to the highest. "
    says += "At the end: " + "; ".join(_ends(kind, _table(layers[kind])) for kind in kinds) + "."
    title = "What routers do over the steps of training"
    return drawn("routers", title, says, draw, len(kinds), 1.75 * len(kinds) + 0.3)


def evenness(metrics: dict) -> Drawing | None:
    """How even the load of each layer is, at each log line."""
    layers = metrics["layers"].get("load_entropy")
    if not layers or not _known(layers):
        return None
    values_LS, steps = _table(layers), metrics["steps"]

    def draw(figure, axes, theme):
        low = min(0.9, np.nanmin(values_LS))
        heat(axes[0], values_LS, theme, cmap="cividis", vmin=low, vmax=1, label="load entropy")
        shown = sorted({round(at) for at in np.linspace(0, len(steps) - 1, TICKS)})
        axes[0].set(xlabel="step", ylabel="layer", yticks=range(len(layers)), xticks=shown)
        axes[0].set_xticklabels([f"{steps[at]:,}" for at in shown])
        axes[0].set_yticklabels([short(name) for name in layers], fontsize=6)

    last_L = values_LS[:, ~np.isnan(values_LS).all(0)][:, -1]
    worst = int(np.nanargmin(last_L))
    says = (
        f"At the end the least even layer is {short(list(layers)[worst])}, at {last_L[worst]:.3f}."
    )
    height = min(12.0, 1.2 + 0.24 * len(layers))
    return drawn("evenness", "Load entropy of each layer, all even = 1", says, draw, 1, height)


# ------------------------------------------------------------------ parts of figures
def _values(series: list[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in series], dtype=float)


def _table(layers: dict[str, list]) -> np.ndarray:
    return np.stack([_values(series) for series in layers.values()])


def _known(layers: dict[str, list]) -> bool:
    """Whether a measure has a number anywhere."""
    return not np.isnan(_table(layers)).all()


def _last(series: list[float | None]) -> float:
    return next((value for value in reversed(series) if value is not None), float("nan"))


def _words(key: str) -> str:
    return key.replace("_", " ")


def _tidied(axis: Any, metrics: dict, theme: Theme) -> None:
    """All steps, lines behind them, and where each further stage begins."""
    lines(axis, theme)
    axis.set_xlim(0, 1.02 * metrics["steps"][-1])
    for stage in metrics["stages"][1:]:
        axis.axvline(stage["begun"], color=theme.text, linewidth=0.8, linestyle=DASHED)
        at = (stage["begun"], 1.0)
        axis.annotate(
            f" {stage['stage']}", at, xycoords=("data", "axes fraction"), fontsize=7, va="top",
            color=theme.text,
        )  # fmt: skip


def _ends(kind: str, values_LS: np.ndarray) -> str:
    """The last values of a measure in words."""
    last_L = values_LS[:, ~np.isnan(values_LS).all(0)][:, -1]
    written = "{:.3g}".format
    found = written(np.nanmean(last_L))
    if np.nanmin(last_L) != np.nanmax(last_L):
        found += f" ({written(np.nanmin(last_L))} to {written(np.nanmax(last_L))})"
    return f"{MEASURES[kind].partition(',')[0]} {found}"
