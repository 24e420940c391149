"""What a conversion that writes a checkpoint piece by piece has finished, after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsecraft.checkpoint import tensorfile
from sparsecraft.checkpoint.claim import bytes_in, clear, partial
from sparsecraft.checkpoint.folder import resolved
from sparsecraft.checkpoint.jsonfile import differences, read_json, write_json
from sparsecraft.checkpoint.renames import flush
from sparsecraft.checkpoint.replacing import claimed, put
from sparsecraft.checkpoint.space import writing
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
        write_json(self.folder / PROGRESS, {"task": self.task, "finished": self.finished})


@contextmanager
def continued(
    out: Path, task: dict[str, Any], *, overwrite: bool, resume: bool
) -> Iterator[Progress]:
    """A folder beside `out` that takes its name once the block has succeeded.

    A kill leaves it for `resume`; an error of ours, which would come again, removes it.

    Args:
        task: all that the files depend on, as JSON data.
        resume: go on with what was left of the same task, and with nothing else. Without it, what
            was left of another task is removed.

    Raises:
        CheckpointError: `out` may not be written, or is being written; or `resume` is True and
            nothing was left, or only of another task.
    """
    task = json.loads(json.dumps(task))  # as it will be read: tuples are lists
    go_on = "what is finished is kept, and --resume (resume=True) goes on"
    with claimed(out, overwrite, keep_partial=True) as path, writing(path, go_on):
        folder, finished = partial(path), _left(path, task, resume)
        folder.mkdir(exist_ok=True)
        try:
            progress = Progress(folder, task, finished)
            yield progress
            flush(folder)
            (folder / PROGRESS).unlink()  # where it stands, the folder can be gone on with
            put(folder, path, overwrite)
        except SparsecraftError:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _left(out: Path, task: dict[str, Any], resume: bool) -> dict[str, dict[str, str]]:
    """The complete files that were left of a task, each read again."""
    folder = partial(out)
    if resume and not folder.is_dir():
        raise CheckpointError(
            f"There is nothing to resume: {folder} is not there; leave out --resume (resume=True)."
        )
    try:
        if (folder / PROGRESS).is_file():
            return _finished(folder, task)
    except CheckpointError:
        if resume:
            raise
    clear(out)  # the kill came at once, or after all was done; or it was another task
    return {}


def _finished(folder: Path, task: dict[str, Any]) -> dict[str, dict[str, str]]:
    known = read_json(folder / PROGRESS)
    before = known["task"]
    if isinstance(before.get("recipe"), dict):  # it may have been written in an older format
        before = before | {"recipe": json.loads(json.dumps(upgraded(before["recipe"])))}
    for name, then, now in differences(before, task):
        raise CheckpointError(
            f"{folder} was left of another conversion: {name} was {then!r} and is {now!r}. Convert "
            "as before, or leave out --resume (resume=True), and it is removed."
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


def bytes_left(out: Path) -> int:
    """Bytes of the files that an interrupted conversion to `out` has left on the disk."""
    return bytes_in(partial(resolved(out)))
