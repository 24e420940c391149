"""What a mixture and its routers must have before an expert is added or removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sparsecraft.conversion.extension.router_row import FITS
from sparsecraft.errors import DataError, RecipeError
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.surgery.record import Conversion


def count_experts(recipe: Recipe) -> tuple[int, ...]:
    """How many experts the layers have, one number where all have as many; refuse what is not made
    of whole networks."""
    for edit in recipe.edits:
        spec, router = edit.experts, edit.router
        if spec.comes_from != "network" or router is None:
            raise RecipeError(
                f"Recipe {recipe.name!r} has {spec.kind} experts; whole networks (upcycling, btx, "
                "bam, nexus, ...) can come and go."
            )
        if router.standardize is not None:
            raise RecipeError(
                f"router.standardize is {router.standardize}: what an added expert scores would "
                "change the weights of all others. Convert without it to extend later."
            )
        if router.reads_previous:
            raise RecipeError(
                f"The routers of recipe {recipe.name!r} go on from the logits of the layer before, "
                "which have a number of experts; none can come or go. Convert with a linear scorer."
            )
        if spec.shards or router.scorer.shares_rows:
            raise RecipeError(
                f"The experts of recipe {recipe.name!r} are shards of networks, or share rows of "
                "their routers; a whole network is none of them."
            )
    counts = {tuple(e.experts.num_experts for e in edit.layers) for edit in recipe.edits}
    if len(counts) > 1:
        said = " and ".join(", ".join(map(str, numbers)) for numbers in sorted(counts))
        raise RecipeError(
            f"The edits of recipe {recipe.name!r} have {said} experts; one that is added or "
            "removed must be in all of them, which needs as many in each."
        )
    numbers = counts.pop()
    return numbers if len(set(numbers)) > 1 else numbers[:1]


def check_domains(
    record: Conversion, data: Any, old_data: Any, embedding: Tensor | None, rows: str
) -> bool:
    """Whether routers are of domains; refuse what they lack, or have no use for."""
    routers = [edit.router for edit in record.recipe.edits]
    by_domain = any(router.of_domains for router in routers)
    linear = [router for router in routers if not router.of_domains]
    if rows not in (*FITS, "reset"):
        raise RecipeError(f"rows is {rows!r}; it must be 'calibrated', 'ridge' or 'reset'.")
    if embedding is not None and not by_domain:
        raise RecipeError(
            f"An embedding is given and the routers of {record.recipe.name!r} are linear; give "
            "data and old_data, which their new row is fitted to."
        )
    if rows == "reset" and (not linear or any(r.starts_from for r in linear)):
        raise RecipeError(
            "rows='reset' draws the rows of linear routers anew; the routers of "
            f"{record.recipe.name!r} start from domains or data."
        )
    if by_domain and embedding is None and data is None:
        raise DataError(
            "The routers project a row from the embedding of the expert's domain; give data "
            "(--data), or the embedding itself."
        )
    if by_domain and embedding is None and not domains_of(record):
        raise DataError(
            "The model was converted without domains, so that its routers know random embeddings "
            "and no data fits in among them; convert with domains, or give an embedding."
        )
    if linear and rows in FITS:
        if data is None or old_data is None:
            raise DataError(
                "The new row of a linear router is fitted to new and old data; give both (--data, "
                "--old-data), or rows='reset'."
            )
        if not all(router.by_token for router in linear):
            raise RecipeError(
                "A row is fitted to what routers read by token at the layer's input; these decide "
                "otherwise. Use rows='reset'."
            )
    return by_domain


def share_of_source(asked: float | None, count: int) -> float:
    """Lambda, the added expert's share in the parameters that belong to no expert."""
    share = 1 / (count + 1) if asked is None else asked
    if not 0 <= share <= 1:
        raise RecipeError(f"mix is {asked}; it is a share between 0 and 1.")
    return share


def domains_of(record: Conversion) -> Sequence[str]:
    return record.report.get("conversion", {}).get("domains") or ()
