"""What a conversion will need, known from the configuration alone, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sparsecraft.checkpoint.rebuild import memory_to_rebuild
from sparsecraft.checkpoint.wide import widened
from sparsecraft.dense.loading import skeleton
from sparsecraft.dense.memory import main_memory
from sparsecraft.dense.probes import PROBE_SHAPE
from sparsecraft.dense.quantization import bytes_packed, packing_in
from sparsecraft.evaluation.certificate import DATA_LENGTH, MAX_DATA_PROBES
from sparsecraft.moe import cost
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.surgery.build import build_layer
from sparsecraft.surgery.plan import plan


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of the dense model, of what a recipe adds to it, of the certificate's logits, and of
    the model that a save builds again from the folder, to compare."""

    base: int
    new: int
    probes: int
    again: int = 0

    @property
    def memory(self) -> int:
        """The most bytes at a time."""
        return self.base + self.new + max(self.probes, self.again)


def needs(
    folder: Path, recipe: Recipe, dtype: torch.dtype | None = None, data: bool = False
) -> Needs:
    """Plan `recipe` on a model without weights.

    Args:
        folder: of the dense model.
        dtype: that it will be loaded in; None takes its own.
        data: whether the user's rows enter the certificate.

    Raises:
        SurgeryError, DonorError, RecipeError: the plan is impossible for this model.
    """
    model = skeleton(folder, dtype)
    config, dtype = model.config, model.dtype
    layers = [build_layer(model, item, device="meta") for item in plan(model, recipe)]
    tokens = PROBE_SHAPE[0] * (PROBE_SHAPE[1] + (MAX_DATA_PROBES * DATA_LENGTH if data else 0))
    width = getattr(config.get_text_config(), "vocab_size", None) or config.hidden_size
    packing = packing_in(folder, recipe.quantization)
    base = bytes_packed(model, packing)
    new = sum(cost.bytes_of(layer) for layer in layers)
    wide = 0 if packing else widened(model) + sum(widened(layer) for layer in layers)
    return Needs(
        base=base,
        new=new,
        probes=2 * tokens * width * dtype.itemsize,  # before and after
        again=memory_to_rebuild(base + new, main_memory() - base - new, wide),
    )
