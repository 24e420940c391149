"""What a plan leaves out: modules of the nature that its edits ask for, with the reason of each."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence

from torch import nn

from sparsecraft.dense.forms import join
from sparsecraft.dense.linears import EXPERTS, Placed
from sparsecraft.dense.mixtures import inside, mixtures
from sparsecraft.dense.sites import Site, placed_linears
from sparsecraft.moe.names import other_names
from sparsecraft.recipe.edits import Edit
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.surgery.plan import PlannedEdit

OUTSIDE = "Linears outside of the transformer blocks"
NO_FORM = {
    "ffn": "feed-forward networks of no known form",
    "attention": "attentions of no known form",
}
OTHER = "parts of a block that are neither attention nor feed-forward network"

UNTIED = "the sharing of weights between modules, whose experts have copies of their own"

# Site -> what every module of it is a part of.
NATURES = {
    "attention": "attention",
    "attention_linear": "attention",
    "query": "attention",
    "key": "attention",
    "value": "attention",
    "output": "attention",
    "ffn": "ffn",
    "ffn_linear": "ffn",
    "gate": "ffn",
    "down": "ffn",
    "intermediate": "ffn",
    "activation": "ffn",
    "linear": "linear",
}


def left_out(
    model: nn.Module, recipe: Recipe, edits: Sequence[PlannedEdit]
) -> dict[str, list[str]]:
    """Reason -> paths of what `edits`, the plan of `recipe` for this dense model, do not reach.

    Paths that differ in their numbers alone stand together, as `model.layers.*.mlp.experts (24)`.
    What an edit's own `paths` exclude is the user's choice and not listed; nor are embeddings,
    heads and what else no site means.
    """
    linears, found = placed_linears(model), {}
    experts = [mixture.path for mixture in mixtures(model)]
    for edit in recipe.edits:
        reached = [path for item in edits if item.source == edit for path in _reached(item.site)]
        for reason, path in _missed(edit, reached, linears, experts):
            if fnmatch.fnmatch(path, edit.paths):
                found.setdefault(reason, {})[path] = None
    if untied := _untied(model, edits):
        found[UNTIED] = dict.fromkeys(untied)
    return {reason: grouped(list(paths)) for reason, paths in found.items()}


def _untied(model: nn.Module, edits: Sequence[PlannedEdit]) -> list[str]:
    """Paths of the modules that experts replace and that share a parameter with another one."""
    aliases = other_names(model)
    shared = {*aliases, *aliases.values()}
    sites = [item.site for item in edits if item.edit.replaces]
    return [s.path for s in sites if any(inside(name, s.members) for name in shared)]


def _reached(site: Site) -> list[str]:
    """Paths of what a site covers, of a part of a network or of an attention the whole."""
    if site.form is None:
        return [*site.members, *filter(None, [site.owner])]
    linears = filter(None, (site.form.gate, site.form.up, site.form.down))
    return [*site.members, *(join(site.owner, part) for part in linears)]


def _missed(
    edit: Edit, reached: list[str], linears: Sequence[Placed], experts: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Reason and path of each module that one edit does not reach."""
    wanted, at_linears = NATURES[edit.site], "linear" in edit.site
    if wanted != "attention":
        yield from ((EXPERTS, path) for path in experts if not inside(path, reached))
    bodies = {at.part.partition(".")[0] for at in linears if at.nature != "outside"}
    for at in linears:
        if inside(at.path, reached) or inside(at.path, experts):
            continue
        if at.nature == "outside":
            if wanted == "linear" and at.path.partition(".")[0] in bodies:  # else it is a head
                yield OUTSIDE, at.path
        elif at.nature == wanted or wanted == "linear":
            yield (at.why_not, at.path) if at_linears else (NO_FORM[wanted], at.part)
        elif at.nature == "other" and at.why_not is None:
            yield OTHER, at.part


def grouped(paths: Sequence[str]) -> list[str]:
    """Paths in their order, those that differ in their numbers alone as one with their count."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(re.sub(r"\b\d+\b", "*", path), []).append(path)
    return [
        found[0] if len(found) == 1 else f"{pattern} ({len(found)})"
        for pattern, found in groups.items()
    ]
