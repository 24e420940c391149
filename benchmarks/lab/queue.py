"""The queue of pesc_quality.py: which run comes next, from the results there are."""

from __future__ import annotations

import fcntl
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

SCHEDULES = ("linear", "constant")
GRIDS = {
    (False, "linear"): (1e-3, 2e-3, 4e-3),
    (False, "constant"): (5e-4, 1e-3, 2e-3),
    (True, "linear"): (1e-4, 2e-4, 4e-4),
    (True, "constant"): (5e-5, 1e-4, 2e-4),
}
EXTENSIONS = 4  # at most, per cell
# Cells of one group are finished, second seed included, before the next group starts.
GROUPS = (
    ("camelidae8", "adapter512", "adapter128", "camel"),
    ("camelidae16", "camelidae4", "camelidae8_nobalance"),
    ("full", "upcycling4"),
    ("camelidae4_nobalance", "camelidae16_nobalance"),
)
FULL = ("full", "upcycling4")


def score(row: dict) -> float:
    return row["mc"] if math.isfinite(row["mc"]) else math.inf


def cell_rows(results: list[dict], method: str, schedule: str, seed: int = 0) -> dict[float, dict]:
    """Learning rate -> the run of one cell."""
    found = [
        r for r in results if (r["method"], r["schedule"], r["seed"]) == (method, schedule, seed)
    ]
    return {r["lr"]: r for r in sorted(found, key=lambda r: r["lr"])}


def best_lr(results: list[dict], method: str, schedule: str) -> tuple[float | None, bool]:
    """The best learning rate of a cell, and whether both its neighbours have been run."""
    rows = cell_rows(results, method, schedule)
    if not rows:
        return None, False
    best = min(rows, key=lambda lr: score(rows[lr]))
    return best, min(rows) < best < max(rows)


def wanted(results: list[dict], method: str, schedule: str) -> list[tuple[float, int]]:
    """The (learning rate, seed) that a cell needs next; nothing when it is finished."""
    grid = GRIDS[method in FULL, schedule]
    rows = cell_rows(results, method, schedule)
    missing = [(lr, 0) for lr in grid if lr not in rows]
    if missing:
        return missing
    best, inside = best_lr(results, method, schedule)
    if not inside and len(rows) < len(grid) + EXTENSIONS:
        return [(best / 2 if best == min(rows) else best * 2, 0)]
    return [] if best in cell_rows(results, method, schedule, 1) else [(best, 1)]


def next_run(results: list[dict], claimed: set, last: str | None) -> tuple | None:
    """(method, schedule, lr, seed): first group first, and a worker's own method before others."""
    done = {_key_of(row) for row in results}
    for group in GROUPS:
        jobs = [
            (method, schedule, lr, seed)
            for method in group
            for schedule in SCHEDULES
            for lr, seed in wanted(results, method, schedule)
        ]
        free = [job for job in jobs if _key(job) not in claimed]
        own = [job for job in free if job[0] == last]
        taken = {key[0] for key in claimed - done}
        fresh = [job for job in free if job[0] not in taken]
        if own or fresh or free:
            return (own or fresh or free)[0]
    return None


def _key(job: tuple) -> tuple:
    method, schedule, lr, seed = job
    return method, schedule, f"{lr:.3g}", seed


def _key_of(row: dict) -> tuple:
    return _key((row["method"], row["schedule"], row["lr"], row["seed"]))


def run_workers(work: Callable, args) -> None:
    """`work(args, gpu)` in a process for each of `args.gpus`, for about `args.seconds`."""
    import torch

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


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Queue:
    """Results and claims in two files, shared by the workers under one lock."""

    def __init__(
        self, results: Path, claims: Path, plan: Callable = next_run, key: Callable = _key
    ):
        self.results, self.claims, self.plan, self.key = results, claims, plan, key

    def take(self, last: str | None) -> tuple | None:
        with open(self.claims, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            claimed = {tuple(json.loads(line)) for line in file}
            job = self.plan(read(self.results), claimed, last)
            if job:
                file.write(json.dumps(self.key(job)) + "\n")
            return job

    def put(self, row: dict) -> None:
        with open(self.claims, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with open(self.results, "a") as out:
                out.write(json.dumps(row) + "\n")
