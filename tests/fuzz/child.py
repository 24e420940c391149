"""One read in a process of its own, under limits, and all that it did."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparsecraft.dense.digests import digest
from sparsecraft.errors import SparsecraftError

SECONDS = 30
MEMORY = 2 * 2**30  # beyond what the process has when it starts
# Events of Python that mean code of a folder runs, or something leaves the machine.
RUNS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")


@dataclass
class Seen:
    """What came of one read.

    Attributes:
        end: "read", "refused" (an error of ours), "foreign", "slow" or "died".
        said: the error.
        logits: a digest of them, if it gave any.
        ran: code that ran.
        wrote: files that were opened for writing outside of the scratch folder.
        memory: bytes of the largest resident size, beyond that at the start.
    """

    end: str = "died"
    said: str = ""
    logits: str | None = None
    ran: list[str] = field(default_factory=list)
    wrote: list[str] = field(default_factory=list)
    memory: int = 0
    seconds: float = 0.0


def watch(read: Callable[[Path], Any], folder: Path, scratch: Path, limit: float = SECONDS) -> Seen:
    """Read a folder in a fork of this process.

    Args:
        scratch: where it may write.
        limit: seconds.
    """
    start = time.monotonic()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _in_child(read, folder, scratch, writing)
    os.close(writing)
    seen = _answer(reading, start + limit)
    if seen is None:
        os.kill(child, signal.SIGKILL)
        seen = Seen("slow", f"still running after {limit} s")
    os.close(reading)
    status = os.waitpid(child, 0)[1]
    if seen.end == "died":
        seen.said = f"ended by status {os.waitstatus_to_exitcode(status)}"
    seen.seconds = time.monotonic() - start
    return seen


def _answer(pipe: int, end: float) -> Seen | None:
    content = b""
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return None
        piece = os.read(pipe, 1 << 16)
        if not piece:
            return Seen(**json.loads(content)) if content else Seen()
        content += piece


def _in_child(read: Callable[[Path], Any], folder: Path, scratch: Path, pipe: int) -> None:
    seen = Seen()
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        before = _limit()
        tempfile.tempdir = os.environ["TMPDIR"] = str(scratch)
        os.chdir(scratch)
        sys.addaudithook(_hook(seen, scratch))
        _run(read, folder, seen)
        if (scratch / "CANARY").exists() or (folder / "CANARY").exists():
            seen.ran.append("the canary is there")
        seen.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        os.write(pipe, json.dumps(asdict(seen)).encode())
    finally:
        os._exit(0)


def _run(read: Callable[[Path], Any], folder: Path, seen: Seen) -> None:
    try:
        found = read(folder)
        seen.end = "read"
        seen.logits = None if found is None else digest(found)
    except SparsecraftError as error:
        seen.end, seen.said = "refused", f"{error}"[:300]
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)[::-1]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[:6])
        seen.end, seen.said = "foreign", f"{type(error).__name__}: {str(error)[:150]} @ {where}"


def _limit() -> int:
    """Limit the memory of this process; what it has now."""
    size, resident = map(int, Path("/proc/self/statm").read_text().split()[:2])
    page = os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size * page + 2 * MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return resident * page


def _hook(seen: Seen, scratch: Path) -> Callable[[str, tuple], None]:
    inside = str(scratch.resolve())

    def hook(event: str, given: tuple) -> None:
        if event in RUNS:
            seen.ran.append(f"{event} {given!r:.100}")
        elif event == "exec" and str(getattr(given[0], "co_filename", "")).startswith(inside):
            seen.ran.append(f"exec {given[0].co_filename}")
        elif event == "open" and isinstance(given[0], (str, bytes)) and _writes(given):
            path = os.path.realpath(os.fsdecode(given[0]))
            if not path.startswith((inside, "/dev/")):
                seen.wrote.append(path)
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink"):
            path = os.path.realpath(os.fsdecode(given[0])) if isinstance(given[0], str) else ""
            if path and not path.startswith(inside):
                seen.wrote.append(f"{event} {path}")

    return hook


def _writes(given: tuple) -> bool:
    mode, flags = given[1], given[2]
    by_mode = isinstance(mode, str) and any(letter in mode for letter in "wax+")
    return by_mode or bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
