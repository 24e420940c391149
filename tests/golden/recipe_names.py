"""The names that the expressions in format1/recipes.json use, wherever they live.

Public names come from `sparsecraft`; the internal ones stand here, for whoever moves them.
"""

from __future__ import annotations

from typing import Any

from cases import RECIPES

import sparsecraft as sc
from sparsecraft import recipe as specs

SPECS = (
    "AdapterSpec", "AttentionSpec", "BucketSpec", "ExpansionSpec", "FFNLoRASpec", "FFNSpec",
    "FitSpec", "LoRASpec", "RouterSpec", "SplitSpec", "VectorSpec",
)  # fmt: skip


def namespace() -> dict[str, Any]:
    public = {"sc": sc, "Recipe": sc.Recipe, "Edit": sc.Edit, "Stage": sc.Stage}
    return public | {name: getattr(specs, name) for name in SPECS} | {"RECIPES": RECIPES}
