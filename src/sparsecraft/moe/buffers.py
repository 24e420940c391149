"""Buffers that are in no file: a model computes them anew from its configuration."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def unsaved(model: nn.Module) -> dict[str, Tensor]:
    """Name -> buffer, of those that are in no file."""
    return {
        f"{path}.{name}".removeprefix("."): module._buffers[name]
        for path, module in model.named_modules()
        for name in sorted(module._non_persistent_buffers_set)
        if module._buffers.get(name) is not None
    }


def near(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two buffers are one, but for the rounding of the coarser type."""
    theirs = theirs.to(ours.device)
    if ours.shape != theirs.shape:
        return False
    if not (ours.is_floating_point() and theirs.is_floating_point()):
        return torch.equal(ours, theirs)
    coarser = max(torch.finfo(ours.dtype), torch.finfo(theirs.dtype), key=lambda info: info.eps)
    near = {"rtol": 4 * coarser.eps, "atol": coarser.smallest_normal * coarser.eps}
    return torch.allclose(ours.double(), theirs.double(), **near, equal_nan=True)
