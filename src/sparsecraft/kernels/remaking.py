"""Tensors that are made again in the backward pass, where it would keep them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def made_again(make: Callable[[], tuple[Tensor, ...]], use: Callable[..., Tensor]) -> Tensor:
    """use(*make()), of which the backward pass keeps none of what `make` gives.

    Unlike `torch.utils.checkpoint` it computes nothing again but these tensors. `make` gives the
    same values each time.
    """
    tensors = make()
    if not torch.is_grad_enabled():
        return use(*tensors)
    numbers = {_memory(tensor): number for number, tensor in enumerate(tensors)}
    again: dict[int, Tensor] = {}  # made with another, and not asked for yet

    def pack(tensor: Tensor) -> Tensor | tuple:
        number = numbers.get(_memory(tensor))
        if number is None:
            return tensor
        return number, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(kept: Tensor | tuple) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        number, *layout = kept
        if number not in again:
            with torch.no_grad():
                again.update(enumerate(make()))
        return again.pop(number).as_strided(*layout)

    with saved_tensors_hooks(pack, unpack):  # `tensors` live that long: no other has their memory
        return use(*tensors)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
