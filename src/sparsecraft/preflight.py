"""What a conversion will need, known from the configuration alone, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from sparsecraft import cost, hub
from sparsecraft.recipe import Recipe
from sparsecraft.surgery import build_layer, plan


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of the dense model and of the parameters that a recipe adds to it."""

    base: int
    new: int


def needs(folder: Path, recipe: Recipe, dtype: torch.dtype | None = None) -> Needs:
    """Plan `recipe` on a model without weights.

    Args:
        folder: of the dense model.
        dtype: that it will be loaded in; None takes its own.

    Raises:
        SurgeryError, DonorError, RecipeError: the plan is impossible for this model.
    """
    config = AutoConfig.from_pretrained(folder)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        model = hub.model_class(folder)._from_config(config, dtype=dtype)
    layers = (build_layer(model, item, device="meta") for item in plan(model, recipe))
    return Needs(base=cost.bytes_of(model), new=sum(cost.bytes_of(layer) for layer in layers))
