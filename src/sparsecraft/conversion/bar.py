"""A progress bar of bytes on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial


@contextmanager
def bytes_bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on standard error; gives the function that advances it."""
    from rich import progress as rich_progress
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    bar = rich_progress.Progress(
        TextColumn("converting"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )
    with bar:
        yield partial(bar.advance, bar.add_task("", total=total))
