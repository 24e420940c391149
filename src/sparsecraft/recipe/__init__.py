"""The language of methods: edits, experts, routers, stages, and their JSON.

A recipe says which layers stand where, what their experts and routers are, and what trains.
It is data. It knows no tensor, no model and no paper, and imports no torch; `sparsecraft.recipes`
says the published methods in it.
"""

from sparsecraft.recipe.edits import Edit
from sparsecraft.recipe.experts import (
    AdapterSpec,
    AttentionSpec,
    FFNLoRASpec,
    FFNSpec,
    LoRASpec,
    SplitSpec,
    VectorSpec,
)
from sparsecraft.recipe.recipe import ExpansionSpec, Recipe, check_variant
from sparsecraft.recipe.routers import RouterSpec
from sparsecraft.recipe.stages import BucketSpec, FitSpec, Stage

__all__ = [
    "AdapterSpec",
    "AttentionSpec",
    "BucketSpec",
    "Edit",
    "ExpansionSpec",
    "FFNLoRASpec",
    "FFNSpec",
    "FitSpec",
    "LoRASpec",
    "Recipe",
    "RouterSpec",
    "SplitSpec",
    "Stage",
    "VectorSpec",
    "check_variant",
]
