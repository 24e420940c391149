"""A safetensors file, read into memory that is the reader's own.

The library's readers map the file: what is written over it later changes the tensors of a live
model, and a file that is cut short ends the process. Here the library checks the header, once, and
each tensor is read by its place in the file.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sparsecraft.dense.jsonfile import check_regular
from sparsecraft.errors import SparsecraftError, first_line

MOST_TENSORS = 100_000  # of one file; the largest models have as many in sixty
MOST_HEADER = 1 << 24  # bytes
MANY = "it holds more tensors than one file of any model"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file.

    Attributes:
        word: its type as the format spells it, a key of `DTYPES` or one that torch lacks.
        start: of its bytes in the file.
        end: the first byte behind them.
    """

    word: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def is_floating(self) -> bool:
        return not self.word.startswith(("I", "U", "BOOL"))


@dataclass(frozen=True)
class SafeFile:
    """What a file held when it was opened.

    Attributes:
        entries: name -> tensor, in the order of the header.
        metadata: what the header says besides.
        stamp: of the file then; see `stamp_of`.
        error: that its readers raise.
    """

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str] | None
    stamp: tuple[int, ...]
    error: type[SparsecraftError]

    @classmethod
    def open(cls, path: Path, error: type[SparsecraftError]) -> SafeFile:
        """Read the header.

        Raises:
            SparsecraftError: of the given kind; the file is missing, cut short, no safetensors
                file, or holds more tensors than any model.
        """
        check_regular(path, error)
        try:
            stamp = stamp_of(path)
            with path.open("rb") as file:
                start = file.read(8)
            if len(start) == 8 and MOST_HEADER < int.from_bytes(start, "little") < stamp[2]:
                raise ValueError(MANY)
            with safe_open(path, "pt") as file:  # the library checks the header
                count = len(file.keys())
            if count > MOST_TENSORS:
                raise ValueError(MANY)
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
        except Exception as fault:  # the library has an error of its own beside Python's
            raise error(
                f"{path} cannot be read ({first_line(fault):.200}); copy or save it again."
            ) from None
        metadata = header.pop("__metadata__", None)
        at = 8 + length
        entries = {
            name: Entry(
                entry["dtype"],
                tuple(entry["shape"]),
                at + entry["data_offsets"][0],
                at + entry["data_offsets"][1],
            )
            for name, entry in header.items()
        }
        return cls(path, entries, metadata, stamp, error)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, with memory of its own.

        Raises:
            SparsecraftError: torch has no such type, or the file is another one by now.
        """
        entry = self.entries[name]
        if entry.word not in DTYPES:
            raise self.error(f"{self.path} holds {name!r} as {entry.word}, which torch has not.")
        try:
            with self.path.open("rb") as file:
                if stamp_of(file.fileno()) != self.stamp:
                    self._check_same(name)
                found = torch.empty(entry.shape, dtype=DTYPES[entry.word])
                file.seek(entry.start)
                if found.numel():
                    count = file.readinto(found.view(-1).view(torch.uint8).numpy())
                else:
                    count = 0
        except (OSError, RuntimeError) as fault:
            raise self.error(f"{self.path} cannot be read ({first_line(fault):.200}).") from None
        if count != entry.end - entry.start:
            raise self.error(f"{self.path} was cut short while it was read; copy it again.")
        return found

    def _check_same(self, name: str) -> None:
        again = SafeFile.open(self.path, self.error)
        if again.entries.get(name) != self.entries[name]:
            raise self.error(
                f"{self.path} has changed since it was opened: {name!r} is another tensor there. "
                "Load the model again."
            )

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, one at a time."""
        for name in self.entries:
            yield name, self.read(name)


def stamp_of(path: Path | int) -> tuple[int, ...]:
    """What changes when a file is written, exchanged or cut short."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
