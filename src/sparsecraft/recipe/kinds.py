"""Families of options: an abstract base, and every kind of it that recipes can name.

A kind is a frozen dataclass below a family's base whose field `kind` is its word. It belongs to
the family once `add_kind` was called with it, in `src` or anywhere else.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from sparsecraft.errors import RecipeError

T = TypeVar("T", bound=type)
M = TypeVar("M")

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
        RecipeError: it stands below none, has no `kind` of its own, or another class has that one
            already; nothing is added then.
    """
    families = families_of(option)
    # Its own fields: a class below a dataclass is none until it is decorated itself.
    if not families or "__dataclass_fields__" not in vars(option):
        raise RecipeError(
            f"{called(option)} is no kind of options: it must be a dataclass below one of "
            f"{', '.join(base.__name__ for base in FAMILIES)}."
        )
    words = words_of(option) if "kind" in option.__dataclass_fields__ else ()
    if not (words and all(isinstance(word, str) and word for word in words)):
        raise RecipeError(
            f"{option.__name__} has no kind: it needs a field kind with a default or a Literal, "
            "the word that recipes name it by."
        )
    taken = [(w, base) for w in words for base in families if w in FAMILIES[base]]
    for word, base in taken:
        known = FAMILIES[base][word]
        if known is not option:
            raise RecipeError(
                f"kind {word!r} of {option.__name__} is that of {known.__name__}; give it another."
            )
    for base in families:
        FAMILIES[base] |= dict.fromkeys(words, option)
    return option


def families_of(option: Any) -> list[type]:
    """The bases of families that a class stands below; none for what is no class."""
    return [base for base in getattr(option, "__mro__", ()) if base in FAMILIES]


def named(table: Mapping[type, M], option: Any, lacks: str, door: str) -> M:
    """What a table holds for the kind of an option.

    Args:
        lacks: what it has not where the table holds nothing, for the sentence.
        door: the call that names it.

    Raises:
        RecipeError: the table holds nothing for it.
    """
    if type(option) not in table:
        kind = getattr(option, "kind", None)
        raise RecipeError(f"{type(option).__name__} ({kind!r}) has no {lacks}; name it by {door}.")
    return table[type(option)]


def enter(table: dict[type, M], option: type, made: M) -> None:
    """Let recipes name a further kind, and a table hold what computes it.

    Raises:
        RecipeError: `add_kind` refuses it, or the table holds something else for it.
    """
    if option in table and table[option] is not made:
        raise RecipeError(
            f"What computes {option.__name__} is named already ({called(table[option])}); register "
            f"{called(made)} with a kind of its own instead."
        )
    table[add_kind(option)] = made


def called(part: Any) -> str:
    """What a sentence calls a class, a function or anything else."""
    return getattr(part, "__name__", f"{part!r:.80}")
