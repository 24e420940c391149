"""The arms of this study, and which run comes next, from the results there are.

Every arm brackets its experts' learning rate by factors of two, at a fixed learning rate of the
router; then, at the best, the router's by factors of four; then runs the best with a second seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import sparsecraft as sc
from benchmarks.lab import queue
from benchmarks.lab.queue import bracket, choose, finite


@dataclass(frozen=True)
class Arm:
    """What is compared.

    Attributes:
        rate, router: where the learning rates' grids start; `router` None has no router to train.
        like: the arm whose best learning rates are the start once they are known.
        extra: (schedule, learning rate) to run beside, of experts and router alike.
        search: whether learning rates are bracketed; `extra` alone is run otherwise.
        host: the arm whose model this one shares; it differs in what a run does with it.
    """

    recipe: Callable | None
    options: Mapping = field(default_factory=dict)
    rate: float = 1e-3
    router: float | None = None
    like: str | None = None
    optimizer: str = "adamw"
    extra: tuple[tuple[str, float], ...] = ()
    search: bool = True
    host: str | None = None
    full = False


def _lora(rank: int, **more) -> Arm:
    # Every LoRA, alone or in a mixture, has the scale 4 that rank 4 has in the paper.
    return Arm(sc.recipes.lora, {"rank": rank, "alpha": 4.0 * rank}, 1e-3, like="lora4", **more)


def _mov(num_experts: int = 10, like: str | None = "mov10", **options) -> Arm:
    options = {"num_experts": num_experts} | options
    return Arm(sc.recipes.mov, options, rate=1e-2, router=1e-3, like=like)


def _molora(num_experts: int, like: str | None = "molora5", **options) -> Arm:
    options = {"num_experts": num_experts} | options
    return Arm(sc.recipes.molora, options, rate=2e-3, router=1e-3, like=like)


PAPER_RATE = (("constant", 3e-4),)
FACTORED = {"optimizer": "adafactor", "search": False}
RATES = (*PAPER_RATE, ("constant", 3e-3), ("constant", 3e-2))
RAW = {"top_k": 2, "renormalize": False}
RANKS = (1, 2, 3, 4, 8, 9, 11, 16, 22, 45, 72)
MOV10 = {"num_experts": 10}
ARMS: dict[str, Arm] = {
    "untouched": Arm(None, search=False, extra=(("constant", 0.0),), host="ia3"),
    "ia3": Arm(sc.recipes.ia3, rate=1e-2),
    **{f"lora{rank}": _lora(rank) for rank in RANKS},
    "lora4": Arm(sc.recipes.lora, {"rank": 4, "alpha": 16.0}, 1e-3, extra=PAPER_RATE),
    "mov10": Arm(sc.recipes.mov, MOV10, 1e-2, router=1e-3, extra=PAPER_RATE),
    "mov30": _mov(30),
    "molora2": _molora(2),
    "molora5": _molora(5, None),
    "molora10": _molora(10),
    "smola": Arm(sc.recipes.smola, rate=4e-3, router=1e-3),
    "mov10_uniform": Arm(sc.recipes.mov, MOV10, 1e-2, like="mov10", host="mov10"),
    "mov10_top2": _mov(top_k=2),
    "mov10_top2_raw": _mov(**RAW),
    "mov10_sentence": _mov(router="sentence"),
    "mov10_released": _mov(variant="released"),
    "mov10_released_top2": _mov(variant="released", top_k=2),
    "molora5_uniform": Arm(
        sc.recipes.molora, {"num_experts": 5}, 2e-3, like="molora5", host="molora5"
    ),
    "molora5_top2": _molora(5, top_k=2),
    "molora5_top2_raw": _molora(5, **RAW),
    "molora5_sentence": _molora(5, router="sentence"),
    "mov10_adafactor": Arm(sc.recipes.mov, MOV10, router=1.0, extra=RATES, **FACTORED),
    "lora4_adafactor": Arm(sc.recipes.lora, {"rank": 4}, extra=RATES, **FACTORED),
}
# Arms of one group are finished before the next group starts.
GROUPS = (
    ("ia3", "untouched", "mov10", "mov10_uniform", "lora4"),
    ("molora5", "molora5_uniform", "lora22", "mov30", "lora11", "smola", "lora72"),
    ("mov10_top2", "mov10_top2_raw", "mov10_sentence"),
    ("molora2", "lora9", "molora10", "lora45", "lora8", "lora16", "lora1"),
    ("mov10_adafactor", "lora4_adafactor", "mov10_released", "mov10_released_top2"),
    ("molora5_sentence", "molora5_top2", "molora5_top2_raw", "lora3", "lora2"),
)
EXTENSIONS = 4  # of one grid, at most


@dataclass(frozen=True)
class Run(queue.Run):
    """One training of an arm; its router has a learning rate of its own."""

    router_lr: float = 0.0

    @property
    def rates(self) -> tuple[float, ...]:
        return self.lr, self.router_lr


def host(name: str) -> str:
    """The arm whose model `name` trains."""
    return ARMS[name].host or name


def uniform(name: str) -> bool:
    """A router that stays at zero: every expert has the same weight, always."""
    return name.endswith("_uniform")


def score(row: dict) -> float:
    """What selects: the loss on held-out examples of the training tasks."""
    return finite(row["valid"]["held_out"])


def runs_of(results: list[dict], name: str, seed: int = 0) -> list[dict]:
    """The runs of an arm's own search, without its extra ones."""
    found = [r for r in results if r["method"] == name and r["seed"] == seed and "valid" in r]
    extra = {(schedule, f"{lr:.3g}") for schedule, lr in ARMS[name].extra}
    return [r for r in found if (r["schedule"], f"{r['lr']:.3g}") not in extra]


