"""What is found out about a model by running its parts, remembered while nothing changes it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

Found = TypeVar("Found")

_KNOWN: ContextVar[dict[Hashable, Any] | None] = ContextVar("known", default=None)


@contextmanager
def looked_at_once() -> Iterator[None]:
    """While the block runs, no model is changed and none goes away, each is looked at once."""
    known = _KNOWN.get()
    token = _KNOWN.set({} if known is None else known)
    try:
        yield
    finally:
        _KNOWN.reset(token)


def once(key: Hashable, find: Callable[[], Found]) -> Found:
    """What `find` gives; within `looked_at_once` what it gave for that key the first time."""
    known = _KNOWN.get()
    if known is None:
        return find()
    if key not in known:
        known[key] = find()
    return known[key]
