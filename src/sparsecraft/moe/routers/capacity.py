"""How many tokens an expert takes at most, in training.

Shapes: T tokens, K slots per token, E experts, N = T K slots.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsecraft.moe.routing import Routing
from sparsecraft.recipe.balancing import Capacity


def room(capacity: Capacity, slots: Tensor | float, shares_E: Tensor) -> Tensor:
    """ceil(factor * slots * share) for each expert, (E,): slots are all that are to be filled, and
    shares the parts of them that experts are meant to have, 1 / E where they are alike, float64."""
    # A hair less, so that rounding of what comes out whole makes no room for one more.
    return (capacity.factor * slots * shares_E * (1 - 1e-9)).ceil()


@torch.no_grad()
def kept(routing: Routing, capacity: Capacity, shares_E: Tensor, mask_T: Tensor | None) -> Tensor:
    """Which slots find room, (T, K) bool. Tokens that do not count, such as padding, take none, and
    keep what they have.

    Args:
        mask_T: True on real tokens.
    """
    indices_TK, E = routing.indices_TK, routing.num_experts
    counted_T = routing.counted(mask_T)
    rows = len(indices_TK) if counted_T is None else counted_T.sum()
    asked_TK = indices_TK if counted_T is None else indices_TK.where(counted_T[:, None], E)
    order_N = torch.arange(asked_TK.numel(), device=asked_TK.device)
    if capacity.kind == "best":
        order_N = routing.weights_TK.flatten().argsort(descending=True, stable=True)
    # By expert, and by their order among those of one: the last ones are of no expert, and stay.
    expert_N, by_expert_N = asked_TK.flatten()[order_N].sort(stable=True)
    counts_E1 = expert_N.new_zeros(E + 1).scatter_add_(0, expert_N, torch.ones_like(expert_N))
    place_N = torch.arange(len(expert_N), device=expert_N.device)
    place_N = place_N - (counts_E1.cumsum(0) - counts_E1)[expert_N]
    room_E = room(capacity, rows * indices_TK.shape[1], shares_E)
    fits_N = place_N < F.pad(room_E, (0, 1), value=torch.inf)[expert_N]
    kept_N = torch.empty_like(fits_N).scatter_(0, order_N[by_expert_N], fits_N)
    return kept_N.reshape(indices_TK.shape)


def limited(
    routing: Routing,
    capacity: Capacity,
    mask_T: Tensor | None = None,
    *,
    passes: bool = False,
) -> Routing:
    """The routing without the slots that find no room.

    Args:
        passes: where experts change a token, one that found no room passes as it is, because the
            weights are taken for ones that sum to one still.
    """
    E, shares_E = routing.num_experts, routing.load_to_have_E()
    kept_TK = kept(routing, capacity, shares_E, mask_T)
    return replace(
        routing,
        weights_TK=routing.weights_TK * kept_TK,
        indices_TK=routing.indices_TK.where(kept_TK, E),
        wanted_TK=routing.indices_TK,
        sums_to_one=routing.sums_to_one and passes,
        soft=False,
        empty=True,
    )
