"""Write a safetensors file one tensor at a time, read it back, and compare.

The safetensors library wants all tensors in memory at once; copies that are views of one tensor
would then take E times their size. The format itself is an 8-byte length, a JSON header, and
the tensors' bytes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsecraft.errors import CheckpointError
from sparsecraft.origin import combine, digest, tensor_bytes

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write `tensors`, read every one of them back, and return the digest of them all.

    Raises:
        CheckpointError: what the disk gives back is not what was written.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    digests = {}
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, tensor in tensors.items():
            tensor = tensor.detach().cpu().contiguous()
            digests[name] = digest(tensor)
            file.write(tensor_bytes(tensor))
        file.flush()
        os.fsync(file.fileno())
    for name, tensor in read(path):
        if digest(tensor) != digests[name]:
            raise CheckpointError(f"{path} reads back differently at {name!r}; is the disk sound?")
    return combine(digests)


def read(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file, one at a time, on the CPU.

    Raises:
        CheckpointError: the file is missing or truncated, or is no safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        for name in names:
            # Opened anew each time: one memory map would keep every page it has touched.
            with safe_open(path, "pt") as file:
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy or save it again.") from None
