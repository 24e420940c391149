"""override(): a recipe with some fields changed, by dotted paths."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from sparsecraft.errors import RecipeError, did_you_mean
from sparsecraft.recipe.by_layer import leaves
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.recipe.typed import (
    hints_of,
    kind_in,
    kinds_of,
    options_of,
    parse,
    read,
    shown,
    specs_of,
)

# Short words that paths may have for longer ones.
WORDS = {
    "top_k": ("select", "k"),
    "soft_first": ("select", "first_soft"),
    "init": ("scorer", "start"),
    "init_std": ("scorer", "std"),
    "init_repeat": ("scorer", "repeat"),
    "sentence_dim": ("dim",),
    "base_quantization": ("backbone",),
    "buckets": ("deal",),
    "fit": (),
}


def override(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """A copy of `recipe` with some fields changed.

    Args:
        changes: dotted path -> value. A path is the whole way (`edits.0.router.temperature`), its
            end, or words that occur on it in their order and end as it does (`router.k`, of
            `edits.0.router.select.k`), if they are those of one way only; see also `WORDS`. Text is
            parsed by the field's type. A number of an edit may be a list, one for each layer (as
            text `4,4,8,8`). Options with a kind are given by its word, which keeps those of their
            fields that the new kind has too, or whole, as JSON.

    Raises:
        RecipeError: no field, or more than one, has that path; or the value does not fit.
    """
    if not isinstance(changes, dict):
        raise RecipeError(f"The changes are {shown(changes)}; give a dict of paths and values.")
    for path in changes:
        if not isinstance(path, str):
            raise RecipeError(f"{shown(path)} is no path to a field; give text such as 'top_k'.")
    data, left = _listed(dataclasses.asdict(recipe)), dict(changes)
    while left:
        fields = _fields(Recipe, data)
        found = {path: _matches(fields, path) for path in left}
        # Dataclasses first, from the outside in: they decide which fields there are.
        whole = [p for p, ways in found.items() if len(ways) == 1 and specs_of(fields[ways[0]])]
        path = min(whole, key=lambda p: found[p][0].count("."), default=next(iter(left)))
        way, value = _only(recipe, fields, path, found[path]), left.pop(path)
        hint = fields[way]
        value = _parsed(hint, value)
        value = _by_layer(data, way, hint, value)
        _put(data, way, _whole(hint, value, _at(data, way)) if specs_of(hint) else value)
        _keep_numbers(data, way)
    # Checked once, when all changes are made: some values can only change together.
    return read(Recipe, data, "recipe")


def _parsed(hint: Any, value: Any) -> Any:
    """Text by the field's type; where that is a number, numbers between commas are several."""
    if not isinstance(value, str):
        return value
    found = parse(hint, value)
    if isinstance(found, str) and "," in found and _is_number(hint):
        return [parse(hint, part) for part in found.strip("[]").split(",")]
    return found


def _is_number(hint: Any) -> bool:
    options = options_of(hint)
    return not {int, float}.isdisjoint(options) and not any(map(typing.get_origin, options))


def _by_layer(data: dict[str, Any], way: str, hint: Any, value: Any) -> Any:
    """The value to put there: of numbers for each layer of an edit, which go to its `by_layer`, the
    first. What that said before of the field goes away."""
    edit, field = _edit_of(data, way)
    if edit is None or not _is_number(hint):
        return value
    edit["by_layer"] = [by for by in edit["by_layer"] if by["field"] != field]
    if not (isinstance(value, (list, tuple)) and value):
        return value
    edit["by_layer"].append({"field": field, "numbers": list(value)})
    return value[0]


def _keep_numbers(data: dict[str, Any], way: str) -> None:
    """Let numbers by layer below an option that was replaced stay where the new one has them."""
    edit, _ = _edit_of(data, way)
    if edit is not None:
        known = leaves(edit)
        edit["by_layer"] = [by for by in edit["by_layer"] if by["field"] in known]


def _edit_of(data: dict[str, Any], way: str) -> tuple[dict[str, Any] | None, str]:
    """The edit that a path leads into, and the rest of the path; None where it leads elsewhere."""
    head, number, field = [*way.split(".", 2), "", ""][:3]
    if head != "edits" or not field or field.startswith("by_layer"):
        return None, ""
    return data["edits"][int(number)], field


