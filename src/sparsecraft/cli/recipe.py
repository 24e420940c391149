"""A recipe on the command line: its parameters as flags, or in one word of `--match-params`."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import field, make_dataclass
from typing import Annotated, Any

from sparsecraft import recipes
from sparsecraft.cli.console import parse
from sparsecraft.errors import RecipeError, did_you_mean
from sparsecraft.recipe import Recipe


def options_of(function: Callable, *bases: type) -> type:
    """The recipe function's parameters, after the options of `bases`, as one frozen dataclass."""
    import tyro
    from docstring_parser import parse as parse_docstring

    docstring = parse_docstring(function.__doc__)
    texts = {p.arg_name: _sentence(p.description) for p in docstring.params}
    hints = typing.get_type_hints(function)
    fields = [
        (
            name,
            Annotated[hints[name], tyro.conf.arg(help=texts[name])],
            field(default=parameter.default, kw_only=True),
        )
        for name, parameter in inspect.signature(function).parameters.items()
    ]
    name = f"{function.__name__}_options"
    options = make_dataclass(name, fields, bases=bases, frozen=True)
    options.__doc__ = docstring.short_description
    return options


def _sentence(text: str) -> str:
    """On one line, as tyro keeps line breaks, and with a capital unless it starts with a symbol."""
    words = " ".join(text.split())
    first = words.partition(" ")[0]
    return words[0].upper() + words[1:] if first.isalpha() and len(first) > 1 else words


def read_recipe(text: str) -> Recipe:
    """The recipe that a text such as `mov` or `molora:num_experts=5,rank=4` names.

    Raises:
        RecipeError: no such recipe or parameter, or no `=`.
    """
    name, _, rest = text.partition(":")
    function = recipes.by_name(name)
    known, argv = inspect.signature(function).parameters, []
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals or key not in known:
            raise RecipeError(
                f"{text!r} sets {pair!r}; say parameter=value." + did_you_mean(key, known)
            )
        flag = key.replace("_", "-")
        if value.lower() in ("true", "false"):
            argv.append(f"--{flag}" if value.lower() == "true" else f"--no-{flag}")
        else:
            argv += [f"--{flag}", value]
    options = parse(options_of(function), f"convert {name}", argv)
    return function(**{key: getattr(options, key) for key in known})


def matched(
    function: Callable[..., Recipe],
    arguments: dict[str, Any],
    target: str,
    changes: tuple[str, ...],
    model: str,
) -> Any:
    """The recipe of `function` that trains as many parameters as the recipe that `target` names.

    `changes` are the fields that `--set` changes; `model` is the dense model's name.

    Raises:
        RecipeError: the size is set by a parameter or by `changes`, too.
    """
    from sparsecraft.conversion.matching import match, size_of

    wanted = read_recipe(target)
    parameter = size_of(function)
    arguments = dict(arguments)
    size = arguments.pop(parameter)
    both = f"and --match-params both set the size of {function.__name__!r}; leave one out."
    if size != inspect.signature(function).parameters[parameter].default:
        raise RecipeError(f"--{parameter.replace('_', '-')} {size} {both}")
    leaf = {"adapter_dim": "dim", "lora_rank": "rank"}.get(parameter, parameter)
    for text in changes:
        if text.partition("=")[0].rpartition(".")[2] == leaf:
            raise RecipeError(f"--set {text} {both}")
    return match(function, wanted, model, **arguments)
