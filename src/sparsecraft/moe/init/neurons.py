"""Random neurons in copied experts, so that they differ from the first step.

Shapes: F neurons of an expert, n of them chosen, D width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsecraft.recipe.experts import Difference

if TYPE_CHECKING:
    from sparsecraft.moe.experts.ffn import FFNExperts


@torch.no_grad()
def diversify(bank: FFNExperts, differ: Difference) -> None:
    """Permute, redraw and disturb the neurons of every expert, as `differ` says.

    What is drawn anew has the mean and the deviation of what it replaces in each matrix. All comes
    from torch's global random state, so that every expert of every layer draws other numbers.
    """
    if not (differ.permute or differ.redraw or differ.noise_std):
        return
    for e in range(bank.num_experts):
        matrices = bank.neurons(e)
        count, device = len(matrices[0][0]), matrices[0][0].device
        if differ.permute:
            order_F = torch.randperm(count, device=device)
            for tensor in _all(matrices):
                tensor.copy_(tensor[order_F])
        chosen_n = _some(count, differ.redraw, device)
        for weight_FD, bias_F in matrices:
            if differ.redraw_apart:
                chosen_n = _some(count, differ.redraw, device)
            for tensor in _all([(weight_FD, bias_F)]):
                _redraw(tensor, chosen_n)
            if differ.noise_std:
                noisy_n = _some(count, differ.noise_share, device)
                for tensor in _all([(weight_FD, bias_F)]):
                    noise = torch.randn_like(tensor[noisy_n])
                    tensor[noisy_n] += differ.noise_std * noise


def _all(matrices: list[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    return [tensor for pair in matrices for tensor in pair if tensor is not None]


def _some(count: int, share: float, device: torch.device) -> Tensor:
    """floor(share * count) of `count` neurons; the rounding lets 0.29 of 100 be 29."""
    return torch.randperm(count, device=device)[: math.floor(round(share * count, 6))]


def _redraw(tensor: Tensor, chosen_n: Tensor) -> None:
    """Rows from the normal distribution of what stands in them."""
    if len(chosen_n):
        old = tensor[chosen_n].float()
        mean, deviation = old.mean(), old.std(correction=0)
        tensor[chosen_n] = (mean + deviation * torch.randn_like(old)).to(tensor.dtype)
