"""A recipe as JSON: written in this format, and read from it or any older one.

A file of an older format is upgraded step by step before it is read: `UPGRADES[n]` makes plain
data of format n + 1 from such of format n, and knows every field that format n had.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from sparsecraft.errors import RecipeError
from sparsecraft.recipe.format1 import upgraded_1
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.recipe.typed import read

VERSION = "0.1.0"

FORMAT_VERSION = 2

UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: upgraded_1}


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON data, `format_version` first."""
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(recipe)}


def from_json(data: dict[str, Any]) -> Recipe:
    """The recipe that `to_json` wrote, in this format or an older one.

    Raises:
        RecipeError: a newer format, an unknown or missing field, or a value of the wrong type.
    """
    if not isinstance(data, dict):
        raise RecipeError(f"The recipe is {data!r}; it must be the object that to_json wrote.")
    version = check_format(data.get("format_version"), "The recipe")
    data = {key: value for key, value in data.items() if key != "format_version"}
    for number in range(version, FORMAT_VERSION):
        data = UPGRADES[number](data)
    return read(Recipe, data, "recipe")


def upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """A recipe's JSON of any format that is read, as `to_json` writes it now."""
    return to_json(from_json(data))


def check_format(version: Any, what: str) -> int:
    """The format of something that was read.

    Raises:
        RecipeError: no format that this sparsecraft reads.
    """
    known = range(min(UPGRADES), FORMAT_VERSION + 1)
    if type(version) is not int or version not in known:
        newer = type(version) is int and version > FORMAT_VERSION
        advice = "upgrade sparsecraft" if newer else "save or convert the model again"
        raise RecipeError(
            f"{what} has format_version {version!r} and this sparsecraft reads {known[0]} to "
            f"{known[-1]}; {advice}."
        )
    return version
