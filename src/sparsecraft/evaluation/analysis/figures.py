"""The figures of a report. L layers, E experts, D domains."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

from sparsecraft.evaluation.analysis.kinds import KINDS
from sparsecraft.evaluation.budget.plots import COLORS, DASHED, MARKERS
from sparsecraft.evaluation.pages.drawing import (
    Drawing,
    Theme,
    drawn,
    heat,
    legend,
    lines,
    mark,
    whole,
)
from sparsecraft.evaluation.pages.writing import short

SHOWN = 3  # layers, where not all can be: the first, the middle one, the last


def drawings(metrics: dict[str, Any]) -> list[Drawing]:
    """The figures for which there is something to show."""
    return [found for draw in FIGURES if (found := draw(metrics)) is not None]


def _layers(metrics: dict, key: str | None = None) -> dict[str, dict]:
    """Name -> measures of the layers that have one."""
    layers = metrics["layers"].items()
    return {name: layer for name, layer in layers if key is None or layer.get(key) is not None}


def _few(layers: dict[str, dict]) -> list[str]:
    """The names of the first, the middle and the last layer."""
    names = list(layers)
    at = {0, (len(names) - 1) // 2, len(names) - 1}
    return [names[i] for i in sorted(at)][:SHOWN]


# ------------------------------------------------------------------ loads
def load(metrics: dict) -> Drawing | None:
    layers = _layers(metrics)
    most = max(layer["experts"] for layer in layers.values())
    values = np.full((len(layers), most), np.nan)
    for row, layer in enumerate(layers.values()):
        values[row, : layer["experts"]] = np.array(layer["load"]) * layer["experts"]
    worst = max(2.0, min(8.0, np.nanmax(values)))

    def draw(figure, axes, theme):
        from matplotlib.colors import TwoSlopeNorm

        norm = TwoSlopeNorm(1, 0, worst)
        heat(axes[0], values, theme, cmap="BrBG", norm=norm, label="load over an equal share")
        axes[0].set(xlabel="expert", ylabel="layer", yticks=range(len(layers)))
        axes[0].set_yticklabels([short(name) for name in layers], fontsize=6)
        whole(axes[0].xaxis)

    dead = sum(len(layer["dead"]) for layer in layers.values())
    over = sum(len(layer["overloaded"]) for layer in layers.values())
    says = (
        f"Loads run from {np.nanmin(values):.2f} to {np.nanmax(values):.2f} of an equal share; "
        f"{dead} experts get less than 0.01 of it, {over} more than 3 times as much."
    )
    height = min(12.0, 1.2 + 0.24 * len(layers))
    return drawn("load", "Load of each expert, equal share = 1", says, draw, 1, height)


def choices(metrics: dict) -> Drawing | None:
    layers, domains = _layers(metrics, "first_by_domain"), metrics["domains"]
    if not layers or len(domains) > len(COLORS):
        return None
    names = _few(layers)

    def draw(figure, axes, theme):
        for axis, name in zip(axes, names, strict=True):
            _bars(axis, layers[name], [Path(domain).stem for domain in domains], theme)
            axis.set_title(short(name))
        legend(axes[0])

    worst = max(
        max(row) * layers[name]["experts"]
        for name in names
        for row in layers[name]["first_by_domain"]
    )
    says = (
        "Bars: the expert of largest weight; marks: the second. The most that one expert gets of "
        f"a domain in these layers is {worst:.1f} times an equal share."
    )
    return drawn(
        "choices",
        "First and second choices by domain",
        says,
        draw,
        len(names),
        2.3 * len(names) + 0.2,
    )


def _bars(axis: Any, layer: dict, domains: list[str], theme: Theme) -> None:
    """One layer's choices: bars of first ones, marks of second ones."""
    E, wide = layer["experts"], 0.8 / len(domains)
    edge = {"markeredgecolor": theme.text, "markeredgewidth": 0.5, "markersize": 3.5}
    for d, domain in enumerate(domains):
        at = np.arange(E) + (d - (len(domains) - 1) / 2) * wide
        first, second = layer["first_by_domain"][d], layer["second_by_domain"][d]
        axis.bar(at, first, wide, color=COLORS[d], label=f"{domain}, first")
        axis.plot(at, second, MARKERS[d], color=COLORS[d], label=f"{domain}, second", **edge)
    dashed = {"linewidth": 0.8, "linestyle": DASHED}
    axis.axhline(1 / E, color=theme.text, label="equal share", **dashed)
    axis.set(xlabel="expert", ylabel="share of tokens", xticks=range(E) if E <= 32 else [])
    lines(axis, theme)


