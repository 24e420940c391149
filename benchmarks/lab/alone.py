"""Sides of a comparison in processes of their own: all are built at once, then one after the other
is timed alone."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from contextlib import suppress
from queue import Empty
from threading import BrokenBarrierError
from typing import Any

from benchmarks.lab import clocks
from benchmarks.lab.tables import insert

WAIT = 300  # seconds for the slowest side to be built


def measure_and_write(
    args, build: Callable, time: Callable, tables: Callable[[list], str], keys: tuple[str, ...]
) -> None:
    """Measure `args.sides` into `args.out`, in the place of rows with the same values of `keys`,
    unless `args.table`; put the tables into the page beside it."""
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    if not args.table:
        rows = merge(rows, measure(args, build, time), keys)
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    page = args.out.with_suffix(".md")
    insert(page, tables(rows))
    print(page.read_text())


def measure(args, build: Callable[[Any, str], Any], time: Callable[[Any, str, Any], dict]) -> list:
    """The rows of `args.sides`, those of sides that failed left out.

    Args:
        build: args and a side -> what is timed. A function of a module, as `time`.
        time: args, side and what was built -> its row.
    """
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "8")
    context = multiprocessing.get_context("spawn")
    ready, alone, rows = context.Barrier(len(args.sides)), context.Lock(), context.Queue()
    shared = ready, alone, rows
    workers = [
        context.Process(target=_side, args=(args, name, build, time, shared)) for name in args.sides
    ]
    for worker in workers:
        worker.start()
    found = []
    while any(worker.is_alive() for worker in workers) or not rows.empty():
        with suppress(Empty):
            found.append(rows.get(timeout=1))
            print(json.dumps(found[-1]), flush=True)
    return found


def _side(args, name: str, build: Callable, time: Callable, shared: tuple) -> None:
    ready, alone, rows = shared
    try:
        built = build(args, name)
    finally:
        with suppress(BrokenBarrierError):  # a side that died is not waited for twice
            ready.wait(WAIT)
    with alone:
        rows.put({"side": name} | time(args, name, built) | clocks.about(args.device))


def merge(old: list[dict], new: list[dict], keys: tuple[str, ...]) -> list[dict]:
    """The rows of a run in the place of those with the same values of `keys`."""

    def key(row: dict) -> tuple:
        return tuple(row[name] for name in keys)

    return list(({key(row): row for row in old} | {key(row): row for row in new}).values())
