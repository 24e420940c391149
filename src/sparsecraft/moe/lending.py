"""The tensors that a module computes with while it runs: from files, where it has none, and in a
wider type."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

# What holds exactly what a narrower float does; an integer or an 8-bit float is half of a quantized
# weight, whose scale stands elsewhere.
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Lender:
    """Lends modules their tensors.

    Attributes:
        sources: id of a tensor, as of one without memory -> what gives the values to compute with.
    """

    def __init__(self, sources: dict[int, Callable[[], Tensor]] | None = None):
        self.sources = sources or {}

    @contextmanager
    def lent(
        self, module: nn.Module, dtype: torch.dtype | None = None, *, below: bool = True
    ) -> Iterator[None]:
        """Let a module, or all below it, have its values, and floats in `dtype`."""
        changed, made = [], {}
        try:
            for store, name, tensor in _tensors(module, below):
                if id(tensor) not in made:  # tied ones stay so
                    made[id(tensor)] = self._value(tensor, dtype)
                if made[id(tensor)] is not tensor:
                    changed.append((store, name, tensor))
                    store[name] = made[id(tensor)]
            yield
        finally:
            for store, name, tensor in changed:
                store[name] = tensor

    def _value(self, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        value = self.sources[id(tensor)]() if id(tensor) in self.sources else tensor
        value = value.to(dtype) if dtype and value.dtype in FLOATS else value
        if value is not tensor and isinstance(tensor, nn.Parameter):
            return nn.Parameter(value, False)
        return value

    def wide_type(self, *modules: nn.Module) -> torch.dtype | None:
        """The type of at least 32 bits that modules can compute in; None if a weight of them is
        quantized, or lies where only its own hooks fetch it."""
        found = torch.float32
        for module in modules:
            for tensor in module.parameters():
                here = not tensor.is_meta or id(tensor) in self.sources
                if not (here and type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in FLOATS):
                    return None
                found = torch.promote_types(found, tensor.dtype)
        return found

    def waits(self, module: nn.Module) -> bool:
        """Whether tensors of the module's own are to be read."""
        return any(id(tensor) in self.sources for _, _, tensor in _tensors(module, below=False))


def _tensors(module: nn.Module, below: bool) -> list[tuple[dict, str, Tensor]]:
    """Where a module, or all below it, holds tensors."""
    return [
        (store, name, tensor)
        for part in (module.modules() if below else (module,))
        for store in (part._parameters, part._buffers)
        for name, tensor in store.items()
        if tensor is not None
    ]


def widened(value: Any, dtype: torch.dtype | None) -> Any:
    """A module's arguments with their floats in `dtype`, wherever they stand; what remembers, such
    as a cache, is copied, because two modules are called with it."""
    if isinstance(value, Tensor):
        return value.to(dtype) if dtype and value.dtype in FLOATS else value
    if isinstance(value, dict):
        return {name: widened(item, dtype) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(widened(item, dtype) for item in value)
    return copy.deepcopy(value) if isinstance(value, Cache) else value
