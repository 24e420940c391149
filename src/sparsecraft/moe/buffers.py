"""Buffers that are in no file: a model computes them anew from its configuration."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HALVES = (torch.bfloat16, torch.float16)


def unsaved(model: nn.Module) -> dict[str, Tensor]:
    """Name -> buffer, of those that are in no file."""
    return {
        f"{path}.{name}".removeprefix("."): module._buffers[name]
        for path, module in model.named_modules()
        for name in sorted(module._non_persistent_buffers_set)
        if module._buffers.get(name) is not None
    }


def alike(model: nn.Module, other: nn.Module) -> tuple[dict[Tensor, Tensor], list[str]]:
    """Compare the buffers of two models that are in no file, where name and shape are the same.

    Frequencies that grow with a sequence are what they were at first.

    Returns:
        buffer of `other` -> that of `model`, which a cast may have rounded; the names of those that
        are other ones.
    """
    ours, rounded, differ = unsaved(model), {}, []
    for name, theirs in unsaved(other).items():
        own = ours.get(name)
        if own is None or own.is_meta or own.shape != theirs.shape:
            continue
        first = name.replace("inv_freq", "original_inv_freq")
        if near(own, theirs):
            rounded[theirs] = own.to(theirs.device)
        elif first == name or first not in ours:
            differ.append(name)
    return rounded, differ


def near(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two buffers are one, but for the rounding of the coarser type, or of one that ours
    went through (`model.bfloat16().float()`)."""
    theirs = theirs.to(ours.device)
    if ours.shape != theirs.shape:
        return False
    if not (ours.is_floating_point() and theirs.is_floating_point()):
        return torch.equal(ours, theirs)
    if any(torch.equal(ours, theirs.to(half).to(ours.dtype)) for half in HALVES):
        return True
    coarser = max(torch.finfo(ours.dtype), torch.finfo(theirs.dtype), key=lambda info: info.eps)
    near = {"rtol": 4 * coarser.eps, "atol": coarser.smallest_normal * coarser.eps}
    return torch.allclose(ours.double(), theirs.double(), **near, equal_nan=True)
