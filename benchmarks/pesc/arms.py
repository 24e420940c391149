"""The methods of this study, and which run comes next, from the results there are.

Each cell, a method under a schedule, brackets its learning rate by factors of two (the mean of math
and code validation loss, seed 0); then the best is run with a second seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sparsecraft as sc
from benchmarks.lab.queue import Run, bracket, choose, finite


@dataclass(frozen=True)
class Method:
    """What is compared; `recipe` None is full fine-tuning of the dense model."""

    recipe: Callable | None
    options: Mapping

    @property
    def full(self) -> bool:
        """All weights train: fp32 weights under bf16 autocast, and smaller learning rates."""
        return self.recipe in (None, sc.recipes.upcycling)


def _camelidae(num_experts: int, **options) -> Method:
    same = {"num_experts": num_experts, "top_k": 2, "adapter_dim": 64, "dropout": 0.0}
    return Method(sc.recipes.camelidae, same | options)


METHODS = {
    "camelidae8": _camelidae(8),
    "adapter512": Method(sc.recipes.adapter, {"adapter_dim": 512, "dropout": 0.0}),
    "adapter128": Method(sc.recipes.adapter, {"adapter_dim": 128, "dropout": 0.0}),
    "camel": Method(sc.recipes.camel, {"dropout": 0.0}),
    "camelidae4": _camelidae(4),
    "camelidae16": _camelidae(16),
    "camelidae8_nobalance": _camelidae(8, balance="none"),
    "full": Method(None, {}),
    "upcycling4": Method(sc.recipes.upcycling, {"num_experts": 4, "top_k": 2}),
    "camelidae4_nobalance": _camelidae(4, balance="none"),
    "camelidae16_nobalance": _camelidae(16, balance="none"),
}
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


def cell_rows(results: list[dict], method: str, schedule: str, seed: int = 0) -> dict[float, dict]:
    """Learning rate -> the run of one cell."""
    cell = method, schedule, seed
    found = [r for r in results if (r["method"], r["schedule"], r["seed"]) == cell]
    return {r["lr"]: r for r in sorted(found, key=lambda r: r["lr"])}


def best_lr(results: list[dict], method: str, schedule: str) -> tuple[float | None, bool]:
    """The best learning rate of a cell, and whether both its neighbours have been run."""
    rows = cell_rows(results, method, schedule)
    if not rows:
        return None, False
    best = min(rows, key=lambda lr: finite(rows[lr]["mc"]))
    return best, min(rows) < best < max(rows)


def wanted(results: list[dict], method: str, schedule: str) -> list[Run]:
    """The runs that a cell needs next; nothing when it is finished."""
    found = {lr: finite(row["mc"]) for lr, row in cell_rows(results, method, schedule).items()}
    needed, _ = bracket(found, GRIDS[METHODS[method].full, schedule], 2.0, EXTENSIONS)
    if needed:
        return [Run(method, schedule, lr, 0) for lr in needed]
    best, _ = best_lr(results, method, schedule)
    again = Run(method, schedule, best, 1)
    return [] if best in cell_rows(results, method, schedule, 1) else [again]


def next_run(results: list[dict], claimed: set, last: str | None) -> Run | None:
    groups = (
        [run for name in group for schedule in SCHEDULES for run in wanted(results, name, schedule)]
        for group in GROUPS
    )
    return choose(groups, claimed, {Run.of(row).key for row in results}, last)
