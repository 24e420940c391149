"""What this study compares: trainings of SmolLM2, and banks of experts made of their weights.

A training is what the gradient stages of a recipe do to the weights; all take the same number of
tokens. An arm splits the weights of one training by a recipe and fits its routers. A variant is a
curve of one arm: the same experts under another router, rule or partition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import sparsecraft as sc
from benchmarks.lab.queue import bracket
from sparsecraft.recipe.overrides import override
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.recipe.scorers import Oracle, Similarity
from sparsecraft.recipe.selections import Share, TopK

r = sc.recipes
# Shares of the neurons, by which a curve is drawn. Controls are measured at fewer.
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FEW = (0.2, 0.4, 0.5, 0.6, 0.8)
GRID = (1e-4, 3e-4, 1e-3)
NATURAL = -1.0  # in place of a budget: the recipe's own rule

FINE, COARSE = 128, 48  # experts: 12 neurons in each (D2DMoE), 32 (MoEfication, LTE)


@dataclass(frozen=True)
class Training:
    """Gradient stages of `recipe` on all weights; None: the dense model itself, as it is.

    `rates_of`: the training whose search of a learning rate counts for this one too. `router`:
    its router learns at this many times the learning rate.
    """

    recipe: Callable[[], Recipe] | None
    rates_of: str | None = None
    about: str = ""
    grid: tuple[float, ...] = GRID
    extensions: int = 2
    router: float = 1.0


def _lte(efficiency: float, separability: float = 0.5, **changes) -> Callable[[], Recipe]:
    def make() -> Recipe:
        return override(r.lte(COARSE, efficiency=efficiency, separability=separability), changes)

    return make


def _hoyer(coefficient: float) -> Callable[[], Recipe]:
    def make() -> Recipe:
        recipe = r.d2dmoe(FINE, sparsity_coef=coefficient)
        return override(recipe, {"experts.partition": "contiguous"})  # made later, by the arms

    return make


# LTE's scores start on both sides of the threshold, as those of a plain nn.Linear would.
EVEN = {"router.init": "kaiming_uniform", "router.bias": 0.0}

TRAININGS: Mapping[str, Training] = {
    "untouched": Training(None, about="no training"),
    "dense": Training(None, "dense", "SiLU, the loss of the task alone"),
    "relu": Training(
        lambda: r.moefication(COARSE, partition="random"), "relu", "ReLU put in, the task alone"
    ),
    "hoyer_1e-3": Training(_hoyer(1e-3), "hoyer_1e-3", "ReLU put in, square Hoyer at 1e-3"),
    "hoyer_1e-4": Training(_hoyer(1e-4), "hoyer_1e-3", "ReLU put in, square Hoyer at 1e-4"),
    "lte_0.5": Training(_lte(0.5), "lte_0.5", "soft, then hard; eta 0.5"),
    "lte_2": Training(_lte(2.0), "lte_0.5", "soft, then hard; eta 2"),
    "lte_2_even": Training(
        _lte(2.0, **EVEN), "lte_0.5", "eta 2, scores start around the threshold"
    ),
    "lte_1_free": Training(
        _lte(1.0, 0.0), "lte_0.5", "eta 1, without the separability loss", router=10.0
    ),
    "lte_0.3_free": Training(
        _lte(0.3, 0.0), "lte_0.5", "eta 0.3, without the separability loss", router=10.0
    ),
    "cmoe": Training(
        lambda: r.cmoe(16, 4, shared=2, variant="finetuned"), "cmoe",
        "LoRA on the attention and gains, routing by the split in force",
        grid=(5.95e-5, 6e-4), extensions=0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A curve: changes of the router's spec, another partition, and the shares."""

    spec: Mapping = field(default_factory=dict)
    random: bool = False
    shares: tuple[float, ...] = SHARES


OWN = Variant()
BY_COUNT = {"select": TopK(1), "squash": "none"}
SIMILARITY = Variant({"scorer": Similarity(), **BY_COUNT}, shares=FEW)
ORACLE = Variant({"scorer": Oracle(), **BY_COUNT})
RANDOM_ORACLE = Variant({"scorer": Oracle(), **BY_COUNT}, random=True, shares=FEW)
CONTROLS = {"oracle": ORACLE, "random_oracle": RANDOM_ORACLE, "similarity": SIMILARITY}
BY_NORM = {
    "d2dmoe": OWN,
    "dsti": Variant({"select": Share(0.9)}),
    "top_k": Variant(BY_COUNT, shares=FEW),
    **CONTROLS,
}


