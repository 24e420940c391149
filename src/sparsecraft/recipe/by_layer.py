"""Numbers of an edit that differ from layer to layer: how many experts, k, ranks. Torch-free.

Which layers are meant, `sparsecraft.dense.layers` says. MoLA (Gao et al., arXiv 2402.08562) gives
higher layers more experts, AlphaLoRA (Qing et al., EMNLP 2024) those whose spectra ask for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sparsecraft.errors import RecipeError
from sparsecraft.recipe.numbers import is_number
from sparsecraft.recipe.typed import check_types, read

E = TypeVar("E")  # Edit, which holds these


@dataclass(frozen=True, slots=True)
class ByLayer:
    """A number of an edit for each layer."""

    field: str
    """Its dotted path in the edit, such as `experts.num_experts`."""
    numbers: tuple[int | float, ...]

    def __post_init__(self) -> None:
        check_types(self)

    def __str__(self) -> str:
        return f"{self.field} by layer: {', '.join(f'{number:g}' for number in self.numbers)}"


def check_by_layer(edit: Any) -> None:
    """Refuse numbers by layer that are of no field, too few or too many, or make no layer.

    Raises:
        RecipeError: so it is.
    """
    own, seen = leaves(dataclasses.asdict(edit)), set()
    for by in edit.by_layer:
        if by.field in seen or not has_number(edit, by.field):
            why = "it has them already" if by.field in seen else "it has no number of that name"
            raise RecipeError(
                f"An edit has numbers by layer for {by.field!r}, and {why}; fields are called "
                "like 'experts.num_experts' and 'router.select.k'."
            )
        seen.add(by.field)
        if by.numbers[:1] != (own[by.field],):
            raise RecipeError(
                f"{by.field} is {own[by.field]} and its numbers by layer are {list(by.numbers)}; "
                "the field itself says what the first layer has."
            )
    counts = {by.field: len(by.numbers) for by in edit.by_layer}
    if len(set(counts.values())) > 1:
        said = " and ".join(f"{count} of {field}" for field, count in counts.items())
        raise RecipeError(f"There are {said} by layer; give one number for each layer.")
    for number in range(min(counts.values(), default=0)):
        try:
            in_layer(edit, number)
        except RecipeError as error:
            raise RecipeError(f"In layer {number}, {error}") from None


def in_layer(edit: E, number: int) -> E:
    """What an edit is in the layer of this number, from 0."""
    data = dataclasses.asdict(edit) | {"by_layer": ()}
    for by in edit.by_layer:
        *parents, last = by.field.split(".")
        node = data
        for name in parents:
            node = node[name]
        node[last] = by.numbers[number]
    return read(type(edit), data, "its edit")


def together(edits: Sequence[E], also: Sequence[str] = ()) -> E:
    """The edit that is in each layer what these are, one for each.

    Args:
        also: fields whose numbers it keeps by layer even where they are all the same.

    Raises:
        RecipeError: they differ in more than numbers.
    """
    values = [leaves(dataclasses.asdict(edit) | {"by_layer": ()}) for edit in edits]
    fields = dict.fromkeys(field for of_layer in values for field in of_layer)
    by_layer = []
    for field in fields:
        numbers = tuple(of_layer.get(field) for of_layer in values)
        if any(number != numbers[0] for number in numbers) or field in also:
            if not all(map(is_number, numbers)):
                shown = " and ".join(map(repr, dict.fromkeys(map(str, numbers))))
                raise RecipeError(
                    f"{field} would be {shown} by layer; only numbers can differ from layer to "
                    "layer."
                )
            by_layer.append(ByLayer(field, numbers))
    return dataclasses.replace(edits[0], by_layer=tuple(by_layer))


def has_number(edit: Any, field: str) -> bool:
    """Whether a dotted path leads to a number of an edit."""
    return is_number(leaves(dataclasses.asdict(edit)).get(field))


def leaves(data: dict[str, Any]) -> dict[str, Any]:
    """Dotted path -> value of all that nested plain data say."""
    found: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, dict):
            found |= {f"{name}.{below}": leaf for below, leaf in leaves(value).items()}
        else:
            found[name] = value
    return found
