"""exchange_routers(): the routers that a stage puts in the place of those there are."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from sparsecraft.errors import RecipeError
from sparsecraft.recipe.edits import Edit
from sparsecraft.recipe.stages import Stage
from sparsecraft.surgery.build import new_router
from sparsecraft.surgery.plan import PlannedEdit
from sparsecraft.surgery.record import check_stands, conversion_of
from sparsecraft.surgery.rollback import atomic
from sparsecraft.surgery.trainable import set_trainable


@atomic
def exchange_routers(model: nn.Module, stage: Stage, seed: int = 0) -> None:
    """Put a stage's router into every layer that routes whole experts, in place and for good; the
    experts and all else stay what they are.

    The model's recipe is then that of such a model, without the stages before: it is saved, loaded,
    extended and exported as if it had been converted so. `sc.train` does this when the stage
    begins; a loop of your own calls it with `model.sparsecraft.recipe.stages[n]`.

    Args:
        seed: of the new routers' weights.

    Raises:
        SurgeryError: the model is dense, or a layer is no longer where it was installed.
        RecipeError: the stage puts in no router, or it does not fit.
    """
    record = conversion_of(model)
    check_stands(model)
    if stage.router is None:
        raise RecipeError(f"Stage {stage.name!r} puts in no router; it trains those there are.")
    recipe = record.recipe.with_router_of(stage)
    new = dict(zip(record.recipe.edits, recipe.edits, strict=True))
    record.plan = [_planned(item, new[item.source]) for item in record.plan]
    record.recipe = recipe
    cuda = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=list(cuda)):
        torch.manual_seed(seed)
        for item, layer in zip(record.plan, record.layers, strict=True):
            if layer.router is not None and not layer.router.spec.splits:
                layer.router = new_router(model, item, layer)
    record.own_loss.meet_routers(model)
    set_trainable(model, stage.trains)


def _planned(item: PlannedEdit, source: Edit) -> PlannedEdit:
    """What is planned at a site, whose edit the recipe has otherwise now."""
    if source == item.source:
        return item
    edit = replace(item.edit, router=source.router)
    return replace(item, edit=edit, source=source, previous=None)
