"""Selectors: logits_TE -> weights_TK, indices_TK. T tokens, E experts, K slots."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(logits_TE: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """The k largest logits, weighted by their softmax.

    Args:
        renormalize: softmax over the k kept (PESC Eq. 9, Mixtral); otherwise their share of the
            softmax over all experts (Switch, sparse upcycling), which sums to less than one.
    """
    top_TK, indices_TK = logits_TE.topk(k, dim=-1)
    if renormalize:
        return top_TK.softmax(-1), indices_TK
    return logits_TE.softmax(-1).gather(-1, indices_TK), indices_TK


def soft(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Every expert, weighted by the softmax (MoV and MoLORA Eq. 1)."""
    weights_TE = logits_TE.softmax(-1)
    indices_E = torch.arange(logits_TE.shape[-1], device=logits_TE.device)
    return weights_TE, indices_E.expand_as(weights_TE)
