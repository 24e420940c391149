"""Soft MoE's slots (Puigcerver et al. 2024), as Omni-SMoLA mixes low-rank experts in an encoder.

Every expert works on one slot, a weighted mean of a sequence's tokens, and every token gets back a
weighted mean of the slots. Shapes: B sequences, S positions, E experts (one slot each), I input
features, O output features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecraft.moe.experts.base import Experts
from sparsecraft.moe.routing import Routing


def slots(
    bank: Experts,
    x_BSI: Tensor,
    routing: Routing,
    mixed_BS: Tensor | None,
    causal: bool,
) -> Tensor:
    """Dispatch the mixed tokens to slots, apply the experts, combine; other tokens one by one.

    Args:
        routing: of every token; its logits are dispatched by a softmax over tokens, its weights
            (their softmax over experts) combine.
        mixed_BS: the tokens that may be mixed; None means all, or none in a causal model, where
            only a prefix that is given in full may be.

    Returns:
        (B, S, O).
    """
    B, S, _ = x_BSI.shape
    alone_BSO = None
    if causal:
        alone_BSO = bank(x_BSI.flatten(0, 1), routing).unflatten(0, (B, S))
        if mixed_BS is None:
            return alone_BSO
    if mixed_BS is None:
        mixed_BS = x_BSI.new_ones(B, S, dtype=torch.bool)
    logits_BSE = routing.logits_TE.unflatten(0, (B, S))
    floor = torch.finfo(logits_BSE.dtype).min
    dispatch_BSE = logits_BSE.masked_fill(~mixed_BS[..., None], floor).softmax(1)
    slots_BEI = torch.einsum("bse,bsi->bei", dispatch_BSE.to(x_BSI.dtype), x_BSI)
    combine_BSE = routing.weights_TK.unflatten(0, (B, S)).to(x_BSI.dtype)
    y_BSO = torch.einsum("bse,beo->bso", combine_BSE, _each_its_own(bank, slots_BEI))
    if alone_BSO is None:
        return y_BSO
    return torch.where(mixed_BS[..., None], y_BSO, alone_BSO)


def _each_its_own(bank: Experts, slots_BEI: Tensor) -> Tensor:
    """Expert e on slot e of every sequence, (B, E, O)."""
    rows = [bank.expert(e, slots_BEI[:, e]) for e in range(slots_BEI.shape[1])]
    return torch.stack(rows, dim=1)
