"""The page of this study, from its results."""

from __future__ import annotations

import math
from collections import defaultdict

from benchmarks.lab.queue import read
from benchmarks.lab.tables import insert, markdown
from benchmarks.lab.through_train import section
from benchmarks.nexus.arms import DOMAINS

# Name in the results -> in the tables.
MODELS = {
    ("dense", "seed"): "SmolLM2, the seed",
    ("expert", "general"): "expert of general",
    ("expert", "math"): "expert of math",
    ("expert", "code"): "expert of code",
    ("untrained", "average"): "mean of experts and seed, not trained",
    ("mixture", "average_mix"): "mean of experts and seed, then trained",
    ("mixture", "mix"): "dense, all data of experts and mixture",
    ("mixture", "nexus"): "nexus",
    ("mixture", "linear"): "nexus, variant linear",
    ("mixture", "btx"): "btx, top-2",
    ("mixture", "btx_soft"): "btx, soft",
    ("mixture", "btx_switch"): "btx, Switch",
    ("mixture", "btx_sample"): "btx, Sample Top-1",
    ("mixture", "bam"): "bam, expert KV",
    ("mixture", "bam_shared"): "bam, shared KV",
    ("mixture", "upcycling"): "upcycling of the seed, top-2",
    ("mixture", "drop_upcycling"): "drop_upcycling of the seed, top-2",
    ("mixture", "upit"): "upit, 4 checkpoints mixed to 6 experts",
    ("mixture", "upit_4"): "upit, the 4 checkpoints",
    ("mixture", "upit_4_random"): "the same without the stage `router`",
}
WAYS = {
    "nexus": "nexus: row projected",
    "linear_reset": "linear: all rows anew",
    "linear_calibrated": "linear: row calibrated",
    "linear_calibrated_at_1": "linear: row calibrated to probability 1",
    "btx_reset": "btx: all rows anew",
    "btx_calibrated": "btx: row calibrated",
}
Rows = dict[tuple, list[dict]]


def write(args) -> None:
    """Put the tables into the page."""
    rows: Rows = defaultdict(list)
    found = read(args.results)
    for row in sorted(found, key=lambda row: row["seed"]):
        rows[row["kind"], row["name"], row.get("budget")].append(row)
    machines = sorted({f"{row['machine']}, torch {row['torch']}" for row in found})
    tables = [
        f"Machine: {'; '.join(machines)}. Two values are two seeds.",
        "### Three domains joined\n\n" + _models(rows),
        "### A domain added\n\n" + _extensions(rows),
        "### Who gets a domain's tokens\n\n" + _routing(rows),
    ]
    insert(args.page, "\n\n".join(tables))
    section(args.page)


def _models(rows: Rows) -> str:
    header = ["model", *DOMAINS, "mean", "mean, not trained", "tokens/s"]
    lines = []
    for (kind, name), label in MODELS.items():
        own, start = rows[kind, name, None], rows["untrained", name, None]
        speeds = [row["training"]["tokens_per_second"] for row in own if row.get("training")]
        lines.append(
            [
                label,
                *(_values([row["loss"][domain] for row in own]) for domain in DOMAINS),
                _values([row["mean"] for row in own]),
                _values([row["mean"] for row in start]) if kind == "mixture" and start else None,
                f"{max(speeds):,}" if speeds else None,
            ]
        )
    return markdown(header, lines)


def _extensions(rows: Rows) -> str:
    header = ["way", "steps", *DOMAINS, "mean", "code, perplexity against rows anew"]
    lines = []
    for way, label in WAYS.items():
        of = "btx_reset" if way.startswith("btx") else "linear_reset"
        for budget in sorted({b for kind, _, b in rows if kind == "extension"}):
            own, base = rows["extension", way, budget], rows["extension", of, budget]
            gains = [
                f"{math.expm1(mine['loss']['code'] - theirs['loss']['code']):+.1%}"
                for mine, theirs in zip(own, base, strict=True)
            ]
            lines.append(
                [
                    label,
                    budget,
                    *(_values([row["loss"][domain] for row in own]) for domain in DOMAINS),
                    _values([row["mean"] for row in own]),
                    None if way == of else " / ".join(gains),
                ]
            )
    return markdown(header, lines)


def _routing(rows: Rows) -> str:
    """Shares of the routing weights, seed 0."""
    header = ["model", "tokens of", *(f"expert of {domain}" for domain in DOMAINS)]
    lines = []
    models = {
        "nexus": ("mixture", "nexus", None),
        "nexus, variant linear": ("mixture", "linear", None),
        "btx, top-2": ("mixture", "btx", None),
        **{
            f"{WAYS[way]}, {steps} steps": ("extension", way, steps)
            for way in ("nexus", "linear_calibrated", "btx_calibrated")
            for steps in (0, 100)
        },
    }
    for label, key in models.items():
        for domain in DOMAINS:
            shares = rows[key][0]["routing"][domain]
            lines.append([label, domain, *(f"{share:.1%}" for share in shares)])
    return markdown(header, lines)


def _values(values: list[float]) -> str:
    """The values of the seeds; one where they do not differ."""
    shown = [f"{value:.3f}" for value in values]
    return " / ".join(dict.fromkeys(shown))
