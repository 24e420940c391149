"""What belongs to one thread, or to one `with` block, where many threads run one model at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch


class PerThread(threading.local):
    """An object for each thread, `own`, made where the thread first asks; copies start anew.

    An object, because what torch.compile has traced sees what a thread's object holds, and not what
    is set on a threading.local itself.

    Args:
        make: gives the object.
    """

    def __init__(self, make: Callable[[], Any]):
        self.make, self.own = make, make()

    def __reduce__(self) -> tuple:
        return PerThread, (self.make,)


class Blocks:
    """The `with` blocks of one kind that are open, outer ones first.

    A block is of the thread or asyncio task that opened it and of what runs in its context
    (`asyncio.to_thread`, tasks that it starts, `contextvars.copy_context().run`). What
    torch.compile has compiled sees those of its thread: it follows no ContextVar.
    """

    def __init__(self, name: str):
        self._open: ContextVar[tuple] = ContextVar(name, default=())
        self._of_thread = PerThread(_Open)

    def now(self) -> tuple:
        if torch.compiler.is_dynamo_compiling():
            return self._of_thread.own.blocks
        return self._open.get()

    @contextmanager
    def opened(self, block: Any) -> Iterator[None]:
        """Blocks may close in any order."""
        thread = self._of_thread.own
        self._open.set((*self._open.get(), block))
        thread.blocks = (*thread.blocks, block)
        try:
            yield
        finally:
            self._open.set(_without(self._open.get(), block))
            thread.blocks = _without(thread.blocks, block)


class _Open:
    def __init__(self):
        self.blocks: tuple = ()


def _without(blocks: tuple, closed: Any) -> tuple:
    return tuple(block for block in blocks if block is not closed)
