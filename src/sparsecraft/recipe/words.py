"""A recipe in a few words, for tables."""

from __future__ import annotations

from collections.abc import Iterable

from sparsecraft.recipe.recipe import Recipe
from sparsecraft.recipe.routers import GateSpec, RouterSpec
from sparsecraft.recipe.selections import Token, TopK


def router_words(router: RouterSpec | GateSpec) -> str:
    """A router in a few words, for tables."""
    select = router.select
    scorer = router.scorer.kind
    if isinstance(router, GateSpec):
        if router.k is None:
            return f"{scorer}, {select.kind} {router.threshold:g}"
        shared = f" beside {router.shared} shared" if router.shared else ""
        return f"{scorer}, top-{router.k}{shared}"
    if router.decides != Token():
        scorer = f"{scorer} by {router.decides.kind}"
    if not isinstance(select, TopK):
        return f"{scorer}, {select.kind}"
    return f"{scorer}, top-{select.k}{' renormalized' if select.renormalize else ''}"


def facts(recipe: Recipe) -> dict[str, str]:
    """What distinguishes a recipe from another, in a few words each."""
    edits = recipe.edits
    return {
        "paper": recipe.paper,
        "placement": _once(f"{e.place} {e.site}" for e in edits),
        "experts": _once(f"{e.experts.num_experts} {e.experts.kind}" for e in edits),
        "router": _once(router_words(e.router) for e in edits if e.router) or "none",
        "exact_at_start": "yes" if recipe.exact_at_start else "no",
    }


def _once(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words))