# ------------------------------------------------------------------ knowledge of domains
def knowledge(metrics: dict) -> Drawing | None:
    layers = _layers(metrics, "domain_information")
    if not layers:
        return None
    known = [layer["domain_information"] for layer in layers.values()]
    twins = [layer.get("domain_information_of_twin") for layer in layers.values()]
    at = range(len(layers))

    def draw(figure, axes, theme):
        axis = axes[0]
        axis.plot(at, [k["bits"] for k in known], "o-", color=COLORS[0], label="this model")
        if None not in twins:
            axis.plot(at, twins, "s--", color=COLORS[1], label="twin with random routers")
        axis.fill_between(at, 0, [k["chance_95"] for k in known], color="#999999", alpha=0.35,
                          label="chance, up to 95 %", linewidth=0)  # fmt: skip
        axis.set(xlabel="layer, from the input", ylabel="I(first expert; domain), bits", ylim=0)
        whole(axis.xaxis)
        lines(axis, theme)
        legend(axis)

    beyond = sum(k["p"] <= 0.05 for k in known)
    best, most = max(known, key=lambda k: k["bits"]), math.log2(len(metrics["domains"]))
    says = (
        f"{beyond} of {len(known)} layers know more of the domain than 95 % of draws of whole "
        f"documents; the most is {best['bits']:.3f} of {most:.2f} bits "
        f"(chance {best['chance']:.3f})"
    )
    if None not in twins:
        above = sum(k["bits"] > twin for k, twin in zip(known, twins, strict=True))
        says += (
            f"; {above} know more than their twins with random routers, the best of which knows "
            f"{max(twins):.3f} bits"
        )
    title = "What a token's first expert tells of its domain"
    return drawn("knowledge", title, says + ".", draw, 1, 2.8)


def decisiveness(metrics: dict) -> Drawing | None:
    layers = _layers(metrics, "entropy")
    if not layers:
        return None
    rows, at = [layer["entropy"] for layer in layers.values()], range(len(layers))

    def draw(figure, axes, theme):
        axis = axes[0]
        axis.plot(at, [row["H_u"] for row in rows], "s-", color=COLORS[2], label="H_u: of the mean")
        axis.plot(
            at, [row["H_s"] for row in rows], "o-", color=COLORS[0], label="H_s: mean of a token's"
        )
        axis.plot(at, [row["most"] for row in rows], color=theme.text, linewidth=0.8,
                  linestyle=DASHED, label="log2 E, the most")  # fmt: skip
        axis.set(xlabel="layer, from the input", ylabel="entropy of experts, bits")
        axis.set_ylim(0, 1.08 * max(row["most"] for row in rows))
        whole(axis.xaxis)
        lines(axis, theme)
        legend(axis)

    mean = {key: np.mean([row[key] for row in rows]) for key in ("H_s", "H_u", "most")}
    says = (
        f"On average H_s is {mean['H_s']:.2f} and H_u {mean['H_u']:.2f} of {mean['most']:.2f} "
        "bits: low H_s is a router that is sure of a token, high H_u one that uses all experts."
    )
    return drawn("decisiveness", "How sure and how even the routers are", says, draw, 1, 2.6)


def dropped(metrics: dict) -> Drawing | None:
    rows, domains = metrics["dropped"], metrics["domains"]
    if not rows:
        return None
    values = np.array([[cell["change"] for cell in row] for row in rows])
    errors = np.array([[cell["error"] for cell in row] for row in rows])
    worst = max(np.abs(values).max(), 1e-6)

    def draw(figure, axes, theme):
        heat(
            axes[0],
            values,
            theme,
            "{:+.3f}".format,
            cmap="BrBG_r",
            vmin=-worst,
            vmax=worst,
            label="nats per label",
        )
        axes[0].set(xticks=range(len(domains)), yticks=range(len(rows)), ylabel="expert left out")
        axes[0].set_xticklabels([Path(domain).stem for domain in domains])

    sure = int((np.abs(values) > 2 * errors).sum())
    e, d = np.unravel_index(values.argmax(), values.shape)
    says = (
        f"{sure} of {values.size} changes are beyond two standard errors (over documents); the "
        f"largest is {values[e, d]:+.3f} ± {errors[e, d]:.3f} nats, of expert {e} on "
        f"{Path(domains[d]).stem}."
    )
    title = "What the loss gains where an expert gives nothing in any layer"
    return drawn("dropped", title, says, draw, 1, 1.2 + 0.28 * len(rows))


# ------------------------------------------------------------------ experts of one another
def after(metrics: dict) -> Drawing | None:
    rows = metrics["following"]
    if not rows:
        return None

    def draw(figure, axes, theme):
        axis, at = axes[0], np.arange(len(rows))
        axis.plot(at, [row["bits"] for row in rows], "o-", color=COLORS[0], label="this model")
        axis.plot(at, [row["chance"] for row in rows], color=theme.text, linewidth=0.9,
                  linestyle=DASHED, label="chance")  # fmt: skip
        axis.set(
            xlabel="layer and the next, from the input", ylabel="I(first; first), bits", ylim=0
        )
        whole(axis.xaxis)
        lines(axis, theme)
        legend(axis)

    bits, chance = (np.mean([row[key] for row in rows]) for key in ("bits", "chance"))
    says = f"On average {bits:.3f} bits, beside {chance:.4f} by chance."
    title = "What the first expert of a layer tells of that of the next"
    return drawn("after", title, says, draw, 1, 2.4)


