"""sparsecraft: turn pretrained dense Transformers into Mixture-of-Experts models.

    import sparsecraft as sc
    report = sc.convert(model, sc.recipes.camelidae(num_experts=8, top_k=2, adapter_dim=64))

Names are imported when they are first used: torch and transformers take seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from sparsecraft.interop.doors import open_doors

if TYPE_CHECKING:  # what editors and type checkers see; a test holds it against _HOME
    from sparsecraft import recipes as recipes
    from sparsecraft.checkpoint.load import load as load
    from sparsecraft.checkpoint.save import save as save
    from sparsecraft.conversion.convert import convert as convert
    from sparsecraft.conversion.extension.extend import extend as extend
    from sparsecraft.conversion.extension.remove import remove as remove
    from sparsecraft.conversion.fast import fast as fast
    from sparsecraft.conversion.merging.merge import merge as merge
    from sparsecraft.dense import hub as hub
    from sparsecraft.errors import SparsecraftError as SparsecraftError
    from sparsecraft.evaluation.analysis.analyze import analyze as analyze
    from sparsecraft.evaluation.budget.calibration import calibrate as calibrate
    from sparsecraft.evaluation.budget.sweep import sweep as sweep
    from sparsecraft.evaluation.held_out import evaluate as evaluate
    from sparsecraft.interop.exporting import export as export
    from sparsecraft.interop.importing import import_moe as import_moe
    from sparsecraft.interop.peft.configs import MoloraConfig as MoloraConfig
    from sparsecraft.interop.peft.configs import MovConfig as MovConfig
    from sparsecraft.interop.peft.configs import PescConfig as PescConfig
    from sparsecraft.interop.peft.configs import SparsecraftConfig as SparsecraftConfig
    from sparsecraft.moe import losses as losses
    from sparsecraft.moe.context import context as context
    from sparsecraft.moe.cost import count as count
    from sparsecraft.moe.layer import MoELayer as MoELayer
    from sparsecraft.moe.tracing import trace as trace
    from sparsecraft.recipe.edits import Edit as Edit
    from sparsecraft.recipe.overrides import override as override
    from sparsecraft.recipe.recipe import Recipe as Recipe
    from sparsecraft.recipe.stages import Stage as Stage
    from sparsecraft.surgery.budget import set_budget as set_budget
    from sparsecraft.surgery.revert import revert as revert
    from sparsecraft.training.train import train as train

    __version__: str

_HOME = {
    "Edit": "recipe.edits",
    "MoELayer": "moe.layer",
    "MoloraConfig": "interop.peft.configs",
    "MovConfig": "interop.peft.configs",
    "PescConfig": "interop.peft.configs",
    "Recipe": "recipe.recipe",
    "SparsecraftConfig": "interop.peft.configs",
    "SparsecraftError": "errors",
    "Stage": "recipe.stages",
    "analyze": "evaluation.analysis.analyze",
    "calibrate": "evaluation.budget.calibration",
    "context": "moe.context",
    "convert": "conversion.convert",
    "count": "moe.cost",
    "evaluate": "evaluation.held_out",
    "export": "interop.exporting",
    "fast": "conversion.fast",
    "extend": "conversion.extension.extend",
    "import_moe": "interop.importing",
    "load": "checkpoint.load",
    "merge": "conversion.merging.merge",
    "override": "recipe.overrides",
    "remove": "conversion.extension.remove",
    "revert": "surgery.revert",
    "save": "checkpoint.save",
    "set_budget": "surgery.budget",
    "sweep": "evaluation.budget.sweep",
    "trace": "moe.tracing",
    "train": "training.train",
}
_MODULES = {"hub": "dense.hub", "losses": "moe.losses", "recipes": "recipes"}

__all__ = sorted((*_HOME, *_MODULES))


if not TYPE_CHECKING:  # from it a type checker would take every name, also a wrong one

    def __getattr__(name: str):
        if name in _HOME:
            return getattr(importlib.import_module(f"sparsecraft.{_HOME[name]}"), name)
        if name in _MODULES:
            return importlib.import_module(f"sparsecraft.{_MODULES[name]}")
        if name == "__version__":
            return importlib.import_module("sparsecraft.recipe.formats").VERSION
        raise AttributeError(f"module 'sparsecraft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


open_doors()
