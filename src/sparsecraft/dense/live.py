"""How many bytes of tensors live at a time, counted as operations make them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

# With what the C library keeps of freed tensors on a CPU, as benchmarks/memory measured it.
TAKEN_ON_CPU = 1.2


def taken_for(device: torch.device) -> float:
    """Bytes of memory that are taken for each byte of the tensors that live."""
    return TAKEN_ON_CPU if device.type == "cpu" else 1.0


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, as long as they live.

    Attributes:
        most: the most at a time.
        most_without: the same without those that were set apart.
    """

    def __init__(self):
        super().__init__()
        self.most = self.most_without = self._live = self._apart = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for storage in _storages((args, kwargs)):  # of what was there before
            self._known.setdefault(storage, True)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self._known:
                self._known[storage] = True
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes()).atexit = False
        return result

    def set_apart(self, size: int) -> None:
        self._apart += size

    def _count(self, size: int) -> None:
        self._live += size
        self.most = max(self.most, self._live)
        self.most_without = max(self.most_without, self._live - self._apart)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_iter(values):
        if isinstance(value, Tensor) and value.layout == torch.strided:
            yield value.untyped_storage()
