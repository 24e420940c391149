"""What is free of disk and memory, before work that needs it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sparsecraft.dense.memory import gigabytes, main_memory
from sparsecraft.errors import CheckpointError, ResourceError, first_line

# How torch.save says that a disk refused.
TORCH_SAVE = ("PytorchStreamWriter", "unexpected pos", "iostream")


def require(folder: Path, disk: int, memory: int, task: str, free_memory: int | None = None) -> str:
    """Compare needs with what is free; return one line that says both.

    Args:
        folder: where the files will go.
        disk: bytes to be written.
        memory: bytes of memory, beyond what is in use already.
        free_memory: what is free of it; None asks for the main memory.

    Raises:
        ResourceError: not enough disk. Too little memory is reported, not refused, because
            swap and memory maps make it a guess.
    """
    free_disk = require_disk(folder, disk, task)
    free_memory = main_memory() if free_memory is None else free_memory
    line = (
        f"{task} needs about {gigabytes(memory)} of memory ({gigabytes(free_memory)} free) and "
        f"{gigabytes(disk)} of disk ({gigabytes(free_disk)} free)."
    )
    return line + (" MEMORY MAY NOT SUFFICE." if memory > free_memory else "")


def require_disk(folder: Path, disk: int, task: str) -> int:
    """The bytes that are free where the folder will be; refuses if that is less than `disk`.

    Raises:
        ResourceError: so it is.
    """
    existing = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if disk > free:
        raise ResourceError(
            f"{task} needs {gigabytes(disk)} of disk at {folder} and {gigabytes(free)} "
            "are free; free some space or choose another --out."
        )
    return free


@contextmanager
def writing(path: Path, otherwise: str) -> Iterator[None]:
    """Say in one sentence what a disk refuses, whichever library wrote to it.

    Args:
        path: what is written.
        otherwise: what is true if it cannot be.

    Raises:
        CheckpointError: the disk is full or broken, or nothing may be written there.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(s in str(error) for s in TORCH_SAVE):
            raise
        raise CheckpointError(
            f"{path} could not be written ({first_line(error)}); {otherwise}."
        ) from error
