"""Results files, and queues of runs that grow from the results there are.

Workers, one process a GPU, share two files under one lock: results, and claims of runs.
"""

from __future__ import annotations

import fcntl
import json
import lzma
import math
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path


# ------------------------------------------------------------------ results
def read(path: Path) -> list[dict]:
    """The rows of a results file, or of the .xz of it; none where there is neither."""
    packed = path.with_name(f"{path.name}.xz")
    if not path.exists() and packed.exists():
        text = lzma.decompress(packed.read_bytes()).decode()
    else:
        text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


class Rows:
    """The results file, and a copy of it where results are fetched from."""

    def __init__(self, path: Path, copy: Path | None = None):
        self.path, self.copy = path, copy
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> list[dict]:
        return read(self.path)

    def put(self, row: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        if self.copy:
            shutil.copy(self.path, self.copy)


# ------------------------------------------------------------------ runs
@dataclass(frozen=True)
class Run:
    """One training of a method."""

    method: str
    schedule: str
    lr: float
    seed: int

    @classmethod
    def of(cls, row: dict) -> Run:
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    @property
    def rates(self) -> tuple[float, ...]:
        return (self.lr,)

    @property
    def key(self) -> tuple:
        return self.method, self.schedule, *(f"{rate:.3g}" for rate in self.rates), self.seed


def finite(value: float) -> float:
    """A score to minimize; what has no number is the worst."""
    return value if math.isfinite(value) else math.inf


def bracket(
    found: dict[float, float], grid: Sequence[float], factor: float, extensions: int
) -> tuple[list[float], bool]:
    """The learning rates that are needed next, and whether the best one's neighbours are known.

    Args:
        found: rate -> loss.
        grid: the rates to begin with; then one more beyond the best, `extensions` times at most.
    """
    near = [v for v in grid if not any(math.isclose(k, v, rel_tol=1e-3) for k in found)]
    if near:
        return near, False
    best = min(found, key=found.__getitem__)
    inside = min(found) < best < max(found)
    if inside or len(found) >= len(grid) + extensions:
        return [], inside
    return [best / factor if best == min(found) else best * factor], False


def choose(
    groups: Iterable[list[Run]],
    claimed: set[tuple],
    done: set[tuple],
    last: str | None,
    host: Callable[[str], str] = lambda method: method,
) -> Run | None:
    """First group first; within it a worker's own model, then one that nobody has; then any.

    Args:
        groups: the runs that each group needs next.
        claimed, done: keys of runs.
        last: the model that the worker holds; `host` names a method's model.
    """
    taken = {host(key[0]) for key in claimed - done}
    rest: list[Run] = []
    for runs in groups:
        free = [run for run in runs if run.key not in claimed]
        own = [run for run in free if host(run.method) == last]
        fresh = [run for run in free if host(run.method) not in taken]
        if own or fresh:
            return (own or fresh)[0]
        rest += free
    return rest[0] if rest else None


# ------------------------------------------------------------------ workers
class Queue:
    """`plan(results, claimed keys, last method)` says which run comes next."""

    def __init__(self, results: Path, plan: Callable[[list[dict], set, str | None], Run | None]):
        self.rows, self.plan = Rows(results), plan
        self.claims = results.with_suffix(".claims")

    def take(self, last: str | None) -> Run | None:
        with open(self.claims, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            claimed = {tuple(json.loads(line)) for line in file}
            run = self.plan(self.rows.read(), claimed, last)
            if run:
                file.write(json.dumps(run.key) + "\n")
            return run

    def put(self, row: dict) -> None:
        with open(self.claims, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.rows.put(row)


def run_workers(work: Callable, args) -> None:
    """`work(args, gpu)` in a process for each of `args.gpus`, for about `args.seconds`.

    `args.join`: beside another call on these results, whose claims stand.
    """
    import torch

    if not args.join:
        args.results.with_suffix(".claims").unlink(missing_ok=True)
    args.begun = time.time()
    args.deadline = args.begun + args.seconds
    gpus = args.gpus or list(range(torch.cuda.device_count())) or [None]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(args, gpu)) for gpu in gpus]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(f"{len(read(args.results))} runs in {args.results} after {time.time() - args.begun:.0f}s")
