"""Every published method as a function that returns a Recipe; one file per paper.

A recipe is said in the words of `sparsecraft.recipe`. It knows no tensor and no model, holds no
control flow over them, and imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable

from sparsecraft.errors import RecipeError, did_you_mean
from sparsecraft.recipe import Recipe
from sparsecraft.recipe.lists import takes_lists
from sparsecraft.recipes.adapter import adapter
from sparsecraft.recipes.attentive import attentive
from sparsecraft.recipes.bam import bam
from sparsecraft.recipes.btx import btx
from sparsecraft.recipes.camel import camel
from sparsecraft.recipes.camelidae import camelidae
from sparsecraft.recipes.cmoe import cmoe
from sparsecraft.recipes.d2dmoe import d2dmoe
from sparsecraft.recipes.drop_upcycling import drop_upcycling
from sparsecraft.recipes.dsti import dsti
from sparsecraft.recipes.gmoefication import gmoefication
from sparsecraft.recipes.hydralora import hydralora
from sparsecraft.recipes.ia3 import ia3
from sparsecraft.recipes.lora import lora
from sparsecraft.recipes.lte import lte
from sparsecraft.recipes.mixlora import mixlora
from sparsecraft.recipes.moefication import moefication
from sparsecraft.recipes.moepp import moepp
from sparsecraft.recipes.molora import molora
from sparsecraft.recipes.mov import mov
from sparsecraft.recipes.mpoe import mpoe
from sparsecraft.recipes.nexus import nexus
from sparsecraft.recipes.smola import smola
from sparsecraft.recipes.upcycling import upcycling
from sparsecraft.recipes.upit import upit
from sparsecraft.recipes.virtual_groups import virtual_groups

__all__ = [
    "adapter",
    "attentive",
    "bam",
    "btx",
    "camel",
    "camelidae",
    "cmoe",
    "d2dmoe",
    "drop_upcycling",
    "dsti",
    "gmoefication",
    "hydralora",
    "ia3",
    "lora",
    "lte",
    "mixlora",
    "moefication",
    "moepp",
    "molora",
    "mov",
    "mpoe",
    "nexus",
    "smola",
    "upcycling",
    "upit",
    "virtual_groups",
]

globals().update({name: takes_lists(globals()[name]) for name in __all__})


def __dir__() -> list[str]:
    return __all__


def by_name(name: str) -> Callable[..., Recipe]:
    """The recipe function called `name`.

    Raises:
        RecipeError: there is none; the message names the nearest.
    """
    if name not in __all__:
        raise RecipeError(f"Unknown recipe {name!r}." + did_you_mean(name, __all__))
    return globals()[name]
