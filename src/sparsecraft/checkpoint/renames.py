"""Renames that are one step for the file system, and files that are on the disk before them."""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from pathlib import Path

# Of renameat2 in Linux.
NOREPLACE, EXCHANGE = 1, 2
AT_FDCWD = -100
# What an old kernel, another system or a file system says that cannot do it.
UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where the system cannot, and nothing is done.

    Raises:
        OSError: one of them is not there, or may not be renamed.
    """
    return _renameat2(one, other, EXCHANGE)


def rename_to_free(path: Path, target: Path) -> None:
    """Rename a folder; never onto something that is there.

    Raises:
        FileExistsError: `target` is there.
        OSError: as of a rename.
    """
    if _renameat2(path, target, NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    path.rename(target)


def _renameat2(path: Path, target: Path, flags: int) -> bool:
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old C library
        return False
    if call(AT_FDCWD, os.fsencode(path), AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(path), None, str(target))


def flush(folder: Path) -> None:
    """Wait until all files of a folder, and their names, are on the disk.

    Raises:
        OSError: it cannot take them.
    """
    for path in (*folder.rglob("*"), folder):
        if path.is_dir() or path.is_file():
            flush_one(path)


def flush_one(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir():
        with suppress(OSError):  # some systems open no folder
            _fsync(path)
    else:
        _fsync(path)


def _fsync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
