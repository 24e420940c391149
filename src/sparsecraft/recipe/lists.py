"""takes_lists(): where a recipe takes a whole number, it takes one for each layer, too."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any

from sparsecraft.errors import RecipeError
from sparsecraft.recipe.by_layer import together
from sparsecraft.recipe.recipe import Recipe

Function = Callable[..., Recipe]


def takes_lists(function: Function) -> Function:
    """The function of a recipe, whose whole numbers may each be a list, one number for each layer.

    It is called once for each layer, and the edits that it gives differ by numbers, which
    `Edit.by_layer` holds; what it derives of them (a mask, alpha, a share) follows by itself.
    """
    hints = typing.get_type_hints(function)
    whole = {name for name, hint in hints.items() if int in (hint, *typing.get_args(hint))}

    @functools.wraps(function)
    def by_layer(*args: Any, **kwargs: Any) -> Recipe:
        if not any(isinstance(value, (list, tuple, range)) for value in (*args, *kwargs.values())):
            return function(*args, **kwargs)
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        lists = {n: v for n, v in given.items() if n in whole and isinstance(v, Sequence)}
        return _joined(function, given, lists) if lists else function(*args, **kwargs)

    by_layer.__annotations__ = {
        name: hint | tuple[int, ...] if name in whole else hint for name, hint in hints.items()
    }
    return by_layer


def _joined(function: Function, given: dict[str, Any], lists: dict[str, Sequence[Any]]) -> Recipe:
    """The recipe that in each layer is what `function` gives for its numbers."""
    name, said = function.__name__, " and ".join(f"{n}={list(v)}" for n, v in lists.items())
    if len({len(numbers) for numbers in lists.values()}) > 1 or not all(lists.values()):
        counts = " and ".join(f"{len(v)} of {n}" for n, v in lists.items())
        raise RecipeError(f"Recipe {name!r} has {counts}; give one number for each layer.")
    layers = []
    for number, values in enumerate(zip(*lists.values(), strict=True)):
        try:
            layers.append(function(**given | dict(zip(lists, values, strict=True))))
        except RecipeError as error:
            raise RecipeError(f"In layer {number}, {error}") from None
    first, exact = layers[0], all(recipe.exact_at_start for recipe in layers)
    alike = {"edits": first.edits, "exact_at_start": exact}
    whole = dataclasses.replace(first, exact_at_start=exact)
    if any(
        dataclasses.replace(recipe, **alike) != whole or len(recipe.edits) != len(first.edits)
        for recipe in layers
    ):
        raise RecipeError(
            f"Recipe {name!r} with {said} would be another method in some layers than in others; "
            "only numbers of its edits can differ from layer to layer."
        )
    by_edit = list(zip(*(recipe.edits for recipe in layers), strict=True))
    # Where the lists say the same of every layer, they say still how many layers there are.
    also = [] if any(set(edits) != {edits[0]} for edits in by_edit) else ["experts.num_experts"]
    edits = [together(e, also if e is by_edit[0] else ()) for e in by_edit]
    return dataclasses.replace(whole, edits=tuple(edits))
