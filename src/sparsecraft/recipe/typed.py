"""Plain data, or text, -> the dataclasses of a recipe, checked by their type hints.

A base of a family of options (see `sparsecraft.recipe.kinds`) stands for all of its kinds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from typing import Any, Literal

from sparsecraft.errors import RecipeError, did_you_mean
from sparsecraft.recipe.kinds import FAMILIES, words_of


def options_of(hint: Any) -> tuple[Any, ...]:
    """The types that a hint allows; for a family its kinds."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if is_union else (hint,)
    return tuple(o for option in options for o in _kinds(option))


def _kinds(option: Any) -> tuple[Any, ...]:
    known = FAMILIES.get(option) if isinstance(option, type) else None
    return (option,) if known is None else tuple(dict.fromkeys(known.values()))


@functools.cache
def hints_of(option: type) -> dict[str, Any]:
    """Field -> type of a dataclass."""
    hints = typing.get_type_hints(option)
    return {field.name: hints[field.name] for field in dataclasses.fields(option)}


def needed_by(option: type) -> list[str]:
    """The fields of a dataclass that have no default."""
    none = dataclasses.MISSING
    fields = dataclasses.fields(option)
    return [f.name for f in fields if f.default is none and f.default_factory is none]


def specs_of(hint: Any) -> list[type]:
    """The dataclasses that a hint allows."""
    return [option for option in options_of(hint) if dataclasses.is_dataclass(option)]


def kinds_of(hint: Any) -> dict[str, type]:
    """kind -> dataclass, of those that a hint allows; empty where none of them has a kind."""
    tagged = [option for option in specs_of(hint) if "kind" in hints_of(option)]
    return {kind: option for option in tagged for kind in words_of(option)}


def kind_in(data: dict[str, Any], kinds: dict[str, type]) -> type | None:
    """The dataclass that the `kind` of plain data names; None if it names none of them."""
    word = data.get("kind")
    return kinds.get(word) if isinstance(word, str) else None


def shown(value: Any) -> str:
    """A value for a sentence, whatever it is."""
    try:
        return repr(value)
    except (RecursionError, ValueError):  # nested too deeply; an integer of too many digits
        return f"a {type(value).__name__} too large to show"


def parse(hint: Any, text: str) -> Any:
    """Text from a command line -> a plain value of the field's type, or the text itself.

    A dataclass may be given as JSON, one with a kind by its word too.

    Raises:
        RecipeError: text that begins as JSON and is none.
    """
    kinds = kinds_of(hint)
    if specs_of(hint) and text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{text!r:.80} is no JSON: {error}.") from None
    for option in options_of(hint):
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
            item = typing.get_args(option)[0]
            return tuple(parse(item, part) for part in text.split(","))
        if typing.get_origin(option) is dict:
            pairs = (pair.partition("=") for pair in text.split(",") if pair)
            return {k: parse(typing.get_args(option)[1], v) for k, _, v in pairs}
    return {"kind": text} if kinds else text


def read(hint: Any, value: Any, path: str) -> Any:
    """Check `value` against the type `hint`, building the dataclasses on the way."""
    options, specs = options_of(hint), specs_of(hint)
    if type(value) in specs:
        return value
    if specs and isinstance(value, dict):
        return _read_spec(hint, value, path)
    for option in options:
        origin, args = typing.get_origin(option), typing.get_args(option)
        if origin is Literal and value in args and type(value) in map(type, args):
            return value
        if origin is tuple and isinstance(value, (list, tuple)):
            return tuple(read(args[0], v, f"{path}.{i}") for i, v in enumerate(value))
        if origin is dict and isinstance(value, dict):
            return {
                read(args[0], key, f"a key of {path}"): read(args[1], v, f"{path}.{key}")
                for key, v in value.items()
            }
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return _read_float(value, path)
        if isinstance(option, type) and origin is None and type(value) is option:
            return value
    raise RecipeError(f"{path} is {shown(value)}; it must be {' or '.join(map(_name, options))}.")


def _read_float(value: float, path: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        raise RecipeError(f"{path} is a whole number too large for a float.") from None
    if math.isnan(number):  # every comparison with it is false, so that checks may let it pass
        raise RecipeError(f"{path} is nan; it must be a number.")
    return number


def _name(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return " or ".join(map(repr, typing.get_args(option)))
    return "None" if option is type(None) else getattr(option, "__name__", str(option))


def _read_spec(hint: Any, data: dict[str, Any], path: str) -> Any:
    (spec, *_), kinds = specs_of(hint), kinds_of(hint)
    if kinds:
        word = data.get("kind")
        spec = kind_in(data, kinds)
        if spec is None:
            near = did_you_mean(word if isinstance(word, str) else "", kinds)
            raise RecipeError(
                f"{path}.kind is {shown(word)}.{near} A kind of your own must be registered first: "
                "import the module that does that."
            )
    hints = hints_of(spec)
    for key in data:
        if key not in hints:
            raise RecipeError(f"{path} has no field {key!r}." + did_you_mean(str(key), hints))
    if lacking := [name for name in needed_by(spec) if name not in data]:
        raise RecipeError(f"{path} lacks {', '.join(lacking)}.")
    return spec(**{key: read(hints[key], value, f"{path}.{key}") for key, value in data.items()})


def check_types(option: Any) -> None:
    """Refuse values of fields that are not of their types, where a dataclass is made by hand; a
    whole number in a field for any becomes one.

    Raises:
        RecipeError: a value is of another type; it is named by its class and field.
    """
    for name, hint in hints_of(type(option)).items():
        value = getattr(option, name)
        found = read(hint, value, f"{type(option).__name__}.{name}")
        if found is not value:
            object.__setattr__(option, name, found)
