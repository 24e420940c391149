"""xxh3 digests of one tensor, and of many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor


def digest(tensor: Tensor) -> str:
    """xxh3_128 of a tensor's dtype, shape and bytes. It tells edits apart, it does not sign."""
    state = started(tensor.dtype, tensor.shape)
    feed(state, tensor)
    return state.hexdigest()


def started(dtype: torch.dtype, shape: Sequence[int]) -> xxhash.xxh3_128:
    """A digest that waits for the tensor's bytes, which may come in pieces."""
    return xxhash.xxh3_128(f"{dtype}{list(shape)}".encode())


def feed(state: xxhash.xxh3_128, piece: Tensor) -> None:
    state.update(tensor_bytes(piece))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order, as safetensors stores them."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def combine(digests: dict[str, str]) -> str:
    """One digest for a set of named tensors, whatever their order."""
    state = xxhash.xxh3_128()
    for name in sorted(digests):
        state.update(f"{name}={digests[name]}\n".encode())
    return f"xxh3_128:{state.hexdigest()}"
