"""Write a safetensors file a piece at a time, read it back, and compare.

The safetensors library wants all tensors in memory at once, and a conversion from file to file has
only one of them at a time. The format itself is an 8-byte length, a JSON header, and
the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsecraft.dense import safefile
from sparsecraft.dense.digests import combine, feed, started, tensor_bytes
from sparsecraft.dense.safefile import SafeFile
from sparsecraft.errors import CheckpointError

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

# What the header of a file says besides its tensors.
USUAL = (None, {}, {"format": "pt"})

# Bytes in memory while a file is read back.
BLOCK = 1 << 24

# Bytes of which the data's place in the file is a multiple: those of a cache line.
ALIGNMENT = 64


@dataclass(frozen=True)
class Lazy:
    """A tensor that is made while it is written.

    Attributes:
        make: gives its pieces, one after the other: tensors whose bytes together are its bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Iterable[Tensor]]


Writable = Tensor | Lazy


def size_of(tensor: Writable) -> int:
    """Bytes in the file."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def write(path: Path, tensors: Mapping[str, Writable]) -> str:
    """Write `tensors`, read every one of them back, and return the digest of them all.

    Raises:
        CheckpointError: what the disk gives back is not what was written.
    """
    return combine(write_each(path, tensors))


def write_each(path: Path, tensors: Mapping[str, Writable]) -> dict[str, str]:
    """Like `write`; the digest of each tensor."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + size_of(tensor)
        shape = list(tensor.shape)
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    # A file is mapped into memory, and products round by where a tensor lies there.
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)
    digests = {}
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, tensor in tensors.items():
            state, before = started(tensor.dtype, tensor.shape), file.tell()
            for piece in tensor.make() if isinstance(tensor, Lazy) else (tensor,):
                feed(state, piece)
                file.write(tensor_bytes(piece))
            digests[name] = state.hexdigest()
            if file.tell() - before != size_of(tensor):
                raise CheckpointError(
                    f"{name!r} is {file.tell() - before} bytes and should be {size_of(tensor)}, "
                    f"{tensor.dtype} {list(tensor.shape)}."
                )
        file.flush()
        os.fsync(file.fileno())
    for name, found in read_digests(path).items():
        if found != digests[name]:
            raise CheckpointError(f"{path} reads back differently at {name!r}; is the disk sound?")
    return digests


def read_digests(path: Path) -> dict[str, str]:
    """The digest of every tensor of the file, a block in memory at a time, and what its header
    says besides, where that is unusual.

    Raises:
        CheckpointError: the file is missing or truncated, or is no safetensors file.
    """
    found, digests = SafeFile.open(path, CheckpointError), {}
    if found.metadata not in USUAL:
        digests["__metadata__"] = json.dumps(found.metadata, sort_keys=True)
    try:
        with open(path, "rb") as file:
            for name, entry in found.entries.items():
                state = started(safefile.DTYPES.get(entry.word, entry.word), entry.shape)
                file.seek(entry.start)
                for left in range(entry.end - entry.start, 0, -BLOCK):
                    state.update(file.read(min(BLOCK, left)))
                digests[name] = state.hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy or save it again.") from None
    return digests


def read(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file, one at a time, on the CPU.

    Raises:
        CheckpointError: the file is missing or truncated, or is no safetensors file.
    """
    file = SafeFile.open(path, CheckpointError)
    if file.metadata not in USUAL:
        raise CheckpointError(
            f"{path} says {file.metadata!r:.100} of itself, and not that torch wrote it; copy or "
            "save it again."
        )
    yield from file
