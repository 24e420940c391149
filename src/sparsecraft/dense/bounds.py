"""Models that are larger than the weights which they will get, refused while they are built.

What a model may be follows from the files that hold its weights: as many parameters and numbers as
they have tensors and bytes, with room for ties and packing. A model is counted while transformers
builds it, so that 10^5 layers end after the first few.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from sparsecraft.errors import SparsecraftError

# Parameters for each tensor of the files (which may stack the experts of a layer), and a few.
PER_TENSOR, FEW = 512, 1000
# Numbers for each byte: two of 4 bits, and as many again that are tied once they are loaded.
PER_BYTE, LITTLE = 4, 1 << 22
MOST_BUFFERS = 1 << 32  # numbers: a causal mask of 65,536 tokens


@contextmanager
def bounded(
    tensors: int,
    size: int,
    where: object,
    error: type[SparsecraftError],
    everything: bool = False,
) -> Iterator[None]:
    """Let no model be built in the block that the files at `where` cannot fill.

    Args:
        tensors: that the files hold.
        size: their bytes.
        everything: count parameters with memory too, of a class that is built outside of the meta
            device; else they are those that get their values.

    Raises:
        SparsecraftError: of the given kind; a model grows larger.
    """
    _listen()
    most = PER_TENSOR * tensors + FEW, PER_BYTE * size + LITTLE
    before = _counting.set(_Count(*most, everything, where, error))
    try:
        yield
    finally:
        _counting.reset(before)


@functools.cache
def _listen() -> None:
    """Once and for good: another thread that builds a module may be going through the hooks."""

    def parameter(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if (count := _counting.get()) is not None and tensor is not None:
            count.parameter(module, name, tensor)

    def buffer(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if (count := _counting.get()) is not None and tensor is not None:
            count.buffer(module, name, tensor)

    register_module_parameter_registration_hook(parameter)
    register_module_buffer_registration_hook(buffer)


class _Count:
    """What a block has registered, against what it may."""

    def __init__(self, parameters: int, numbers: int, everything: bool, *refusal: Any):
        self._parameters, self._numbers, self._buffers = parameters, numbers, MOST_BUFFERS
        self._everything = everything
        self._where, self._error = refusal

    def parameter(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        if not self._counts(tensor):
            return
        self._parameters -= 1
        self._numbers -= tensor.numel()
        if self._parameters < 0 or self._numbers < 0:
            raise self._error(
                f"The config.json of {self._where} describes a model that its weights cannot "
                f"fill: at {name!r} of a {type(module).__name__} it has grown larger than they "
                "are. Fetch the folder again."
            )

    def buffer(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        if not self._counts(tensor):
            return
        self._buffers -= tensor.numel()
        if self._buffers < 0:
            raise self._error(
                f"The config.json of {self._where} asks for a buffer {name!r} of "
                f"{tensor.numel():,} numbers in a {type(module).__name__}, more than any model "
                "has; correct it."
            )

    def _counts(self, tensor: Tensor) -> bool:
        return tensor.is_meta or self._everything


_counting: ContextVar[_Count | None] = ContextVar("counting", default=None)
