"""Summaries of routing: how even the load is, and how far experts follow domains. E experts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsecraft.moe.routing import Routing


def first_choices_E(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """How many tokens chose each expert first, float64 on the CPU.

    That is the expert of largest weight; among equals, as the parts of a split network are, the one
    of highest score. What every token has there (its shared experts) is not chosen.

    Args:
        mask_T: True on the tokens that count.
    """
    weights_TK = _choices(routing) if routing.in_order else routing.weights_TK
    best_TK = weights_TK.argmax(-1, keepdim=True)
    first_T = routing.indices_TK.gather(-1, best_TK).squeeze(-1)
    counted_T = routing.counted(mask_T)
    if counted_T is not None:
        first_T = first_T[counted_T]
    return torch.bincount(first_T, minlength=routing.num_experts + 1)[:-1].double().cpu()


def _choices(routing: Routing) -> Tensor:
    """Weights (T, E) in which no two experts of a token are equally good, unless in score too."""
    chosen_TE = routing.indices_TK < routing.num_experts
    weights_TE = routing.weights_TK.masked_fill(~chosen_TE, -torch.inf)
    always_E = chosen_TE.all(0)
    if not always_E.all():  # parts are left out: this network is split, and weights say little
        weights_TE = weights_TE.masked_fill(always_E, -torch.inf)
    equal_TE = weights_TE == weights_TE.amax(-1, keepdim=True)
    return routing.logits_TE.float().masked_fill(~equal_TE, -torch.inf)


def load_entropy(counts_E: Tensor) -> float:
    """Entropy of the load divided by log E: 1 is even, 0 is one expert for all.

    A single expert's load is even: 1.
    """
    if len(counts_E) == 1:
        return 1.0
    share_E = counts_E.double() / counts_E.sum().clamp_min(1)
    return (torch.special.entr(share_E).sum() / math.log(len(share_E))).item()


def mutual_information(counts_DE: Tensor) -> float:
    """I(expert; domain) in bits, domains equally likely; at most log2 of their number.

    Args:
        counts_DE: tokens of each domain (row) that each expert (column) received. A random
            router is not at zero either: report it beside.
    """
    given_DE = counts_DE.double() / counts_DE.sum(-1, keepdim=True).clamp_min(1)
    mean_E = given_DE.mean(0)
    entropy = torch.special.entr(mean_E).sum() - torch.special.entr(given_DE).sum(-1).mean()
    return (entropy / math.log(2)).clamp_min(0).item()
