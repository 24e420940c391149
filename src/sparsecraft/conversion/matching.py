"""The fair baseline: a recipe of the size at which it trains as many parameters as another one.

Everything is counted on a model without weights, so that it costs seconds for a model of any size.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsecraft.dense import hub
from sparsecraft.dense.loading import skeleton
from sparsecraft.errors import RecipeError
from sparsecraft.moe import cost
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.surgery.install import apply
from sparsecraft.surgery.plan import plan

log = logging.getLogger("sparsecraft")

# What a recipe calls its size; of several, the first is varied.
SIZES = ("rank", "adapter_dim", "lora_rank")

# How much larger than the target the smallest size may be without a warning.
FAIR = 1.05


@dataclass(frozen=True, slots=True)
class Match:
    """A recipe whose size was chosen, and how near it comes.

    Attributes:
        recipe: the recipe of that size.
        parameter: what was varied, such as `rank`.
        size: the value found.
        trainable: parameters that the recipe trains.
        target: parameters that the other recipe trains.
    """

    recipe: Recipe
    parameter: str
    size: int
    trainable: int
    target: int

    @property
    def ratio(self) -> float:
        return self.trainable / self.target

    def __str__(self) -> str:
        text = (
            f"{self.recipe.name} with {self.parameter}={self.size} trains {self.trainable:,} "
            f"parameters, the target {self.target:,}: ratio {self.ratio:.3f}"
        )
        if self.size == 1 and self.ratio > FAIR:
            text += f"; even the smallest {self.parameter} is more than {FAIR} times the target"
        return f"{text}."


def match_params(
    function: Callable[..., Recipe], target: Recipe, model: nn.Module | str | Path, **arguments: Any
) -> Recipe:
    """The recipe of `function` that trains as many parameters as `target` does, or nearly.

    Both counts are those of the first stage, on this model; they go to the log.

    Args:
        function: a recipe with a size: `sc.recipes.lora`, `camel`, `adapter`, ...
        target: the recipe to be compared with.
        model: a dense transformers model, or its name or folder.
        arguments: of `function`, all but its size.

    Raises:
        RecipeError: the recipe has no size, or `arguments` name it; or the target splits dense
            networks, and adds no parameters that a baseline could match.

    Example:
        baseline = match_params(sc.recipes.lora, sc.recipes.mov(), "smollm2")
    """
    found = match(function, target, model, **arguments)
    log.info("%s", found)
    return found.recipe


def match(
    function: Callable[..., Recipe], target: Recipe, model: nn.Module | str | Path, **arguments: Any
) -> Match:
    """As `match_params`, with the counts."""
    parameter = size_of(function)
    if parameter in arguments:
        raise RecipeError(
            f"{parameter}={arguments[parameter]} and a target to match both set the size of "
            f"{function.__name__!r}; leave one out."
        )
    _check_target(target)
    wanted = trainable(target, model)

    def at(size: int) -> tuple[Recipe, int]:
        recipe = function(**arguments, **{parameter: size})
        return recipe, trainable(recipe, model)

    (_, one), (_, two) = at(1), at(2)
    size = max(1, 1 + round((wanted - one) / (two - one)))  # every update is linear in its width
    recipe, count = at(size)
    return Match(recipe, parameter, size, count, wanted)


def _check_target(target: Recipe) -> None:
    """Refuse a target whose trainable parameters are the dense model's own."""
    if any(edit.experts.parts for edit in target.edits):
        raise RecipeError(
            f"Recipe {target.name!r} splits dense networks: it trains the dense weights themselves "
            "and routers that leave some of them out, so that no number of new parameters is "
            "comparable. Compare it with the dense model after as many steps on the same data."
        )


def size_of(function: Callable[..., Recipe]) -> str:
    """The parameter of a recipe function that sets how many parameters it trains.

    Raises:
        RecipeError: it has none.
    """
    known = inspect.signature(function).parameters
    found = next((name for name in SIZES if name in known), None)
    if found is None:
        raise RecipeError(
            f"Recipe {function.__name__!r} has no size to be matched ({', '.join(SIZES)}); the "
            "dense baselines that have one are lora, camel and adapter."
        )
    return found


def trainable(recipe: Recipe, model: nn.Module | str | Path) -> int:
    """Parameters that the first stage of `recipe` trains on `model`, which is left alone.

    Raises:
        SurgeryError, DonorError, RecipeError: the plan is impossible for this model.
    """
    bare = _without_weights(model)
    recipe = replace(recipe, backbone=None)  # packed weights never train
    apply(bare, recipe, plan(bare, recipe), on_meta=True)
    return cost.count(bare).trainable


def _without_weights(model: nn.Module | str | Path) -> nn.Module:
    if not isinstance(model, nn.Module):
        return skeleton(hub.resolve(str(model)))
    with torch.device("meta"):
        return type(model)._from_config(model.config)
