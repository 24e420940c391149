"""override(): a recipe with some fields changed, by dotted paths."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from sparsecraft.errors import RecipeError, did_you_mean
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.recipe.typed import hints_of, kinds_of, options_of, parse, read

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
            parsed by the field's type. Options with a kind are given by its word, which keeps
            those of their fields that the new kind has too, or whole, as JSON.

    Raises:
        RecipeError: no field, or more than one, has that path; or the value does not fit.
    """
    data, left = dataclasses.asdict(recipe), dict(changes)
    while left:
        fields = _fields(Recipe, data)
        found = {path: _matches(fields, path) for path in left}
        # Kinds first, from the outside in: they decide which fields there are.
        kinds = [p for p, ways in found.items() if len(ways) == 1 and kinds_of(fields[ways[0]])]
        path = min(kinds, key=lambda p: found[p][0].count("."), default=next(iter(left)))
        whole, value = _only(recipe, fields, path, found[path]), left.pop(path)
        hint = fields[whole]
        value = parse(hint, value) if isinstance(value, str) else value
        _put(data, whole, _whole(hint, value, _at(data, whole)) if kinds_of(hint) else value)
    # Checked once, when all changes are made: some values can only change together.
    return read(Recipe, data, "recipe")


def _whole(hint: Any, value: Any, before: Any) -> Any:
    """All fields of an option with a kind, as plain data."""
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    kinds = kinds_of(hint)
    if not isinstance(value, dict) or value.get("kind") not in kinds:
        return value  # refused at the end, by its path
    fields = dataclasses.fields(kinds[value["kind"]])
    whole = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    for name, default in whole.items():
        whole[name] = dataclasses.asdict(default) if dataclasses.is_dataclass(default) else default
    if set(value) == {"kind"} and isinstance(before, dict):
        whole |= {f.name: before[f.name] for f in fields if f.name in before}
    return whole | value


def _only(recipe: Recipe, fields: dict[str, Any], path: str, found: list[str]) -> str:
    """The one field that `path` means.

    Raises:
        RecipeError: none, or several.
    """
    if not found:
        names = {field.rpartition(".")[2] for field in fields} | WORDS.keys()
        names = {name for name in names if not name.isdigit()}
        raise RecipeError(
            f"Recipe {recipe.name!r} has no field {path!r}."
            + did_you_mean(path.rpartition(".")[2], names)
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
    node[last] = value


def _at(data: Any, path: str) -> Any:
    for key in path.split("."):
        data = data[int(key)] if isinstance(data, (tuple, list)) else data[key]
    return data


def _fields(hint: Any, value: Any) -> dict[str, Any]:
    """Dotted path -> type of every field below plain `value` that can be changed."""
    fields: dict[str, Any] = {}
    for key, child_hint, child in _children(hint, value):
        below = _fields(child_hint, child)
        fields |= {f"{key}.{k}": h for k, h in below.items()}
        several = isinstance(child, (tuple, list)) and below
        if key != "kind" and not several and (not _plain(child_hint, child) or not below):
            fields[key] = child_hint
    return fields


def _plain(hint: Any, value: Any) -> bool:
    """Whether a value is changed field by field alone."""
    options = [o for o in options_of(hint) if dataclasses.is_dataclass(o)]
    return bool(options) and isinstance(value, dict) and not kinds_of(hint)


def _children(hint: Any, value: Any) -> list[tuple[str, Any, Any]]:
    options = [o for o in options_of(hint) if dataclasses.is_dataclass(o)]
    if options and isinstance(value, dict):
        kind = kinds_of(hint).get(value.get("kind"), options[0])
        return [(n, h, value[n]) for n, h in hints_of(kind).items() if n in value]
    if isinstance(value, dict) and value:
        return [(key, typing.get_args(hint)[1], child) for key, child in value.items()]
    if isinstance(value, (tuple, list)) and any(isinstance(v, dict) for v in value):
        item = typing.get_args(hint)[0]
        return [(str(i), item, child) for i, child in enumerate(value)]
    return []
