"""A folder is written under a temporary name, and takes its own once all is there."""

from __future__ import annotations

import fnmatch
import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sparsecraft.checkpoint.claim import bring_back, clear, is_held, locked, temporary
from sparsecraft.checkpoint.folder import OWN, check_free, is_ours, resolved
from sparsecraft.checkpoint.renames import exchange, flush, flush_one, rename_to_free
from sparsecraft.checkpoint.space import writing
from sparsecraft.errors import CheckpointError

log = logging.getLogger("sparsecraft")


@contextmanager
def claimed(
    out: str | Path, overwrite: bool, foreign: bool = False, keep_partial: bool = False
) -> Iterator[Path]:
    """Hold an output folder for one writer, from before the work until it is written.

    What killed runs have left beside it is removed, and said. May be entered again by who holds it.
    Of processes that run together, only the first holds it.

    Args:
        foreign: overwrite a folder that is no checkpoint or export of ours, too.
        keep_partial: leave what a conversion tensor by tensor can go on from.

    Raises:
        CheckpointError: `out` exists and `overwrite` is False, another process or thread writes it,
            or it cannot be written.
    """
    path, is_first = resolved(out), os.environ.get("RANK", "0") == "0"  # as torchrun says it
    if is_first:
        bring_back(path)
    if not (is_first and is_held(path)):  # then it was free; `put` keeps what is written since
        check_free(path, overwrite, foreign)
    if not is_first:
        yield path
        return
    with ExitStack() as stack:
        with writing(path, "nothing was changed"):
            if stack.enter_context(locked(path)):
                clear(path, keep_partial)
        yield path


@contextmanager
def replacing(
    out: Path, overwrite: bool, keep: tuple[str, ...] = (), foreign: bool = False
) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name once the block has succeeded.

    Files and links of the old folder that are not ours move into the new one.

    Args:
        keep: globs of old files that win over new ones.
        foreign: overwrite a folder that is no checkpoint or export of ours, too.

    Raises:
        CheckpointError: `out` exists and `overwrite` is False, another process or thread writes it,
            or the disk refuses.
    """
    with claimed(out, overwrite, foreign) as path, writing(path, "nothing was changed"):
        new = temporary(path)
        try:
            new.mkdir()
            yield new
            put(new, path, overwrite, keep, foreign)
        finally:
            shutil.rmtree(new, ignore_errors=True)


@contextmanager
def adding(out: str | Path) -> Iterator[Path]:
    """A temporary folder whose files take the place of those of the same names in a folder of the
    user's, once the block has succeeded.

    Raises:
        CheckpointError: another process or thread writes `out`, or the disk refuses.
    """
    path = resolved(out)
    with writing(path, "nothing was changed"), locked(path) as first:
        if first:
            clear(path)
        new = temporary(path)
        try:
            new.mkdir()
            yield new
            flush(new)
            with writing(path, "some of its files are new, others may be of before"):
                path.mkdir(exist_ok=True)
                for file in sorted(new.iterdir()):
                    file.replace(path / file.name)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def put(
    new: Path, out: Path, overwrite: bool, keep: tuple[str, ...] = (), foreign: bool = False
) -> None:
    """Let `new` take the place of `out`, which has a folder at every moment: the old or the new.

    Raises:
        CheckpointError: something that may not be replaced is there by now; `new` has another name.
        OSError: the disk refuses; `out` is as it was.
    """
    flush(new)
    if os.path.lexists(out):
        _check_still_free(new, out, overwrite, foreign)
        _take_along(out, new, keep)
        _exchange(new, out)
    else:
        try:
            rename_to_free(new, out)
        except FileExistsError:
            _check_still_free(new, out, overwrite, foreign)
            raise
    with suppress(OSError):  # it is there, and nothing more can be done for it
        flush_one(out.parent)


def _check_still_free(new: Path, out: Path, overwrite: bool, foreign: bool) -> None:
    try:
        if out.is_symlink():
            raise CheckpointError(f"{out} is a link.")
        check_free(out, overwrite, foreign)
    except CheckpointError as error:
        names = (out.with_name(f"{out.name}-{number}") for number in itertools.count(2))
        kept = next(path for path in names if not os.path.lexists(path))
        rename_to_free(new, kept)
        raise CheckpointError(
            f"{out} appeared while it was being written ({error}) What was to be there is complete "
            f"and in {kept}."
        ) from None


def _exchange(new: Path, out: Path) -> None:
    if exchange(new, out):
        _remove(new)
        return
    old = temporary(out, "old")
    out.rename(old)
    try:
        rename_to_free(new, out)
    except BaseException:
        old.rename(out)
        raise
    _remove(old)


def _remove(old: Path) -> None:
    """Remove what has been replaced. A failure is none of what took its place."""
    shutil.rmtree(old, ignore_errors=True)
    if old.exists():
        log.warning("%s holds what was replaced and cannot be removed; delete it.", old)


def _take_along(old: Path, new: Path, keep: tuple[str, ...]) -> None:
    """Give `new` what is the user's in `old`."""
    ours = is_ours(old)
    keep = keep if ours else (*keep, "README.md")
    for path in old.iterdir():
        stale = ours and _matches(path.name, OWN)
        if _matches(path.name, keep) or not (stale or os.path.lexists(new / path.name)):
            _link(path, new / path.name)


def _link(path: Path, target: Path) -> None:
    """Give a file, a link or a folder of them another name, at no cost where the disk can."""
    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, target, symlinks=True, copy_function=_link_file, dirs_exist_ok=True)
        return
    target.unlink(missing_ok=True)
    _link_file(path, target)


def _link_file(path: str | Path, target: str | Path) -> None:
    try:
        os.link(path, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(path, target, follow_symlinks=False)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
