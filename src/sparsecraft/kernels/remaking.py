"""Tensors that are made again in the backward pass, where it would keep them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def made_again(makers: Sequence[Callable[[], Tensor]], use: Callable[..., Tensor]) -> Tensor:
    """use(*tensors), of which the backward pass keeps none of those that `makers` give.

    Unlike `torch.utils.checkpoint` it computes nothing again but these tensors. `makers` give the
    same values each time.
    """
    tensors = [make() for make in makers]
    if not torch.is_grad_enabled():
        return use(*tensors)
    numbers = {_memory(tensor): number for number, tensor in enumerate(tensors)}

    def pack(tensor: Tensor) -> Tensor | tuple:
        number = numbers.get(_memory(tensor))
        if number is None:
            return tensor
        return number, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(kept: Tensor | tuple) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        number, *layout = kept
        with torch.no_grad():
            return makers[number]().as_strided(*layout)

    with saved_tensors_hooks(pack, unpack):  # `tensors` live that long: no other has their memory
        return use(*tensors)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
