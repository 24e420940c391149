"""A checkpoint in words: what it is, what it costs, how it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from sparsecraft.checkpoint.load import load
from sparsecraft.checkpoint.manifest import read_manifest
from sparsecraft.data.prepare import UNUSED
from sparsecraft.dense.door import guarded
from sparsecraft.errors import CheckpointError
from sparsecraft.evaluation.history import history_lines
from sparsecraft.evaluation.split_report import split_lines
from sparsecraft.moe import cost
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.recipe.words import count_words, routers_words
from sparsecraft.surgery.record import conversion_of


def describe(folder: str | Path, base: str | None = None) -> list[str]:
    """Lines about a checkpoint: recipe, base, parameters, exactness, training, routing; and what
    it runs of the networks that it has split. `base` is as in `load`."""
    manifest = read_manifest(Path(folder))
    model = load(folder, base)
    record, base = conversion_of(model), manifest["base"]
    recipe, report = record.recipe, record.report
    with guarded(Path(folder) / "report.json", CheckpointError):
        history = history_lines(recipe, report)
    return [
        f"{recipe.name} ({recipe.variant}): {recipe.title}. {recipe.paper}.",
        f"Base: {base['name']}, {base['fingerprint']}" if base else "Base: held in the folder",
        *edit_lines(recipe),
        *split_lines(model),
        *cost_lines(cost.count(model)),
        *left_out_lines(record.left_out),
        *history,
    ]


def edit_lines(recipe: Recipe) -> list[str]:
    """One line for each edit of a recipe."""
    return [
        f"  {count_words(e)} {e.experts.kind} {e.place} "
        + (f"every {e.site}" if e.paths == "*" else f"{e.site} at {e.paths}")
        + "".join(f", router {words}" for words in routers_words([e]))
        + "".join(f"; {numbers}" for numbers in e.by_layer)
        for e in recipe.edits
    ]


def cost_lines(counted: cost.Cost) -> list[str]:
    """One line for each count, with its share of all parameters."""
    lines = []
    for key, value in counted.to_dict().items():
        share = f" ({value / counted.total:.1%})" if key in ("new", "trainable", "active") else ""
        lines.append(f"  {key.replace('_', ' '):<16}{value:>16,}{share}")
    return lines


def left_out_lines(left_out: dict[str, list[str]]) -> list[str]:
    """One line for each reason why the recipe does not reach modules that it asks for."""
    return [f"Left out, {reason}: {', '.join(paths)}" for reason, paths in left_out.items()]


def result_tables(results: dict[str, Any]) -> list[Table]:
    """The tables of what `evaluate` found: losses, choices, lm-eval tasks."""
    tables = []
    for kind in ("loss", "choice", "tasks"):
        rows = results.get(kind, {})
        found = dict.fromkeys(key for row in rows.values() for key in row)
        keys = [key for key in found if key != UNUSED]  # a warning has named them
        table = Table(kind, *keys, box=None, header_style="bold", pad_edge=False)
        for name, row in rows.items():
            values = (row.get(key, "") for key in keys)
            table.add_row(name, *(f"{v:.4f}" if isinstance(v, float) else str(v) for v in values))
        tables += [table] if rows else []
    return tables
