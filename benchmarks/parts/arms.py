"""What is compared, and which run comes next, from the results there are.

Every arm brackets its learning rate by factors of two (mean loss of the three domains, seed 0), and
runs its best with a second seed.
"""

from __future__ import annotations

from collections.abc import Callable

import sparsecraft as sc
from benchmarks.lab.queue import Run, bracket, choose, finite

EXPERTS = 8
GRID = (1e-4, 2e-4, 4e-4)
EXTENSIONS = 2  # of the grid, at most
STEPS_HELD = 42  # of MoE++'s, a third of a run


def _with(**changes) -> Callable[[], sc.Recipe]:
    paths = {path.replace("__", "."): value for path, value in changes.items()}
    return lambda: sc.override(sc.recipes.upcycling(EXPERTS, 2), paths)


# Dense fine-tuning is an upcycled network of one copy: the dense model's function, trained by the
# same trainer.
ARMS: dict[str, Callable[[], sc.Recipe]] = {
    "dense": lambda: sc.recipes.upcycling(1, 1, balance_coef=0),
    "upcycling": _with(),
    "moepp": lambda: sc.recipes.moepp(EXPERTS, 2, constant=2, hold_steps=STEPS_HELD),
    "moepp tau .25": lambda: sc.recipes.moepp(EXPERTS, 2, 0.25, constant=2, hold_steps=STEPS_HELD),
    "attentive": lambda: sc.recipes.attentive(EXPERTS, 2),
    "mpoe": lambda: sc.recipes.mpoe(EXPERTS, 2),
    "+ bias": _with(router__select__balance="bias", losses={}),
    "+ through": _with(router__select__through=True),
    "+ relu": _with(router__select="relu", exact_at_start=False, losses={"remoe": 1.0}),
    "+ standardize": _with(router__standardize=1.0),
    "+ capacity": _with(router__select__capacity="first"),
    "+ capacity, adaptive": _with(
        router__select__capacity={"kind": "first", "coefficient": {"kind": "drop_rate"}}
    ),
    "+ residual": _with(router__scorer="residual"),
}


def score(row: dict) -> float:
    return finite(sum(row["loss"].values()) / len(row["loss"]))


def plan(rows: list[dict], claimed: set[tuple], last: str | None) -> Run | None:
    """The next run: all brackets, then the second seeds."""
    done = {Run.of(row).key for row in rows}
    first, second = [], []
    for arm in ARMS:
        found = {r["lr"]: score(r) for r in rows if r["method"] == arm and r["seed"] == 0}
        rates, _ = bracket(found, GRID, 2.0, EXTENSIONS)
        first += [Run(arm, "cosine", rate, 0) for rate in rates]
        if found and not rates:
            second.append(Run(arm, "cosine", min(found, key=found.__getitem__), 1))
    return choose([first, second], claimed, done, last)
