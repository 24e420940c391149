"""Plain data, or text, -> the dataclasses of a recipe, checked by their type hints."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

from sparsecraft.errors import RecipeError, did_you_mean
from sparsecraft.recipe.experts import KINDS, ExpertsSpec


def _options(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if is_union else (hint,)
    if ExpertsSpec in options:  # any of the kinds that are registered
        return (*(o for o in options if o is not ExpertsSpec), *KINDS.values())
    return options


def parse(hint: Any, text: str) -> Any:
    """Text from a command line -> a plain value of the field's type, or the text itself."""
    for option in _options(hint):
        if option is type(None) and text.lower() == "none":
            return None
        if option is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
        if typing.get_origin(option) is tuple:
            return tuple(text.split(","))
        if typing.get_origin(option) is dict:
            pairs = (pair.partition("=") for pair in text.split(",") if pair)
            return {k: parse(typing.get_args(option)[1], v) for k, _, v in pairs}
    return text


def read(hint: Any, value: Any, path: str) -> Any:
    """Check `value` against the type `hint`, building the dataclasses on the way."""
    options = _options(hint)
    specs = [o for o in options if dataclasses.is_dataclass(o)]
    if specs and (isinstance(value, dict) or dataclasses.is_dataclass(value)):
        return value if dataclasses.is_dataclass(value) else read_spec(specs, value, path)
    for option in options:
        origin, args = typing.get_origin(option), typing.get_args(option)
        if origin is Literal and value in args:
            return value
        if origin is tuple and isinstance(value, (list, tuple)):
            return tuple(read(args[0], v, f"{path}.{i}") for i, v in enumerate(value))
        if origin is dict and isinstance(value, dict):
            return {key: read(args[1], v, f"{path}.{key}") for key, v in value.items()}
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(option, type) and origin is None and type(value) is option:
            return value
    wanted = " or ".join(
        " or ".join(map(repr, typing.get_args(o)))
        if typing.get_origin(o) is Literal
        else getattr(o, "__name__", str(o))
        for o in options
    )
    raise RecipeError(f"{path} is {value!r}; it must be {wanted}.")


def read_spec(specs: list[type], data: dict[str, Any], path: str) -> Any:
    if len(specs) > 1:
        kinds = {typing.get_type_hints(s)["kind"].__args__[0]: s for s in specs}
        if data.get("kind") not in kinds:
            raise RecipeError(
                f"{path}.kind is {data.get('kind')!r}." + did_you_mean(str(data.get("kind")), kinds)
            )
        specs = [kinds[data["kind"]]]
    hints = typing.get_type_hints(specs[0])
    for key in data:
        if key not in hints:
            raise RecipeError(f"{path} has no field {key!r}." + did_you_mean(key, hints))
    values = {key: read(hints[key], value, f"{path}.{key}") for key, value in data.items()}
    try:
        return specs[0](**values)
    except TypeError as error:
        raise RecipeError(f"{path} is incomplete: {error}.") from None
