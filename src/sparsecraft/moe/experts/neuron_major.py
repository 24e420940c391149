"""Weights of a network by its neurons: the rows of each expert in one piece.

Shapes: E experts, m neurons of each, F = E m neurons, G = 2 parts of the first matrix where it has
a gate, else 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def owned(tensor: Tensor | None, meta: bool) -> nn.Parameter | None:
    """A copy as a parameter, or its shape alone."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    return nn.Parameter(
        tensor.to("meta") if meta else tensor.clone(memory_format=torch.contiguous_format)
    )


def by_expert(rows: Tensor, num_experts: int) -> Tensor:
    """(G, F, ...) -> (E, G m, ...): each expert gets its piece of every part."""
    return rows.unflatten(1, (num_experts, -1)).transpose(0, 1).flatten(1, 2).contiguous()


def by_part(stacked: Tensor, parts: int) -> Tensor:
    """(E, G m, ...) -> (G, F, ...)."""
    return stacked.unflatten(1, (parts, -1)).transpose(0, 1).flatten(1, 2)
