"""The page on what neurons do, and its figures. D domains, L layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sparsecraft.evaluation.budget.plots import COLORS, DASHED, MARKERS
from sparsecraft.evaluation.pages.drawing import Drawing, drawn, heat, legend, lines, whole
from sparsecraft.evaluation.pages.writing import render, write_report

CHANCE = {"linewidth": 0.9, "linestyle": DASHED}


def write_page(
    metrics: dict[str, Any], drawn: list[Drawing], out: str | Path, title: str
) -> list[str]:
    """Write a report of what `analyze_neurons` found, with its `drawings`; see `write_report`."""
    html = render("neurons.html.j2", drawn, title, metrics=metrics)
    return write_report(metrics, drawn, html, out)


def drawings(metrics: dict[str, Any]) -> list[Drawing]:
    """The figures for which there is something to show."""
    return [found for draw in FIGURES if (found := draw(metrics)) is not None]


def _names(metrics: dict) -> list[str]:
    return [Path(domain).stem for domain in metrics["domains"]]


def _sides(metrics: dict) -> dict[str, dict]:
    twin = {"random weights": metrics["twin"]} if metrics["twin"] else {}
    return {"this model": metrics["model"]} | twin


def _between(rows: list[list[float]]) -> float:
    """The mean of a table without its diagonal."""
    values = np.array(rows)
    return float(values[~np.eye(len(values), dtype=bool)].mean())


def overlaps(metrics: dict) -> Drawing:
    names, sides, chance = _names(metrics), _sides(metrics), metrics["share"]
    tables = [np.array(side["overlap"]) / chance for side in sides.values()]
    most = max(2.0, *(table[~np.eye(len(table), dtype=bool)].max() for table in tables))

    def draw(figure, axes, theme):
        panels = figure.subplots(1, len(sides), squeeze=False)[0]
        for axis, (side, measures) in zip(panels, sides.items(), strict=True):
            values = np.array(measures["overlap"]) / chance
            np.fill_diagonal(values, np.nan)
            heat(axis, values, theme, cmap="cividis", vmin=0, vmax=most)
            axis.set(title=side, xticks=range(len(names)), yticks=range(len(names)))
            axis.set_xticklabels(names, rotation=30, ha="right")
            axis.set_yticklabels(names)

    parts = [
        f"{side}: {_between(measures['overlap']) / chance:.2f} times chance on average "
        f"({_between(measures['overlap_by_layer']) / chance:.2f} with as many of each layer)"
        for side, measures in sides.items()
    ]
    title = f"How many of a domain's neurons ({chance:.0%}) are another's too, chance = 1"
    built_in = " Domains are compared with each other, which keeps overlaps below chance."
    says = "; ".join(parts) + "." + ("" if metrics["reference"] else built_in)
    return drawn("overlaps", title, says[0].upper() + says[1:], draw, 0, 3.2)


def places(metrics: dict) -> Drawing:
    names, at = _names(metrics), range(len(metrics["layers"]))

    def draw(figure, axes, theme):
        axis = axes[0]
        for d, name in enumerate(names):
            style = {"color": COLORS[d % len(COLORS)], "markersize": 4}
            axis.plot(at, metrics["model"]["by_layer"][d], f"{MARKERS[d % len(MARKERS)]}-",
                      label=name, **style)  # fmt: skip
            if metrics["twin"]:
                axis.plot(at, metrics["twin"]["by_layer"][d], ":", color=style["color"],
                          label=f"{name}, random weights")  # fmt: skip
        axis.axhline(1 / len(at), color=theme.text, label="chance", **CHANCE)
        axis.set(xlabel="layer, from the input", ylabel="share of the domain's neurons", ylim=0)
        whole(axis.xaxis)
        lines(axis, theme)
        legend(axis)

    shares = np.array(metrics["model"]["by_layer"]).mean(0)
    says = f"On average the last layer holds {shares[-1]:.1%} of them and the first {shares[0]:.1%}"
    if metrics["twin"]:
        twin = np.array(metrics["twin"]["by_layer"]).mean(0)
        says += f" (random weights: {twin[-1]:.1%} and {twin[0]:.1%})"
    title = "Where the neurons of a domain lie"
    return drawn("places", title, f"{says}; by chance {1 / len(at):.1%}.", draw, 1, 3.0)


def clusters(metrics: dict) -> Drawing:
    sides, at = _sides(metrics), range(len(metrics["layers"]))

    def inside(measures: dict, key: str) -> list[float]:
        return [
            float(np.mean([row["inside"] for row in layer[key]])) for layer in measures["clusters"]
        ]

    def draw(figure, axes, theme):
        axis = axes[0]
        for number, (side, measures) in enumerate(sides.items()):
            axis.plot(at, inside(measures, "domains"), f"{MARKERS[number]}-", markersize=4,
                      color=COLORS[number], label=side)  # fmt: skip
        axis.plot(at, inside(metrics["model"], "random"), color=theme.text,
                  label="random clusters", **CHANCE)  # fmt: skip
        axis.set(xlabel="layer, from the input", ylabel="share in such clusters", ylim=(0, None))
        whole(axis.xaxis)
        lines(axis, theme)
        legend(axis)

    found = {side: np.mean(inside(measures, "domains")) for side, measures in sides.items()}
    by_chance = np.mean(inside(metrics["model"], "random"))
    parts = [f"{share:.1%} ({side})" for side, share in found.items()]
    says = (
        "Over domains and layers, clusters of similar weights that hold more of a domain's neurons "
        f"than chance gives hold {' and '.join(parts)} of them; random clusters {by_chance:.1%}."
    )
    title = "Do a domain's neurons lie in clusters of similar weights?"
    return drawn("clusters", title, says, draw, 1, 2.8)


def pruned(metrics: dict) -> Drawing | None:
    rows = [row for row in metrics.get("pruning", ()) if row]
    if not rows:
        return None
    names = _names(metrics)
    of = [name for name, row in zip(names, metrics["pruning"], strict=True) if row]

    def draw(figure, axes, theme):
        panels = figure.subplots(1, 2, squeeze=False)[0]
        sides = {"accuracy": "its neurons", "accuracy_random": "as many others"}
        for axis, (key, title) in zip(panels, sides.items(), strict=True):
            values = np.array([[np.nan if v is None else v for v in row[key]] for row in rows])
            heat(axis, values, theme, cmap="cividis", vmin=0, vmax=1)
            axis.set(title=title, xticks=range(len(names)), yticks=range(len(of)))
            axis.set_xticklabels(names, rotation=30, ha="right")
            axis.set_yticklabels(of)
        panels[0].set_ylabel("without those of")

    others = [
        value
        for row, name in zip(rows, of, strict=True)
        for other, value in zip(names, row["accuracy"], strict=True)
        if other != name and value is not None
    ]
    shares = ", ".join(f"{row['share']:.1%} ({name})" for row, name in zip(rows, of, strict=True))
    says = (
        f"Neurons left out until a domain's own accuracy is at 0.8 of what it was: {shares}. Other "
        f"domains keep {np.mean(others):.2f} of theirs on average."
    )
    title = "Accuracy that is left without the neurons of a domain"
    return drawn("pruned", title, says, draw, 0, 3.2)


FIGURES = (overlaps, places, clusters, pruned)