@dataclass(frozen=True)
class Arm:
    """Experts and routers made of the weights of a training; `in_place`: they were trained so."""

    recipe: Callable[[], Recipe]
    trainings: tuple[str, ...]
    variants: Mapping[str, Variant]
    in_place: bool = False


LTE = tuple(name for name in TRAININGS if name.startswith("lte"))
ARMS: Mapping[str, Arm] = {
    "d2dmoe": Arm(
        lambda: r.d2dmoe(FINE), ("hoyer_1e-3", "hoyer_1e-4", "relu"), BY_NORM,
    ),
    "moefication": Arm(
        lambda: r.moefication(COARSE), ("relu",), {"moefication": OWN, **CONTROLS}
    ),
    "gmoefication": Arm(
        lambda: r.gmoefication(COARSE), ("dense", "untouched"), {"gmoefication": OWN, **CONTROLS}
    ),
    "d2dmoe_soft": Arm(
        lambda: r.d2dmoe(FINE, sparsity="none"), ("dense", "untouched"), BY_NORM
    ),
    "moefication_soft": Arm(
        lambda: r.moefication(COARSE, relu=False, compensate=False), ("dense",),
        {"moefication": OWN, **CONTROLS},
    ),
    "cmoe8": Arm(lambda: r.cmoe(8, 3, shared=3), ("untouched",), {"cmoe": OWN}),
    "cmoe16": Arm(lambda: r.cmoe(16, 4, shared=2), ("dense", "untouched"), {"cmoe": OWN}),
    "cmoe48": Arm(lambda: r.cmoe(48, 10, shared=5), ("dense", "untouched"), {"cmoe": OWN}),
    "lte": Arm(
        _lte(0.5), LTE, {"lte": OWN, "oracle": ORACLE, "random_oracle": RANDOM_ORACLE},
        in_place=True,
    ),
    "cmoe_tuned": Arm(
        lambda: r.cmoe(16, 4, shared=2, variant="finetuned"), ("cmoe",), {"cmoe": OWN},
        in_place=True,
    ),
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Job:
    """`search` of a learning rate, or `arms` of one training with one seed."""

    kind: str
    training: str
    seed: int = 0


# The most important first. A search comes before the first job that needs its rate.
JOBS = (
    Job("arms", "hoyer_1e-3"),
    Job("arms", "dense"),
    Job("arms", "lte_1_free"),
    Job("arms", "lte_0.5"),
    Job("arms", "relu"),
    Job("arms", "lte_2_even"),
    Job("arms", "untouched"),
    Job("arms", "lte_0.3_free"),
    Job("arms", "cmoe"),
    Job("arms", "hoyer_1e-4"),
    Job("arms", "lte_2"),
    Job("arms", "hoyer_1e-3", 1),
    Job("arms", "dense", 1),
    Job("arms", "lte_1_free", 1),
    Job("arms", "relu", 1),
)


def arms_of(training: str) -> list[str]:
    return [name for name, arm in ARMS.items() if training in arm.trainings]


def rate(rows: list[dict], training: str) -> tuple[float | None, float | None]:
    """The learning rate found for a training, and the next to try; (None, None): it needs none."""
    about = TRAININGS[training]
    if about.rates_of is None:
        return None, None
    own = TRAININGS[about.rates_of]
    found = {row["lr"]: row["objective"] for row in rows
             if row["kind"] == "search" and row["training"] == about.rates_of}  # fmt: skip
    needed, _ = bracket(found, own.grid, 3.0, own.extensions)
    if len(found) < len(own.grid):
        return None, needed[0]
    return min(found, key=lambda lr: found[lr]), needed[0] if needed else None


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the same for all trainings and all arms."""

    steps: int = 128
    search_steps: int = 32
    batch: int = 32
    fit_tokens: int = 65_536
    valid_packs: int = 40  # of each domain
    other_packs: int = 32  # for a learning rate, thresholds and captured masses
    evaluation: int = 40  # packs in one forward pass

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * 512


TINY = Sizes(4, 2, 2, 1024, 1, 2, 2)
TINY_WORDS = 512
