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
    """Part, permute, redraw and disturb the neurons of every expert, as `differ` says.

    What is drawn anew has the mean and the deviation of what it replaces in each matrix. All comes
    from torch's global random state, so that every expert of every layer draws other numbers.
    """
    if differ.pairs is not None:
        _part_pairs(bank.down, differ.pairs)
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


def _part_pairs(down_EOF: Tensor, pairs: int) -> None:
    """Move the experts 2 i and 2 i + 1 apart by +d and -d in every number of their second matrix; a
    last one without a partner stays.

    d is a power of two: a whole multiple of what the type can tell apart near the number. Where
    |w| + d would reach the next power of two, numbers lie twice as far apart, and d is 0.
    """
    for low_OF, high_OF in zip(down_EOF[:-1:2], down_EOF[1::2], strict=True):
        fraction, exponent = torch.frexp(low_OF.float())  # |w| = fraction 2^exponent, in [1/2, 1)
        step_OF = torch.ldexp(torch.full_like(fraction, 0.5**pairs), exponent - 1)
        step_OF = torch.where(fraction.abs() + 0.5 ** (pairs + 1) < 1, step_OF, 0.0)
        step_OF = torch.where(fraction != 0, step_OF, 0.0)
        step_OF *= torch.randint(0, 2, step_OF.shape, device=step_OF.device) * 2 - 1
        low_OF.sub_(step_OF.to(low_OF.dtype))
        high_OF.add_(step_OF.to(high_OF.dtype))


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
