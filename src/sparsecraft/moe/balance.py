"""Switch's balance loss of many layers at once: of one layer, its few numbers cost a score of
launches, which is more than its router.

Shapes: L layers alike, T tokens, K slots per token, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsecraft.moe.routing import Routing


def switch_of_layers(
    routings: Sequence[Routing], masks: Sequence[Tensor | None], normalize_by_topk: bool
) -> list[Tensor]:
    """`losses.switch_balance` of each routing; those of one shape are computed together.

    Args:
        masks: True on the real tokens of each.
    """
    counted = [routing.counted(mask_T) for routing, mask_T in zip(routings, masks, strict=True)]
    alike: dict[tuple, list[int]] = defaultdict(list)
    for number, (routing, counted_T) in enumerate(zip(routings, counted, strict=True)):
        shapes = routing.logits_TE.shape, routing.chosen_TK.shape, routing.logits_TE.device
        alike[*shapes, routing.soft, counted_T is None].append(number)
    values: dict[int, Tensor] = {}
    for numbers in alike.values():
        here = [routings[n] for n in numbers]
        counted_LT = None if counted[numbers[0]] is None else torch.stack(_of(counted, numbers))
        values |= zip(numbers, _switch(here, counted_LT, normalize_by_topk), strict=True)
    return [values[number] for number in range(len(routings))]


def _switch(
    routings: Sequence[Routing], counted_LT: Tensor | None, normalize_by_topk: bool
) -> Sequence[Tensor]:
    logits_LTE = torch.stack([routing.logits_TE for routing in routings]).float()
    E = logits_LTE.shape[-1]
    probs_LE = _mean(logits_LTE.softmax(-1), counted_LT)
    chosen_LTK = torch.stack([routing.chosen_TK for routing in routings])
    if routings[0].soft:
        received_LTE = torch.stack([r.weights_TE().detach().float() for r in routings])
    else:
        received_LTE = logits_LTE.new_zeros(*logits_LTE.shape[:-1], E + 1)  # last: no expert
        ones_LTK = torch.ones_like(chosen_LTK, dtype=torch.float32)
        received_LTE = received_LTE.scatter_add(-1, chosen_LTK, ones_LTK)[..., :E]
    if counted_LT is not None:
        received_LTE = received_LTE * counted_LT[..., None]
    amounts_LE = received_LTE.sum(1)
    tiny = torch.finfo(amounts_LE.dtype).tiny
    load_LE = amounts_LE / amounts_LE.sum(-1, keepdim=True).clamp_min(tiny)
    loss_L = E * (load_LE * probs_LE).sum(-1)
    if not normalize_by_topk:
        filled_LT = (chosen_LTK < E).sum(-1, dtype=torch.float32)
        loss_L = loss_L * _mean(filled_LT, counted_LT)
    return loss_L.unbind()


def _mean(values_LT: Tensor, counted_LT: Tensor | None) -> Tensor:
    """The mean of (L, T) or (L, T, E) over the counted tokens; zero where there are none."""
    if counted_LT is None:
        return values_LT.mean(1)
    counted = counted_LT if values_LT.ndim == 2 else counted_LT[..., None]
    return values_LT.where(counted, 0.0).sum(1) / counted.sum(1).clamp_min(1)


def _of(found: Sequence[Tensor], numbers: Sequence[int]) -> list[Tensor]:
    return [found[number] for number in numbers]
