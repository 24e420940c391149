"""remove(): take an expert out of a trained mixture."""

from __future__ import annotations

import torch
from torch import nn

from sparsecraft.conversion.extension.checks import count_experts
from sparsecraft.conversion.extension.extend import note, recount, recounted
from sparsecraft.errors import RecipeError
from sparsecraft.surgery.identity import stands_nowhere
from sparsecraft.surgery.record import check_stands, conversion_of
from sparsecraft.surgery.rollback import atomic


@atomic
@torch.no_grad()
def remove(model: nn.Module, expert: int) -> None:
    """Take one expert out of every layer, in place; nothing else changes.

    The logits of the others keep their bits where routers are of domains, or where the expert was
    added by `extend`; otherwise they are the same but for rounding.

    Args:
        expert: its number, from 0, in every layer.

    Raises:
        SurgeryError, RecipeError: the model is dense, its experts are no whole networks, there is
            no such expert, or each token takes as many as there are.
    """
    record = conversion_of(model)
    count = count_experts(record.recipe)
    if not 0 <= expert < min(count):
        every = "every layer of this model" if len(count) > 1 else "this model"
        raise RecipeError(f"There is no expert {expert}; {every} has 0 to {min(count) - 1}.")
    for edit in record.recipe.layers:
        have, least = edit.experts.num_experts, edit.router.slots or 1
        if have <= least:
            raise RecipeError(
                f"Expert {expert} of {have} cannot be removed: each token takes {least}. Convert "
                "again with fewer, or keep it."
            )
    check_stands(model)
    recounted(record, more=-1)
    for layer in record.layers:
        layer.experts.remove(expert)
        layer.router.remove(expert)
    recount(record)
    record.own_loss.meet_routers(model)
    stands_nowhere(model)
    note(record, {"removed": expert})
