"""What has happened to a model, in words, from the report that its checkpoint keeps.

What is known has a line of its own; whatever else a report says of a conversion, of its certificate
or of a training is printed as it stands, so that no field in it stays unread; long lists are cut.
"""

from __future__ import annotations

from typing import Any

from sparsecraft.checkpoint.integrity import REPORT, edited_files
from sparsecraft.evaluation.split_report import fit_line
from sparsecraft.recipe.recipe import Recipe

# What the lines below say, or say by what they lead to.
SAID = {
    "conversion": "recipe variant exact_at_start certificate layers cost domains sources children "
    "arrived",
    "certificate": "max_difference scale exact tolerance dtype probes layers ran unreached power "
    "claimed",
    "training": "stage steps loss settings counts log fit moved",
    "merge": "how recipe result folded joined kept certificate change cost activation arrived",
}

# The start of the names of files that a certificate is of.
MEASURED = ("recipe.json", "config.json", "moe")

# Entries of a list that are shown.
SHOWN = 8


def history_lines(recipe: Recipe, report: dict[str, Any]) -> list[str]:
    """How the model started, what it was trained on, what was added, removed and merged."""
    edited = _edited_lines(report)
    if REPORT in edited_files(report):  # it may say anything
        return [*edited, start_line(recipe, report)]
    conversion = report.get("conversion", {})
    certificate = conversion.get("certificate")
    lines = [*edited, *_source_lines(conversion), *_domain_lines(recipe, conversion)]
    lines += [start_line(recipe, report)]
    if found := _unsaid("certificate", certificate or {}):
        lines += [f"  certificate: {', '.join(line.strip() for line in found)}"]
    lines += _unsaid("conversion", conversion)
    runs, changes = report.get("training", []), report.get("extensions", [])
    elsewhere = report.get("elsewhere", {})
    for number in range(len(runs) + 1):  # in the order in which it happened
        for entry in (entry for entry in changes if entry["trainings"] == number):
            lines += [_extension_line(entry)]
            lines += arrived_lines({entry.get("expert"): entry.get("arrived", {})})
        lines += _elsewhere_lines(elsewhere) if elsewhere.get("trainings") == number else []
        lines += [line for run in runs[number : number + 1] for line in _training_lines(run)]
    if merged := report.get("merge"):
        lines += [f"Merged ({merged['how']}) from {merged['recipe']}.", *_unsaid("merge", merged)]
        lines += arrived_lines({"what the experts change": merged.get("arrived", {})})
    return lines if runs or elsewhere else [*lines, "Not trained yet."]


def start_line(recipe: Recipe, report: dict[str, Any]) -> str:
    """What the recipe claims of a model's start, in how many layers it was measured, and how."""
    if REPORT in edited_files(report):
        claim = "exact" if recipe.exact_at_start else "not exact"
        return f"At the start: claimed {claim}, and what was measured is not known."
    certificate = report.get("conversion", {}).get("certificate")
    claimed = (certificate or {}).get("claimed", recipe.exact_at_start)
    claim = "exact" if claimed else "not exact"
    since = [name for name in edited_files(report) if name.startswith(MEASURED)]
    before = f" before {', '.join(since)} was edited" if since and certificate else ""
    return f"At the start: claimed {claim}, {_measured(certificate)}{before}."


def _edited_lines(report: dict[str, Any]) -> list[str]:
    """What was edited by hand, whatever the report says besides."""
    if not (names := edited_files(report)):
        return []
    unseen = f" What {REPORT} says is not shown: it may not have been measured."
    return [
        f"Edited by hand after it was written, and accepted: {', '.join(names)}."
        + (unseen if REPORT in names else "")
    ]


def _measured(certificate: dict[str, Any] | None) -> str:
    """What a certificate says, of any version."""
    if not certificate:
        return "not measured"
    found, layers = f"{certificate['max_difference']:.1e}", certificate.get("layers")
    if not layers:
        return f"measured max |logit difference| {found}"
    words = f"measured max |layer output difference| {found}"
    if "ran" not in certificate:
        return f"{words} in {layers} layers"
    words += f" in {certificate['ran']} of {layers} layers"
    if unreached := certificate["unreached"]:
        words += f" (did not run: {_listed(list(unreached))})"
    power = certificate["power"]
    return words if power is None else f"{words}, an error of {power:.0e} would be seen"


def moved_lines(moved: dict[str, Any]) -> list[str]:
    """What a stage has moved, in words; a line for each tensor or pattern that did not move."""
    first = f"{moved['moved']} of {moved['should']} tensors that should train have moved."
    return [first, *(f"  not moved: {n}: {reason}" for n, reason in moved["unmoved"].items())]


def _elsewhere_lines(elsewhere: dict[str, Any]) -> list[str]:
    return [
        f"Not by sc.train: {elsewhere['moved']} of {elsewhere['parameters']} parameters have moved "
        f"since {elsewhere['since']}, in a loop or trainer of the user's own or by an edit."
    ]


def arrived_lines(arrived: dict[str, dict[str, Any]]) -> list[str]:
    """What of each source is in the model, in words."""
    return [
        f"  of {name}: {found['used']} of {found['tensors']} tensors were used"
        + (f"; not used: {_patterns(found['unused'])}." if found["unused"] else ".")
        for name, found in arrived.items()
        if found and found["tensors"]
    ]


def _patterns(unused: dict[str, int]) -> str:
    return _listed([f"{pattern} ({count})" for pattern, count in unused.items()])


def unused_lines(counts: dict[str, Any]) -> list[str]:
    """A line for each file whose rows hold fields that nothing used."""
    files = counts.get("unused_fields", {})
    return [
        f"{file}: fields that were not used, and in how many rows: "
        + ", ".join(f"{name} ({rows})" for name, rows in fields.items())
        for file, fields in files.items()
    ]


def _training_lines(run: dict[str, Any]) -> list[str]:
    first = fit_line(run) if "fit" in run else _training_line(run)
    moved = moved_lines(run["moved"]) if "moved" in run else []
    counts = {k: v for k, v in (run.get("counts") or {}).items() if k != "unused_fields"}
    rows = [f"rows: {words(counts)}"] if counts else []
    rows += unused_lines(run.get("counts") or {})
    said = [f"  {line}" for line in (*rows, *moved)]
    return [first, *said, *_unsaid("training", run)]


def _training_line(run: dict[str, Any]) -> str:
    last = [entry for entry in run["log"] if "loss" in entry][-1]
    routing = "".join(
        f", {key.replace('_', ' ')} {last[key]:.3f}"
        for key in ("load_entropy", "router_entropy", "computing_experts", "dropped")
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
        f"Extended by {entry['expert']}: expert {words(entry['number'])}, its routers' rows "
        f"{entry['rows']}, {entry['mixed']:.3f} of all other tensors."
    )


def _source_lines(conversion: dict[str, Any]) -> list[str]:
    names = conversion.get("sources") or ()
    first = [f"The experts came from: {'; '.join(names)}."] if names else []
    return [*first, *arrived_lines(conversion.get("arrived", {}))]


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
        f"  {_spaced(key)}: {words(value)}"
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
        return ", ".join(f"{_spaced(key)} {words(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return _listed([words(inner) for inner in value])
    return str(value)


def _spaced(key: str) -> str:
    """A field's name as words; paths and files stay as they are."""
    return key if "." in key or "/" in key else key.replace("_", " ")


def _listed(parts: list[str]) -> str:
    rest = len(parts) - SHOWN
    return ", ".join(parts[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
