"""Which parameters the words of a stage cover."""

from __future__ import annotations

import fnmatch

from torch import nn

from sparsecraft.errors import RecipeError
from sparsecraft.surgery.record import conversion_of


def matches(parameter_name: str, word: str) -> bool:
    """Whether a word of `Stage.trains` covers the parameter."""
    if word == "all":
        return True
    if word in ("experts", "router"):
        return f".{word}." in f".{parameter_name}"
    if word == "model":
        return ".router." not in f".{parameter_name}"
    if word == "others":
        return not any(matches(parameter_name, part) for part in ("experts", "router"))
    return fnmatch.fnmatch(parameter_name, word)


def set_trainable(model: nn.Module, trains: tuple[str, ...]) -> list[str]:
    """Let exactly the parameters that `trains` names require gradients; return their names.

    Args:
        trains: `experts`, `router`, `all`, or globs over parameter names.

    Raises:
        RecipeError: a word that names no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen = {word: {n for n in names if matches(n, word)} for word in trains}
    routers = [e.router for e in conversion_of(model).recipe.edits if e.router is not None]
    learned = any(not router.splits for router in routers)  # a split network's may have no weights
    for word, found in chosen.items():
        if not found and not (word == "router" and not learned):
            raise RecipeError(f"The stage trains {word!r}, which names no parameter of the model.")
    wanted = set().union(*chosen.values())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(name in wanted)
    return sorted(wanted)