def similarity(metrics: dict) -> Drawing | None:
    layers = _layers(metrics, "similarity")
    if not layers or max(layer["experts"] for layer in layers.values()) < 2:
        return None
    names = _few(layers)
    off = []
    for layer in layers.values():
        like = np.array(layer["similarity"])
        off.append(like[~np.eye(len(like), dtype=bool)].mean())

    def draw(figure, axes, theme):
        panels = figure.subplots(1, len(names), squeeze=False)[0]
        for axis, name in zip(panels, names, strict=True):
            image = axis.imshow(layers[name]["similarity"], cmap="cividis", vmin=0, vmax=1)
            axis.set(title=short(name), xlabel="expert")
            whole(axis.xaxis, axis.yaxis)
        panels[0].set_ylabel("expert")
        mark(figure.colorbar(image, ax=list(panels), pad=0.01, shrink=0.8), theme, "cosine")

    says = (
        f"The mean cosine of two experts of a layer runs from {min(off):.3f} to {max(off):.3f} "
        "over the layers: 1 is copies, 0 is nothing in common."
    )
    return drawn("similarity", "How alike experts are in their weights", says, draw, 0, 2.7)


def sizes(metrics: dict) -> Drawing | None:
    layers = _layers(metrics, "experts_per_token")
    if not layers:
        return None
    most = max(len(layer["experts_per_token"]) for layer in layers.values())
    total = np.zeros(most)
    for layer in layers.values():
        total[: len(layer["experts_per_token"])] += layer["experts_per_token"]
    if (total > 0).sum() < 2:
        return None
    share, numbers = total / total.sum(), np.arange(most)

    def draw(figure, axes, theme):
        axes[0].bar(numbers, share, color=COLORS[0])
        axes[0].set(xlabel="computing experts of a token", ylabel="share of tokens and layers")
        lines(axes[0], theme)

    seen = numbers[total > 0]
    says = f"{(share * numbers).sum():.2f} on average, from {seen.min()} to {seen.max()}."
    return drawn("sizes", "Experts per token", says, draw, 1, 2.3)


def kinds(metrics: dict) -> Drawing | None:
    """By how much each kind of token has more experts than its document, of all layers."""
    layers = metrics["kinds"]
    if not layers:
        return None
    names = [kind for kind in KINDS if any(_kinds(layer, kind) for layer in layers.values())]
    values = np.full((len(layers), len(names)), np.nan)
    for (row, layer), (column, kind) in itertools.product(
        enumerate(layers.values()), enumerate(names)
    ):
        values[row, column] = next((found["more"] for found in _kinds(layer, kind)), np.nan)
    most = max(1e-3, np.nanmax(np.abs(values)))

    def draw(figure, axes, theme):
        heat(axes[0], values, theme, "{:+.2f}".format, cmap="BrBG", vmin=-most, vmax=most)
        axes[0].set(ylabel="layer", xticks=range(len(names)), yticks=range(len(layers)))
        axes[0].set_xticklabels(names)
        axes[0].set_yticklabels([short(name) for name in layers], fontsize=6)

    means = sorted(zip(np.nanmean(values, 0), names, strict=True))
    says = (
        f"Mean over layers: {means[-1][1]} has {means[-1][0]:+.2f} experts beside the mean of its "
        f"documents, {means[0][1]} {means[0][0]:+.2f}."
    )
    title = "Experts per kind of token, beside the mean of its document"
    return drawn("kinds", title, says, draw, 1, min(12.0, 1.2 + 0.24 * len(layers)))


def _kinds(layer: list[dict], kind: str) -> list[dict]:
    return [found for found in layer if found["kind"] == kind]


def union(metrics: dict) -> Drawing | None:
    layers = _layers(metrics, "union")
    layers = {name: layer for name, layer in layers.items() if len(layer["union"]) > 1}
    if not layers:
        return None
    names = _few(layers)

    def draw(figure, axes, theme):
        axis = axes[0]
        for number, name in enumerate(names):
            rows = layers[name]["union"]
            at, color = [row["tokens"] for row in rows], COLORS[number]
            axis.plot(at, [row["experts"] for row in rows], f"{MARKERS[number]}-", color=color,
                      markersize=4, label=short(name))  # fmt: skip
            axis.plot(at, [row["independent"] for row in rows], color=color, linewidth=0.9,
                      linestyle=DASHED, label="independent tokens")  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set(
            xlabel="tokens of a batch that follow each other", ylabel="different experts", ylim=0
        )
        lines(axis, theme)
        legend(axis)

    layer = layers[names[-1]]
    last = layer["union"][-1]
    says = (
        f"In {short(names[-1])}, {last['tokens']} tokens of a text need {last['experts']:.1f} "
        f"experts of {layer['experts']}, and {last['independent']:.1f} if tokens were independent."
    )
    return drawn("union", "Experts that a batch of tokens reads", says, draw, 1, 2.8)


FIGURES = (load, choices, knowledge, decisiveness, dropped, after, similarity, sizes, kinds, union)
