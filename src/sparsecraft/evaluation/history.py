"""What has happened to a model, in words, from the report that its checkpoint keeps.

What is known has a line of its own; whatever else a report says of a conversion, of its certificate
or of a training is printed as it stands, so that nothing in it stays unread.
"""

from __future__ import annotations

from typing import Any

from sparsecraft.evaluation.split_report import fit_line
from sparsecraft.recipe.recipe import Recipe

# What the lines below say, or say by what they lead to.
SAID = {
    "conversion": "recipe variant exact_at_start certificate layers cost domains sources children",
    "certificate": "max_difference scale exact tolerance dtype",
    "training": "stage steps loss settings counts log fit moved",
    "merge": "how recipe result folded joined kept certificate change cost activation",
}

# Entries of a list or a dict that are shown.
SHOWN = 8


def history_lines(recipe: Recipe, report: dict[str, Any]) -> list[str]:
    """How the model started, what it was trained on, what was added, removed and merged."""
    conversion = report.get("conversion", {})
    certificate = conversion.get("certificate")
    claim = "exact" if recipe.exact_at_start else "not exact"
    measured = f"{certificate['max_difference']:.1e}" if certificate else "not measured"
    lines = [*_source_lines(conversion), *_domain_lines(recipe, conversion)]
    lines += [f"At the start: claimed {claim}, measured max |logit difference| {measured}."]
    lines += _unsaid("certificate", certificate or {})
    lines += _unsaid("conversion", conversion)
    runs, changes = report.get("training", []), report.get("extensions", [])
    for number in range(len(runs) + 1):  # in the order in which it happened
        lines += [_extension_line(entry) for entry in changes if entry["trainings"] == number]
        lines += [line for run in runs[number : number + 1] for line in _training_lines(run)]
    if merged := report.get("merge"):
        lines += [f"Merged ({merged['how']}) from {merged['recipe']}.", *_unsaid("merge", merged)]
    return lines if report.get("training") else [*lines, "Not trained yet."]


def moved_lines(moved: dict[str, Any]) -> list[str]:
    """What a stage has moved, in words; a line for each tensor or pattern that did not move."""
    first = f"{moved['moved']} of {moved['should']} tensors that should train have moved."
    return [first, *(f"  not moved: {n}: {reason}" for n, reason in moved["unmoved"].items())]


def _training_lines(run: dict[str, Any]) -> list[str]:
    first = fit_line(run) if "fit" in run else _training_line(run)
    moved = moved_lines(run["moved"]) if "moved" in run else []
    counts = [f"  rows: {words(run['counts'])}"] if run.get("counts") else []
    return [first, *counts, *(f"  {line}" for line in moved), *_unsaid("training", run)]


def _training_line(run: dict[str, Any]) -> str:
    last = [entry for entry in run["log"] if "loss" in entry][-1]
    routing = "".join(
        f", {key.replace('_', ' ')} {last[key]:.3f}"
        for key in ("load_entropy", "router_entropy")
        if key in last
    )
    return (
        f"Trained ({run['stage']}): {run['steps']} steps, mean loss {run['loss']:.3f}, "
        f"last logged {last['loss']:.3f}{routing}."
    )


def _extension_line(entry: dict[str, Any]) -> str:
    if "removed" in entry:
        return f"Expert {entry['removed']} was removed; those behind it moved up."
    return (
        f"Extended by {entry['expert']}: expert {entry['number']}, its routers' rows "
        f"{entry['rows']}, {entry['mixed']:.3f} of all other tensors."
        + (f" Of its tensors {words(entry['arrived'])}." if entry.get("arrived") else "")
    )


def _source_lines(conversion: dict[str, Any]) -> list[str]:
    names = conversion.get("sources") or ()
    return [f"The experts came from: {'; '.join(names)}."] if names else []


def _domain_lines(recipe: Recipe, conversion: dict[str, Any]) -> list[str]:
    """What the routers started from, where their recipe can start from data."""
    if names := conversion.get("domains"):
        return [f"The routers started from, one for each expert: {'; '.join(names)}."]
    if any(e.router and e.router.of_domains for e in recipe.edits):
        return ["The routers started from random embeddings; no domains were given."]
    return []


def _unsaid(kind: str, entry: dict[str, Any]) -> list[str]:
    """A line for each field that no other line says, and that says something."""
    known = SAID[kind].split()
    return [
        f"  {key.replace('_', ' ')}: {words(value)}"
        for key, value in entry.items()
        if key not in known and value not in (None, [], {}, (), "", 0)
    ]


def words(value: Any) -> str:
    """JSON data in a line that can be read."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        parts = [f"{key.replace('_', ' ')} {words(inner)}" for key, inner in value.items()]
        return _listed(parts)
    if isinstance(value, (list, tuple)):
        return _listed([words(inner) for inner in value])
    return str(value)


def _listed(parts: list[str]) -> str:
    rest = len(parts) - SHOWN
    return ", ".join(parts[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
