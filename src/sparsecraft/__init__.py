"""sparsecraft: turn pretrained dense Transformers into Mixture-of-Experts models.

    import sparsecraft as sc
    report = sc.convert(model, sc.recipes.camelidae(num_experts=8, top_k=2, adapter_dim=64))

Names are imported when they are first used: torch and transformers take seconds to import.
"""

import importlib

from sparsecraft.doors import open_doors

_HOME = {
    "convert": "surgery",
    "revert": "surgery",
    "save": "checkpoint",
    "load": "checkpoint",
    "trace": "routing",
    "override": "recipe",
    "Recipe": "recipe",
    "Edit": "recipe",
    "Stage": "recipe",
    "MoELayer": "layer",
    "train": "training",
    "evaluate": "evaluation",
    "export": "targets",
    "import_moe": "importing",
    "extend": "extending",
    "remove": "extending",
    "count": "cost",
    "merge": "merging",
    "set_budget": "budget",
    "calibrate": "calibration",
    "sweep": "analysis.sweeping",
    "PescConfig": "peft",
    "MovConfig": "peft",
    "MoloraConfig": "peft",
    "SparsecraftConfig": "peft",
    "context": "batch",
    "SparsecraftError": "errors",
}
_MODULES = ("recipes", "hub", "losses")

__all__ = sorted((*_HOME, *_MODULES))


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f"sparsecraft.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"sparsecraft.{name}")
    if name == "__version__":
        return importlib.import_module("sparsecraft.recipe").VERSION
    raise AttributeError(f"module 'sparsecraft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


open_doors()
