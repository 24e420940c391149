"""The router that a recipe's router describes, and the tables of what computes its parts.

`register` names further parts, from anywhere, by one line each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sparsecraft.errors import RecipeError
from sparsecraft.moe.routers.attentive import AttentiveScorer
from sparsecraft.moe.routers.domain import DomainScorer
from sparsecraft.moe.routers.moving import BALANCES, SCALES
from sparsecraft.moe.routers.part_scorers import PART_SCORERS
from sparsecraft.moe.routers.residual import ResidualScorer
from sparsecraft.moe.routers.router import BaseGate, Router
from sparsecraft.moe.routers.scorer import Scorer
from sparsecraft.moe.routers.scorers import LinearScorer
from sparsecraft.moe.routers.selectors import Sample, Selector, relu, soft, top_k
from sparsecraft.moe.routers.starts import DOOR, STARTS
from sparsecraft.recipe import balancing, scorers, selections
from sparsecraft.recipe.experts import ExpertsSpec
from sparsecraft.recipe.kinds import called, enter, families_of, named
from sparsecraft.recipe.residual import Residual
from sparsecraft.recipe.routers import RouterSpec

# Called with (its options, width, number of experts, device=, dtype=), and outputs= where it reads
# what experts give, previous= where it reads the logits of the layer before.
SCORERS: dict[type[scorers.ScorerSpec], Callable[..., Scorer]] = {
    scorers.Linear: LinearScorer,
    scorers.Domain: DomainScorer,
    scorers.Attentive: AttentiveScorer,
    Residual: ResidualScorer,
}

# Options -> logits_TE -> weights_TK, indices_TK.
SELECTORS: dict[type[selections.Selection], Callable[[Any], Selector]] = {
    selections.TopK: lambda spec: partial(top_k, k=spec.k, renormalize=spec.renormalize),
    selections.Sample: lambda spec: Sample(),
    selections.Soft: lambda spec: soft,
    selections.ReLU: lambda spec: relu,
    selections.Slots: lambda spec: soft,  # combined by the same softmax
}

TABLES: dict[type, dict[type, Callable]] = {
    scorers.ScorerSpec: SCORERS,
    scorers.PartScorerSpec: PART_SCORERS,
    scorers.Start: STARTS,
    selections.Selection: SELECTORS,
    balancing.Balance: BALANCES,
}


def register(option: type, made: Callable) -> None:
    """Let recipes name a further part of routers, and models have it.

    Args:
        option: a frozen dataclass with a `kind` of its own, below `ScorerSpec`, `PartScorerSpec`,
            `Start`, `Selection` or `Balance` of `sparsecraft.recipe`.
        made: what the table of its family here holds: the class of a scorer, the function that
            fills a new weight, the one that gives a selector, or the class of a state.

    Raises:
        RecipeError: it is no dataclass of such a family with a `kind` of its own, its kind is there
            already, something else computes it already, or `made` cannot be called.
    """
    families = families_of(option)
    table = next((table for base, table in TABLES.items() if base in families), None)
    if table is None:
        raise RecipeError(
            f"{called(option)} is no part of a router: it must be a dataclass below one of "
            f"{', '.join(base.__name__ for base in TABLES)}."
        )
    if not callable(made):
        raise RecipeError(
            f"{called(made)} computes nothing for {option.__name__}: it must be a class or a "
            "function."
        )
    enter(table, option, made)


def build_router(
    spec: RouterSpec,
    width: int,
    num_experts: int,
    *,
    outputs: int | None = None,
    previous: int | None = None,
    experts: ExpertsSpec | None = None,
    **where: Any,
) -> Router:
    """The router that `spec` describes, for tokens of `width` features; of whole experts, that is:
    the parts of a split network have a `Gate`.

    Args:
        outputs: O, features of what experts give, where the scorer reads that.
        previous: experts of the layer before, where there is one and the scorer reads its logits.
        experts: what it chooses among, where they are not all alike.
        where: device and dtype.

    Raises:
        RecipeError: nothing says what computes one of its parts.
    """
    device, given = where.get("device"), {}
    if spec.reads == "experts":
        given["outputs"] = outputs
    if spec.reads_previous:
        given["previous"] = previous
    made = named(SCORERS, spec.scorer, "scorer", DOOR)
    scorer = made(spec.scorer, width, num_experts, **given, **where)
    router = Router(scorer, spec, named(SELECTORS, spec.select, "selector", DOOR)(spec.select))
    router.base_gate = BaseGate(width, **where) if spec.gates_base else None
    balance, coefficient = spec.select.balance, spec.select.coefficient
    if balance is not None:
        made = named(BALANCES, balance, "state", DOOR)
        router.balance = made(balance, num_experts, experts, device=device)
    if coefficient is not None:
        made = SCALES[type(coefficient)]
        router.coefficient = made(coefficient, spec.select.k, num_experts, device=device)
    if experts is not None:
        router.target_load, router.free = experts.load, experts.free
    return router
