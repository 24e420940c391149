"""Families of options: an abstract base, and every kind of it that recipes can name.

A kind is a frozen dataclass below a family's base whose field `kind` is its word. It belongs to
the family once `add_kind` was called with it, in `src` or anywhere else.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import TypeVar

from sparsecraft.errors import RecipeError

T = TypeVar("T", bound=type)

FAMILIES: dict[type, dict[str, type]] = {}


def family(base: T) -> T:
    """Let `base` stand in a type hint for all of its kinds."""
    FAMILIES[base] = {}
    return base


def words_of(option: type) -> tuple[str, ...]:
    """The words that `kind` may have: those of its Literal, or else its default."""
    hint = typing.get_type_hints(option)["kind"]
    known = typing.get_args(hint)
    return known or tuple(f.default for f in dataclasses.fields(option) if f.name == "kind")


def add_kind(option: T) -> T:
    """Let recipes name a further kind of the families that `option` stands below.

    Raises:
        RecipeError: it stands below none, or another class has its `kind` already.
    """
    families = [base for base in option.__mro__ if base in FAMILIES]
    if not families or not dataclasses.is_dataclass(option):
        raise RecipeError(
            f"{option.__name__} is no kind of options: it must be a dataclass below one of "
            f"{', '.join(base.__name__ for base in FAMILIES)}."
        )
    for kind in words_of(option):
        for base in families:
            known = FAMILIES[base].setdefault(kind, option)
            if known is not option:
                raise RecipeError(
                    f"kind {kind!r} of {option.__name__} is that of {known.__name__}; give it "
                    "another."
                )
    return option
