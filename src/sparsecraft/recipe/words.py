"""A recipe in a few words, for tables."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Mapping

from sparsecraft.recipe.edits import Edit
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


def routers_words(edits: Iterable[Edit]) -> list[str]:
    """The routers of some edits in all their layers, each once."""
    layers = (layer for edit in edits for layer in edit.layers)
    return list(dict.fromkeys(router_words(e.router) for e in layers if e.router))


def count_words(edit: Edit) -> str:
    """How many experts stand at a site: `8`, or `2 to 8` where layers differ."""
    counts = sorted({layer.experts.num_experts for layer in edit.layers})
    return " to ".join(dict.fromkeys((str(counts[0]), str(counts[-1]))))


def facts(recipe: Recipe) -> dict[str, str]:
    """What distinguishes a recipe from another, in a few words each."""
    edits = recipe.edits
    return {
        "paper": recipe.paper,
        "placement": _once(f"{e.place} {e.site}" for e in edits),
        "experts": _once(f"{count_words(e)} {e.experts.kind}" for e in edits),
        "router": ", ".join(routers_words(edits)) or "none",
        "exact_at_start": "yes" if recipe.exact_at_start else "no",
    }


SITES = {
    "ffn": "every FFN",
    "attention": "every attention",
    "linear": "every Linear",
    "attention_linear": "every Linear of attention",
    "ffn_linear": "every Linear of the FFN",
    "query": "queries",
    "key": "keys",
    "value": "values",
    "output": "outputs of attention",
    "gate": "gates",
    "down": "down projections",
    "intermediate": "FFN activations",
    "activation": "activation functions",
}
PLACES = {"replace": "in place of", "imitate": "that imitate"}
HEAD = ("recipe", "what it is", "paper", "experts", "router", "exact at the start")


def experts_words(edits: Iterable[Edit]) -> str:
    """What stands where: `8 adapters after every FFN; 1 LoRA beside every Linear`."""
    sites: dict[tuple, list[str]] = {}
    for edit in edits:
        one, several = edit.experts.words
        count = count_words(edit)
        key = (count, one if count == "1" else several, edit.place, edit.modality)
        sites.setdefault(key, []).append(SITES[edit.site])
    said = []
    for (count, experts, place, modality), names in sites.items():
        where = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        of = f" for {modality}" if modality else ""
        said.append(f"{count} {experts} {PLACES.get(place, place)} {where}{of}")
    return "; ".join(said)


def in_table(recipes: Mapping[str, Callable[..., Recipe]], pages: str | None = None) -> str:
    """A table in Markdown of recipes as they are without options, those without a router last.

    Args:
        recipes: name -> function.
        pages: folder of pages that the names link to; None links nothing.
    """

    def order(item: tuple[str, Recipe]) -> tuple:
        name, recipe = item
        experts = recipe.edits[0].experts
        routed = recipe.edits[0].router is not None
        return not routed, experts.parts, not experts.dense_weights, experts.words, name

    rows = [HEAD, ("---",) * len(HEAD)]
    for name, recipe in sorted(((n, make()) for n, make in recipes.items()), key=order):
        variants = typing.get_args(typing.get_type_hints(recipes[name]).get("variant"))
        also = f"; variants {', '.join(f'`{v}`' for v in variants)}" if variants else ""
        rows.append(
            (
                f"`{name}`" if pages is None else f"[`{name}`]({pages}{name}.md)",
                recipe.title,
                recipe.paper + also,
                experts_words(recipe.edits),
                "; ".join(routers_words(recipe.edits)) or "none",
                "yes" if recipe.exact_at_start else "no",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _once(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words))
