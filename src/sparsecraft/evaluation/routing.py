"""Summaries of routing: how even the load is, and how far experts follow domains. E experts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsecraft.moe.routing import Routing

DEAD, OVERLOADED = 0.01, 3.0  # of an equal share of the slots


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


def ordered_choices(routing: Routing) -> tuple[Tensor, Tensor]:
    """The experts of largest and second largest weight of every token, (T,) each, as
    `first_choices_E` counts them; E where a token has none."""
    E = routing.num_experts
    if routing.in_order:
        left_TE = _weights(routing)
        experts_TE = torch.arange(E, device=left_TE.device).expand_as(left_TE)
    else:
        experts_TE = routing.indices_TK
        left_TE = routing.weights_TK.masked_fill(experts_TE >= E, -torch.inf)
    found = []
    for _ in range(2):
        scores_TE = _among_equals(routing, left_TE) if routing.in_order else left_TE
        best_T1 = scores_TE.argmax(-1, keepdim=True)
        none_T1 = left_TE.gather(-1, best_T1) == -torch.inf
        found.append(experts_TE.gather(-1, best_T1).masked_fill(none_T1, E).squeeze(-1))
        left_TE = left_TE.scatter(-1, best_T1, -torch.inf)
    return found[0], found[1]


def _choices(routing: Routing) -> Tensor:
    """Weights (T, E) in which no two experts of a token are equally good, unless in score too."""
    return _among_equals(routing, _weights(routing))


def _weights(routing: Routing) -> Tensor:
    """Weights (T, E) of what was chosen, minus infinity for the rest."""
    chosen_TE = routing.indices_TK < routing.num_experts
    weights_TE = routing.weights_TK.masked_fill(~chosen_TE, -torch.inf)
    always_E = chosen_TE.all(0)
    if not always_E.all():  # parts are left out: this network is split, and weights say little
        weights_TE = weights_TE.masked_fill(always_E, -torch.inf)
    return weights_TE


def _among_equals(routing: Routing, weights_TE: Tensor) -> Tensor:
    """The scores of a token's experts of largest weight, minus infinity for the others."""
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
