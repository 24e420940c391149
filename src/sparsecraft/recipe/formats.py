"""A recipe as JSON: written with its format version, read back field by field."""

from __future__ import annotations

import dataclasses
from typing import Any

from sparsecraft.errors import RecipeError
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.recipe.typed import read

VERSION = "0.1.0"


FORMAT_VERSION = 1


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON data, `format_version` first."""
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(recipe)}


def from_json(data: dict[str, Any]) -> Recipe:
    """The recipe that `to_json` wrote.

    Raises:
        RecipeError: a newer format, an unknown or missing field, or a value of the wrong type.
    """
    data = dict(data)
    version = data.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise RecipeError(
            f"The recipe has format_version {version!r} and this sparsecraft reads "
            f"{FORMAT_VERSION}; upgrade sparsecraft, or convert the model again."
        )
    return read(Recipe, data, "recipe")
