"""override(): a recipe with some fields changed, by dotted paths."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from sparsecraft.errors import RecipeError, did_you_mean
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.recipe.typed import parse, read


def override(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """A copy of `recipe` with some fields changed.

    Args:
        changes: dotted path -> value. A path is the whole way (`edits.0.router.temperature`) or
            its unambiguous end (`router.temperature`). Text is parsed by the field's type.

    Raises:
        RecipeError: no field, or more than one, has that path; or the value does not fit.
    """
    leaves, data = _leaves(Recipe, recipe), dataclasses.asdict(recipe)
    for path, value in changes.items():
        found = [leaf for leaf in leaves if leaf.endswith("." + path)]
        if path in leaves:
            found = [path]
        if not found:
            names = {leaf.rpartition(".")[2] for leaf in leaves}
            raise RecipeError(
                f"Recipe {recipe.name!r} has no field {path!r}."
                + did_you_mean(path.rpartition(".")[2], names)
            )
        if len(found) > 1:
            raise RecipeError(f"{path!r} is ambiguous: say one of {', '.join(found)}.")
        *parents, last = found[0].split(".")
        node = data
        for key in parents:
            node = node[int(key)] if isinstance(node, tuple) else node[key]
        node[last] = parse(leaves[found[0]], value) if isinstance(value, str) else value
    # Checked once, when all changes are made: `select` and `top_k` can only change together.
    return read(Recipe, data, "recipe")


def _leaves(hint: Any, value: Any) -> dict[str, Any]:
    """Dotted path -> type of every field below `value` that holds no dataclass."""
    leaves: dict[str, Any] = {}
    for key, child_hint, child in _children(hint, value):
        below = _leaves(child_hint, child)
        leaves |= {f"{key}.{k}": h for k, h in below.items()}
        if not below or isinstance(child, dict):
            leaves[key] = child_hint
    return leaves


def _children(hint: Any, value: Any) -> list[tuple[str, Any, Any]]:
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        return [(f.name, hints[f.name], getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, dict) and value:
        return [(key, typing.get_args(hint)[1], child) for key, child in value.items()]
    if isinstance(value, tuple) and any(dataclasses.is_dataclass(v) for v in value):
        item = typing.get_args(hint)[0]
        return [(str(i), item, child) for i, child in enumerate(value)]
    return []