def _listed(value: Any) -> Any:
    """Plain data whose tuples are lists, so that their items can be changed."""
    if isinstance(value, dict):
        return {key: _listed(child) for key, child in value.items()}
    return [_listed(child) for child in value] if isinstance(value, tuple) else value


def _whole(hint: Any, value: Any, before: Any) -> Any:
    """All fields of a dataclass, as plain data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _listed(dataclasses.asdict(value))
    if not isinstance(value, dict):
        return value  # refused at the end, by its path
    kinds = kinds_of(hint)
    spec = kind_in(value, kinds) if kinds else specs_of(hint)[0]
    if spec is None:
        return value
    whole: dict[str, Any] = {}
    for f in dataclasses.fields(spec):
        if f.default_factory is not dataclasses.MISSING:
            whole[f.name] = f.default_factory()
        elif f.default is not dataclasses.MISSING:
            nested = dataclasses.is_dataclass(f.default)
            whole[f.name] = _listed(dataclasses.asdict(f.default) if nested else f.default)
    if set(value) == {"kind"} and isinstance(before, dict):
        kept = {name: hint for name, hint in hints_of(spec).items() if name in before}
        whole |= {name: before[name] for name, hint in kept.items() if _fits(hint, before[name])}
    return whole | value


def _fits(hint: Any, value: Any) -> bool:
    try:
        read(hint, value, "")
    except RecipeError:
        return False
    return True


def _only(recipe: Recipe, fields: dict[str, Any], path: str, found: list[str]) -> str:
    """The one field that `path` means.

    Raises:
        RecipeError: none, or several.
    """
    if not found:
        last = path.rpartition(".")[2]
        near = [field for field in fields if field.rpartition(".")[2] == last]
        names = {field.rpartition(".")[2] for field in fields}
        names |= {word for word in WORDS if _matches(fields, word)}
        names = {name for name in names if not name.isdigit()}
        raise RecipeError(
            f"Recipe {recipe.name!r} has no field {path!r}."
            + (f" Did you mean {' or '.join(near)}?" if near else did_you_mean(last, names))
        )
    if len(found) > 1:
        raise RecipeError(f"{path!r} is ambiguous: say one of {', '.join(found)}.")
    return found[0]


def _matches(fields: dict[str, Any], path: str) -> list[str]:
    if path in fields:
        return [path]
    words = path.split(".")
    longer = [word for short in words for word in WORDS.get(short, (short,))]
    ways = [words] if longer == words else [words, longer]
    for fits in (_ends, _in_order):
        found = [field for field in fields if any(fits(field.split("."), way) for way in ways)]
        if found:
            return found
    return []


def _ends(field: list[str], words: list[str]) -> bool:
    return field[-len(words) :] == words


def _in_order(field: list[str], words: list[str]) -> bool:
    rest = iter(field)
    return field[-1:] == words[-1:] and all(word in rest for word in words)


def _put(data: Any, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    node = _at(data, ".".join(parents)) if parents else data
    node[int(last) if isinstance(node, list) else last] = value


def _at(data: Any, path: str) -> Any:
    for key in path.split("."):
        data = data[int(key)] if isinstance(data, list) else data[key]
    return data


def _fields(hint: Any, value: Any) -> dict[str, Any]:
    """Dotted path -> type of every field below plain `value` that can be changed."""
    fields: dict[str, Any] = {}
    for key, child_hint, child in _children(hint, value):
        below = _fields(child_hint, child)
        fields |= {f"{key}.{k}": h for k, h in below.items()}
        several = isinstance(child, list) and below
        if key != "kind" and not several:
            fields[key] = child_hint
    return fields


def _children(hint: Any, value: Any) -> list[tuple[str, Any, Any]]:
    specs = specs_of(hint)
    if specs and isinstance(value, dict):
        spec = kind_in(value, kinds_of(hint)) or specs[0]
        return [(n, h, value[n]) for n, h in hints_of(spec).items() if n in value]
    if isinstance(value, dict) and value:
        return [(key, typing.get_args(hint)[1], child) for key, child in value.items()]
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        item = typing.get_args(hint)[0]
        return [(str(i), item, child) for i, child in enumerate(value)]
    return []
