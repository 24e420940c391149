"""What a conversion that writes a checkpoint piece by piece has finished, after a kill."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from sparsecraft.checkpoint import tensorfile
from sparsecraft.checkpoint.folder import check_free, swap
from sparsecraft.checkpoint.jsonfile import differences, read_json, write_json
from sparsecraft.errors import CheckpointError, SparsecraftError
from sparsecraft.recipe.formats import upgraded

PROGRESS = "progress.json"


class Progress:
    """What is complete in a folder.

    Attributes:
        folder: where the files are written.
        finished: file name -> digests of its tensors.
    """

    def __init__(self, folder: Path, task: dict[str, Any], finished: dict[str, dict[str, str]]):
        self.folder, self.task, self.finished = folder, task, finished
        self._write()

    def finish(self, file: str, digests: dict[str, str]) -> None:
        """Remember that a file is complete and was read back."""
        self.finished[file] = digests
        self._write()

    def _write(self) -> None:
        process = [os.getpid(), psutil.Process().create_time()]
        data = {"process": process, "task": self.task, "finished": self.finished}
        write_json(self.folder / PROGRESS, data)


@contextmanager
def continued(
    out: Path, task: dict[str, Any], *, overwrite: bool, resume: bool
) -> Iterator[Progress]:
    """A folder beside `out` that takes its name once the block has succeeded.

    A kill leaves it for `resume`; an error of ours, which would come again, removes it.

    Args:
        task: all that the files depend on, as JSON data.
        resume: go on with what was left of the same task.

    Raises:
        CheckpointError: `out` may not be written; `resume` is False and something was left; or
            it is True and nothing was left, or only of another task.
    """
    out, task = out.resolve(), json.loads(json.dumps(task))  # as it will be read: tuples are lists
    check_free(out, overwrite)
    folder = _partial(out)
    finished = _left(folder, task, out) if resume else {}
    if not resume:
        _create(folder, out)
    try:
        progress = Progress(folder, task, finished)
        yield progress
        swap(folder, out)
        (out / PROGRESS).unlink()
    except OSError as error:
        raise CheckpointError(
            f"{out} could not be written ({error}); --resume (resume=True) goes on."
        ) from error
    except SparsecraftError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _create(folder: Path, out: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise CheckpointError(
            f"{folder} is left of an interrupted conversion to {out}; pass --resume (resume=True) "
            "to go on, or delete it."
        ) from None


def _left(folder: Path, task: dict[str, Any], out: Path) -> dict[str, dict[str, str]]:
    """The complete files in a folder that was left, each read again."""
    if not folder.is_dir():
        raise CheckpointError(
            f"There is nothing to resume: {folder} is not there; leave out --resume (resume=True)."
        )
    if not (folder / PROGRESS).is_file():
        return {}  # the kill came at once
    known = read_json(folder / PROGRESS)
    if _runs(*known["process"]):
        raise CheckpointError(
            f"Process {known['process'][0]} is converting to {out}; wait for it, or end it."
        )
    before = known["task"]
    if isinstance(before.get("recipe"), dict):  # it may have been written in an older format
        before = before | {"recipe": json.loads(json.dumps(upgraded(before["recipe"])))}
    for name, then, now in differences(before, task):
        raise CheckpointError(
            f"{folder} was left of another conversion: {name} was {then!r} and is {now!r}. Convert "
            "as before, or delete the folder and leave out --resume (resume=True)."
        )
    for path in folder.glob("*.tmp"):  # of a JSON file that the kill came between
        path.unlink()
    return {f: digests for f, digests in known["finished"].items() if _is(folder / f, digests)}


def _is(file: Path, digests: dict[str, str]) -> bool:
    """Whether a file holds the tensors that were written."""
    try:
        return tensorfile.read_digests(file) == digests
    except CheckpointError:
        return False


def _runs(process: int, created: float) -> bool:
    """Whether another process still writes; its number may have been given to a new one."""
    try:
        return process != os.getpid() and psutil.Process(process).create_time() == created
    except psutil.Error:
        return False


def _partial(out: Path) -> Path:
    return out.resolve().with_name(f".{out.resolve().name}.partial")


def bytes_left(out: Path) -> int:
    """Bytes of the files that an interrupted conversion to `out` has left on the disk."""
    folder = _partial(out)
    return sum(p.stat().st_size for p in folder.iterdir()) if folder.is_dir() else 0
