"""Stacked tensors of a bank: copies of one expert, one more, one less."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def with_one_more(bank: Tensor, expert: Tensor) -> nn.Parameter:
    """The stacked tensors of a bank and behind them one expert's, on the bank's device."""
    longer = torch.cat([bank.detach(), expert.detach()[None].to(bank)])
    return nn.Parameter(longer, bank.requires_grad)


def without(bank: Tensor, e: int) -> nn.Parameter:
    """The stacked tensors of a bank but expert `e`'s."""
    shorter = torch.cat([bank.detach()[:e], bank.detach()[e + 1 :]])
    return nn.Parameter(shorter, bank.requires_grad)


def copies(tensor: Tensor, count: int) -> nn.Parameter:
    """`count` copies of one tensor, each with memory of its own.

    They are contiguous, whatever the tensor is: a GEMM on GPT-2's transposed weights rounds
    differently.
    """
    return nn.Parameter(tensor.detach().repeat(count, *[1] * tensor.ndim))
