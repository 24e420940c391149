"""Balance losses of many layers at once: of one layer, its few numbers cost a score of launches,
which is more than its router.

Shapes: L layers alike, T tokens, K slots per token, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsecraft.moe.routing import Routing


def of_layers(
    name: str, routings: Sequence[Routing], masks: Sequence[Tensor | None]
) -> list[Tensor]:
    """`losses.LOSSES[name]` of each routing; those that are alike are computed together.

    Args:
        name: one of `TOGETHER`.
        masks: True on the real tokens of each.
    """
    counted = [routing.counted(mask_T) for routing, mask_T in zip(routings, masks, strict=True)]
    alike: dict[tuple, list[int]] = defaultdict(list)
    for number, (routing, counted_T) in enumerate(zip(routings, counted, strict=True)):
        shapes = routing.logits_TE.shape, routing.chosen_TK.shape, routing.logits_TE.device
        kind = routing.soft, routing.target_load, routing.free, routing.of_free is None
        alike[*shapes, *kind, counted_T is None].append(number)
    values: dict[int, Tensor] = {}
    for numbers in alike.values():
        masks_LT = [counted[n] for n in numbers]
        layers = _Alike([routings[n] for n in numbers], None if masks_LT[0] is None else masks_LT)
        values |= zip(numbers, TOGETHER[name](layers).unbind(), strict=True)
    return [values[number] for number in range(len(routings))]


class _Alike:
    """Layers whose routings have one shape.

    Args:
        counted: which tokens of each count; None for all.
    """

    def __init__(self, routings: Sequence[Routing], counted: Sequence[Tensor] | None):
        self.routings, self.first = routings, routings[0]
        self.E = self.first.num_experts
        self.logits_LTE = torch.stack([routing.logits_TE for routing in routings]).float()
        self.chosen_LTK = torch.stack([routing.chosen_TK for routing in routings])
        self.counted_LT = None if counted is None else torch.stack(counted)

    def mean(self, values_LT: Tensor) -> Tensor:
        """The mean of (L, T) or (L, T, E) over the counted tokens; zero where there are none."""
        if self.counted_LT is None:
            return values_LT.mean(1)
        counted = self.counted_LT if values_LT.ndim == 2 else self.counted_LT[..., None]
        return values_LT.where(counted, 0.0).sum(1) / counted.sum(1).clamp_min(1)

    def load_LE(self) -> Tensor:
        """`Routing.load_E` of each."""
        if self.first.soft:
            received_LTE = torch.stack([r.weights_TE().detach().float() for r in self.routings])
        else:
            shape = *self.logits_LTE.shape[:-1], self.E + 1  # the last column: no expert
            ones_LTK = torch.ones_like(self.chosen_LTK, dtype=torch.float32)
            received_LTE = self.logits_LTE.new_zeros(shape)
            received_LTE = received_LTE.scatter_add(-1, self.chosen_LTK, ones_LTK)[..., :-1]
        if self.counted_LT is not None:
            received_LTE = received_LTE * self.counted_LT[..., None]
        amounts_LE = received_LTE.sum(1)
        tiny = torch.finfo(amounts_LE.dtype).tiny
        return amounts_LE / amounts_LE.sum(-1, keepdim=True).clamp_min(tiny)

    def filled_L(self) -> Tensor:
        """Mean number of slots of a token that have an expert."""
        return self.mean((self.chosen_LTK < self.E).sum(-1, dtype=torch.float32))

    def in_use_LE(self) -> Tensor | None:
        """`Routing.in_use_E` of each."""
        if self.first.of_free is None:
            return None
        of_free_L1 = torch.stack([routing.of_free for routing in self.routings])[:, None]
        held_E = torch.arange(self.E, device=of_free_L1.device) >= self.E - self.first.free
        return torch.where(held_E, of_free_L1, 1.0)


def _switch(layers: _Alike) -> Tensor:
    probs_LE = layers.mean(layers.logits_LTE.softmax(-1))
    return layers.E * (layers.load_LE() * probs_LE).sum(-1)


def _switch_unnormalized(layers: _Alike) -> Tensor:
    return _switch(layers) * layers.filled_L()


def _heterogeneous(layers: _Alike) -> Tensor:
    logits_LTE, in_use_LE = layers.logits_LTE, layers.in_use_LE()
    if in_use_LE is not None:
        logits_LTE = logits_LTE + in_use_LE.log()[:, None]
    probs_LE = layers.mean(logits_LTE.softmax(-1))
    fractions_LE = layers.load_LE() * layers.filled_L()[:, None]
    load = layers.first.target_load or (1.0,) * layers.E
    eta_E = probs_LE.new_tensor([load[0] / share for share in load])
    return (eta_E * fractions_LE * probs_LE).sum(-1)


TOGETHER: dict[str, Callable[[_Alike], Tensor]] = {
    "switch": _switch,
    "switch_unnormalized": _switch_unnormalized,
    "heterogeneous": _heterogeneous,
}
