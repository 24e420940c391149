"""Tensors that are made again in the backward pass, where it would keep them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sparsecraft.kernels.device import is_followed, version


def made_again(
    make: Callable[[], tuple[Tensor, ...]], use: Callable[..., Tensor], sources: Sequence[Tensor]
) -> Tensor:
    """use(*make()), of which the backward pass keeps none of what `make` gives.

    Unlike `torch.utils.checkpoint` it computes nothing again but these tensors. All others are
    kept as they would be without it: hooks around it, such as a checkpoint's, are given them.

    Args:
        make: gives the same values each time.
        sources: what it reads. As for what torch keeps, to change them before the backward pass is
            an error.
    """
    tensors = make()
    if not torch.is_grad_enabled() or is_followed(*tensors):
        return use(*tensors)
    # Of nested hooks torch calls the innermost alone. Without any, a node would hold its output.
    outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
    give, take = outer or (Tensor.detach, lambda kept: kept)
    numbers = {_memory(tensor): number for number, tensor in enumerate(tensors)}
    versions = [version(source) for source in sources]
    again: dict[int, Tensor] = {}  # made with another, and not asked for yet

    def pack(tensor: Tensor) -> tuple:
        number = numbers.get(_memory(tensor))
        if number is None:
            return None, give(tensor)
        return number, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(kept: tuple) -> Tensor:
        number, *rest = kept
        if number is None:
            return take(*rest)
        if versions != [version(source) for source in sources]:
            raise RuntimeError(
                "A parameter that the backward pass needs was modified by an inplace operation "
                "since the forward pass."
            )
        if number not in again:
            with torch.no_grad():
                again.update(enumerate(make()))
        return again.pop(number).as_strided(*rest)

    with saved_tensors_hooks(pack, unpack):  # `tensors` live that long: no other has their memory
        return use(*tensors)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
