"""Branch-Train-MiX: the feed-forward networks of several dense models as the experts of one.

Paper: Sukhbaatar et al. Branch-Train-MiX: Mixing Expert LLMs into a Mixture-of-Experts LLM.
COLM 2024.
Command: sparsecraft convert btx --model BASE --sources BASE MATH CODE --out runs/btx
"""

from __future__ import annotations

from sparsecraft.errors import RecipeError
from sparsecraft.recipe import (
    Edit,
    FFNSpec,
    Linear,
    Normal,
    Recipe,
    RouterSpec,
    Sample,
    Soft,
    Stage,
    TopK,
)

ROUTINGS = ("top_2", "top_4", "soft", "switch", "sample")


def btx(
    num_experts: int = 4,
    *,
    routing: str = "top_2",
    splitting: int = 1,
    blending: bool = False,
    freeze_experts: bool = False,
    balance_coef: float = 0.01,
    router_std: float = 0.02,
    learning_rate: float = 1e-4,
    paths: str = "*",
) -> Recipe:
    """Experts from several dense models, all else their mean; all parameters train.

    Args:
        num_experts: experts of every feed-forward network; with sources a multiple of their number.
        routing: `top_2` or `top_4` (softmax over those kept), `soft` (all experts), `switch`
            (top-1, weighted by the softmax over all, so that the router learns) or `sample` (one
            drawn in training, the best at inference; the first layer soft).
        splitting: C, experts that each network is cut into; the paper found it worse.
        blending: expert n is the n-th shard of every source; the paper found it much worse.
        freeze_experts: train routers and all other tensors only; the paper found it as good.
        balance_coef: weight of the balance loss; 0 turns it off.
        router_std: standard deviation of the normal router initialization.
        learning_rate: peak of the cosine.
        paths: glob over the paths of the feed-forward networks.
    """
    count = num_experts * splitting
    select = _select(routing, count)
    if blending and splitting > 1:
        raise RecipeError(f"blending with splitting={splitting}; choose one of them.")
    experts = FFNSpec(num_experts=count, granularity=splitting, blend=blending)
    router = RouterSpec(scorer=Linear(start=Normal(router_std)), select=select)
    trains = ("router", "others") if freeze_experts else ("all",)
    return Recipe(
        name="btx",
        title="Feed-forward networks of several dense models behind a router",
        paper="Sukhbaatar et al., COLM 2024 (Branch-Train-MiX)",
        variant=routing,
        exact_at_start=count == 1 or not (routing == "switch" or splitting > 1 or blending),
        others="mean",
        edits=(Edit(site="ffn", paths=paths, place="replace", experts=experts, router=router),),
        stages=(_stage(trains, balance_coef, learning_rate),),
    )


def _select(routing: str, count: int) -> TopK | Soft | Sample:
    if routing not in ROUTINGS:
        raise RecipeError(f"routing is {routing!r}; it must be {' or '.join(ROUTINGS)}.")
    return {
        "top_2": TopK(min(2, count)),
        "top_4": TopK(min(4, count)),
        "soft": Soft(),
        "switch": TopK(1, renormalize=False),
        "sample": Sample(first_soft=True),
    }[routing]


def _stage(trains: tuple[str, ...], balance_coef: float, learning_rate: float) -> Stage:
    return Stage(
        trains=trains,
        losses={"btx": balance_coef} if balance_coef else {},
        learning_rate=learning_rate,
        schedule="cosine",
        ends_at=0.1,
        warmup_steps=100,
        weight_decay=0.1,
        batch_size=1024,
        max_length=4096,
    )
