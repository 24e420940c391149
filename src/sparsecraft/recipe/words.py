"""A recipe in a few words, for tables."""

from __future__ import annotations

from collections.abc import Iterable

from sparsecraft.recipe.recipe import Recipe
from sparsecraft.recipe.routers import RouterSpec


def router_words(router: RouterSpec) -> str:
    """A router in a few words, for tables."""
    scorer = router.scorer if router.decides == "token" else f"{router.scorer} by {router.decides}"
    if router.threshold is not None:
        return f"{scorer}, {router.select} {router.threshold:g}"
    if router.select != "top_k":
        return f"{scorer}, {router.select}"
    if router.splits:
        shared = f" beside {router.shared} shared" if router.shared else ""
        return f"{scorer}, top-{router.top_k}{shared}"
    return f"{scorer}, top-{router.top_k}{' renormalized' if router.renormalize else ''}"


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
