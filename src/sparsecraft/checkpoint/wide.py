"""What models compute in float32, whatever their type is, where memory allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.dense.memory import free_memory, gigabytes
from sparsecraft.moe.lending import FLOATS, Lender
from sparsecraft.moe.names import unique_tensors
from sparsecraft.moe.outputs import outputs


def wide_outputs(
    model: nn.Module,
    probes: Sequence[dict[str, Any]],
    dtype: torch.dtype | None,
    values: Mapping[Tensor, Tensor] | None = None,
) -> list[Tensor]:
    """What a model gives for the probes, computed in `dtype`, or in its own type for None.

    Args:
        values: tensor of the model -> what to compute with in its place.
    """
    sources = {id(tensor): lambda v=value: v for tensor, value in (values or {}).items()}
    with Lender(sources).lent(model, dtype):
        return outputs(model, probes)


def wide_type(*models: nn.Module) -> tuple[torch.dtype | None, str]:
    """The type of at least 32 bits in which models can be compared, one after the other; None and
    the reason, if they cannot."""
    dtype = Lender().wide_type(*models)
    if dtype is None:
        return None, "weights are quantized or offloaded"
    for model in models:
        size = widened(model, dtype)
        if size > free_memory(model.device):
            return None, f"a copy in float32 takes {gigabytes(size)} of memory"
    return dtype, ""


def widened(model: nn.Module, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of a model's floats in `dtype`, of those that are of another type."""
    tensors = (t for t in unique_tensors(model).values() if t.dtype in FLOATS)
    return sum(t.numel() * dtype.itemsize for t in tensors if t.dtype != dtype)
