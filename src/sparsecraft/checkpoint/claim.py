"""One writer for each output folder, and the end of what killed ones have left beside it.

Beside OUT stand, while it is written, `.OUT.lock` with the holder's name, `.OUT.PID.THREAD.tmp` or
`.OUT.partial` with what will be OUT and, where two names cannot change places in one step,
`.OUT.PID.THREAD.old` with what was OUT.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from sparsecraft.checkpoint.renames import rename_to_free
from sparsecraft.dense.memory import gigabytes
from sparsecraft.errors import CheckpointError

log = logging.getLogger("sparsecraft")


def temporary(out: Path, ending: str = "tmp") -> Path:
    """What this thread may call a folder that will be, or was, `out`."""
    return out.with_name(f".{out.name}.{os.getpid()}.{threading.get_ident()}.{ending}")


def partial(out: Path) -> Path:
    """Where a conversion that can be resumed writes."""
    return out.with_name(f".{out.name}.partial")


@contextmanager
def locked(out: Path) -> Iterator[bool]:
    """Hold `out` for this thread; whether it did not hold it before. A kill lets go of it.

    Raises:
        CheckpointError: another process or thread holds it, and which.
        OSError: nothing can be written beside it.
    """
    path = _lock_of(out)
    made = _make_parents(out)
    try:
        lock = FileLock(path, timeout=0, is_singleton=True)
        with _acquired(lock, out):
            first = lock.lock_counter == 1
            if first:
                _sign(path)
            try:
                yield first
            finally:
                if first:  # who waits for a file without a name makes a new one
                    with suppress(OSError):
                        path.unlink()
    finally:
        for parent in reversed(made):
            with suppress(OSError):  # it holds something now
                parent.rmdir()


def is_held(out: Path) -> bool:
    """Whether this thread holds `out` already."""
    return FileLock(_lock_of(out), timeout=0, is_singleton=True).is_locked


def _lock_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.lock")


@contextmanager
def _acquired(lock: FileLock, out: Path) -> Iterator[None]:
    try:
        lock.acquire()
    except Timeout:
        raise CheckpointError(
            f"{out} is being written by {_holder(Path(lock.lock_file))}; wait until that has "
            "ended, or choose another folder."
        ) from None
    except NotImplementedError as error:
        raise CheckpointError(f"{out} cannot be locked ({error}); choose another disk.") from None
    try:
        yield
    finally:
        lock.release()


def _make_parents(out: Path) -> list[Path]:
    """Make the folders above `out`; which of them were missing, from the top."""
    missing = [parent for parent in out.parents if not parent.exists()][::-1]
    out.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _sign(path: Path) -> None:
    words = " ".join([Path(sys.argv[0]).name, *sys.argv[1:3]])[:80] if sys.argv else ""
    name = f"process {os.getpid()} on {socket.gethostname()} ({words})"
    with suppress(OSError):  # where a locked file takes nothing, it has no name
        path.write_text(name)


def _holder(path: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        if found := path.read_text():
            return found
    return "another process"


def clear(out: Path, keep_partial: bool = False) -> None:
    """Bring back what a kill between two renames took away, remove what kills have left, say both.

    Only for the holder of the lock, so that nothing of it is in use.
    """
    left = _left_beside(out)
    if not out.exists() and (old := [path for path in left if path.suffix == ".old"]):
        rename_to_free(old[-1], out)
        log.warning("%s had been renamed when a run was killed, and is back.", out)
        left.remove(old[-1])
    if not keep_partial and partial(out).is_dir():
        left.append(partial(out))
    for path in left:
        size = bytes_in(path)
        shutil.rmtree(path, ignore_errors=True)
        done = "could not be removed" if path.exists() else "was removed"
        log.warning("%s (%s), left by a run that was killed, %s.", path, gigabytes(size), done)


def _left_beside(out: Path) -> list[Path]:
    name = re.compile(rf"\.{re.escape(out.name)}\.\d+\.\d+\.(tmp|old)")
    return sorted(
        (path for path in out.parent.iterdir() if name.fullmatch(path.name) and path.is_dir()),
        key=lambda path: path.stat().st_mtime_ns,
    )


def bring_back(folder: Path) -> Path:
    """The same folder, to be read: there again if a kill between two renames took it away."""
    out = Path(os.path.abspath(folder))
    with suppress(OSError):
        gone = not out.exists() and out.parent.is_dir()
        if gone and any(path.suffix == ".old" for path in _left_beside(out)):
            with locked(out):
                clear(out, keep_partial=True)
    return folder


def bytes_in(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(p.lstat().st_size for p in folder.rglob("*") if not p.is_dir())
