"""Selectors: logits_TE -> weights_TK, indices_TK. T tokens, E experts, K slots."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsecraft.kernels import few
from sparsecraft.kernels.device import as_sums

Selector = Callable[[Tensor], tuple[Tensor, Tensor]]


def top_k(
    logits_TE: Tensor, k: int, renormalize: bool, balance: Callable | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest logits, weighted by their softmax.

    Args:
        renormalize: softmax over the k kept (PESC Eq. 9, Mixtral); otherwise their share of the
            softmax over all experts (Switch, sparse upcycling), which sums to less than one.
        balance: the softmax over all experts -> what they are chosen by; None for the logits.
    """
    if balance is None and few.picks(logits_TE):
        return few.top_k(logits_TE, k, renormalize)
    if balance is None:
        top_TK, indices_TK = logits_TE.topk(k, dim=-1)
    else:
        indices_TK = balance(logits_TE.detach().softmax(-1)).topk(k, dim=-1).indices
        top_TK = logits_TE.gather(-1, indices_TK)
    if renormalize:
        return top_TK.softmax(-1), indices_TK
    return logits_TE.softmax(-1).gather(-1, indices_TK), indices_TK


def soft(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Every expert, weighted by the softmax (MoV and MoLORA Eq. 1)."""
    if as_sums(logits_TE):
        # exp(l_e) / sum_j exp(l_j), without a step for the maximum.
        weights_TE = (logits_TE.unsqueeze(-2) - logits_TE.unsqueeze(-1)).exp().sum(-1).reciprocal()
    else:
        weights_TE = logits_TE.softmax(-1)
    return weights_TE, _count(logits_TE).expand_as(weights_TE)


def relu(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Every expert whose logit is positive, weighted by it (ReMoE)."""
    weights_TE = logits_TE.relu()
    E = logits_TE.shape[-1]
    return weights_TE, _count(logits_TE).where(weights_TE > 0, E)


class Sample(nn.Module):
    """BTX's Sample Top-1: the best of softmax((logits + Gumbel noise) / tau), weighted by it, in
    training; the best expert with weight one at inference, where nothing is drawn.

    Attributes:
        step: training steps so far, which the trainer sets: tau = max(0.5, exp(-1e-4 step)).
    """

    RATE, FLOOR = 1e-4, 0.5

    def __init__(self):
        super().__init__()
        self.step = 0

    def forward(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training:
            best_T1 = logits_TE.argmax(-1, keepdim=True)
            return torch.ones_like(best_T1, dtype=logits_TE.dtype), best_T1
        gumbel_TE = -torch.empty_like(logits_TE).exponential_().log()
        return ((logits_TE + gumbel_TE) / self.temperature).softmax(-1).max(-1, keepdim=True)

    @property
    def temperature(self) -> float:
        # The paper prints max(0.5, -r t); this is Jang et al.'s annealing, which it refers to.
        return max(self.FLOOR, math.exp(-self.RATE * self.step))


def _count(logits_TE: Tensor) -> Tensor:
    """0, 1, ..., E-1: made once for each device, because a launch counts at decoding."""
    E, device = logits_TE.shape[-1], logits_TE.device
    # Only what outlives this call may be kept: not a compiler's stand-in or a CUDA graph's memory.
    if type(logits_TE) is not Tensor or torch.compiler.is_compiling():
        return torch.arange(E, device=device)
    if (E, device) not in _COUNTS:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return torch.arange(E, device=device)
        with torch.inference_mode(False):
            _COUNTS[E, device] = torch.arange(E, device=device)
    return _COUNTS[E, device]


_COUNTS: dict[tuple[int, torch.device], Tensor] = {}