def best_run(results: list[dict], name: str) -> dict | None:
    return min(runs_of(results, name), key=score, default=None)


def _start(results: list[dict], name: str) -> tuple[float, float]:
    """Where the two grids of an arm start; fixed once it has run."""
    arm, own = ARMS[name], runs_of(results, name)
    if own:
        return own[0]["lr"], own[0]["router_lr"]
    known = best_run(results, arm.like) if arm.like else None
    if known is None:
        return arm.rate, arm.router or 0.0
    router = known["router_lr"] or arm.router
    return known["lr"], router if arm.router else 0.0


def grids(results: list[dict], name: str) -> dict[str, tuple[list[float], bool, float]]:
    """Learning rates of experts and router: what is needed next, whether bracketed, the best."""
    rate, router = _start(results, name)
    own = runs_of(results, name)
    first = {r["lr"]: score(r) for r in own if math.isclose(r["router_lr"], router, rel_tol=1e-3)}
    best = min(first, key=first.get, default=rate)
    out = {"lr": (*_around(first, rate, 2.0), best)}
    if ARMS[name].router and not out["lr"][0]:
        second = {r["router_lr"]: score(r) for r in own if r["lr"] == best}
        out["router_lr"] = (*_around(second, router, 4.0), min(second, key=second.get))
    return out


def _around(found: dict[float, float], start: float, factor: float) -> tuple[list[float], bool]:
    return bracket(found, (start, start * factor, start / factor), factor, EXTENSIONS)


def done_in(results: list[dict]) -> set[tuple]:
    return {Run.of(row).key for row in results if "valid" in row}


def wanted(results: list[dict], name: str) -> list[Run]:
    """The runs that an arm needs next; nothing when it is finished."""
    arm, done = ARMS[name], done_in(results)
    routed = bool(arm.router)
    extra = [Run(name, schedule, lr, 0, lr if routed else 0.0) for schedule, lr in arm.extra]
    extra = [run for run in extra if run.key not in done]
    if not arm.search:
        return extra
    router = _start(results, name)[1]
    found = grids(results, name)
    if found["lr"][0]:
        return [Run(name, "linear", lr, 0, router) for lr in found["lr"][0]]
    if "router_lr" in found and found["router_lr"][0]:
        return [Run(name, "linear", found["lr"][2], 0, lr) for lr in found["router_lr"][0]]
    best = best_run(results, name)
    again = Run(name, "linear", best["lr"], 1, best["router_lr"])
    return ([] if again.key in done else [again]) + extra


def next_run(results: list[dict], claimed: set, last: str | None) -> Run | None:
    failed = {row["method"] for row in results if "failed" in row}
    groups = (
        [run for name in group if name not in failed for run in wanted(results, name)]
        for group in GROUPS
    )
    return choose(groups, claimed, done_in(results), last, host)
