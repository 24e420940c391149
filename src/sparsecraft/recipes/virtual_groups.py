"""Virtual groups: every FFN cut into shards, several copies of each behind one router.

Paper: He et al. Upcycling Large Language Models into Mixture of Experts. 2024.
Command: sparsecraft convert virtual_groups --model smollm2 --out runs/groups --num-experts 4
"""

from __future__ import annotations

from sparsecraft.errors import RecipeError
from sparsecraft.recipe import Edit, FFNSpec, Linear, Normal, Recipe, RouterSpec, Stage, TopK

SCALINGS = ("exact", "paper", "none")


def virtual_groups(
    num_experts: int = 8,
    granularity: int = 8,
    top_k: int = 8,
    *,
    scaling: str = "exact",
    renormalize: bool = True,
    router_std: float = 0.02,
    balance_coef: float = 0.01,
    learning_rate: float = 2e-4,
    paths: str = "*",
) -> Recipe:
    """Granular experts that start as the dense model; all parameters train.

    Args:
        num_experts: E, copies of every feed-forward network; there are E * granularity experts.
        granularity: G, shards of a network, f / G neurons each.
        top_k: T, shards per token, a multiple of G.
        scaling: `exact`, in up and down, starts as the dense model if renormalized; `paper`, by one
            root on gate, up and down, does for squared ReLU; `none`.
        renormalize: softmax over the T kept; else over all, better in the paper and not exact.
        router_std: standard deviation of the normal router initialization.
        balance_coef: weight of the Switch balance loss; 0 turns it off.
        learning_rate: peak of the cosine: the one that the dense model was trained with.
        paths: glob over the paths of the feed-forward networks.
    """
    E, G, T = num_experts, granularity, top_k
    _check(G, T, scaling)
    sums_to_one = renormalize or T == E * G
    # At the start, T / G copies of every shard share weights that sum to one, or to T / (E G).
    scale = float(G if sums_to_one else E * G * G / T)
    experts = FFNSpec(num_experts=E * G, granularity=G, scaling=scaling, scale=scale)
    scorer = Linear(start=Normal(router_std), repeat=G)
    router = RouterSpec(scorer=scorer, select=TopK(T, renormalize=renormalize))
    return Recipe(
        name="virtual_groups",
        title="Shards of every FFN, several copies of each",
        paper="He et al., 2024 (Upcycling LLMs into MoE)",
        variant=scaling,
        exact_at_start=sums_to_one and (scaling == "exact" or G == 1),
        edits=(Edit(paths=paths, experts=experts, router=router),),
        stages=(_stage(balance_coef, learning_rate),),
    )


def _check(granularity: int, top_k: int, scaling: str) -> None:
    if scaling not in SCALINGS:
        raise RecipeError(f"scaling is {scaling!r}; it must be {', '.join(SCALINGS)}.")
    if granularity > 0 and top_k % granularity:
        raise RecipeError(
            f"top_k is {top_k} with granularity={granularity}: a token would miss shards of the "
            f"network; make top_k a multiple of {granularity}."
        )


def _stage(balance_coef: float, learning_rate: float) -> Stage:
    return Stage(
        trains=("all",),
        losses={"switch": balance_coef} if balance_coef else {},
        learning_rate=learning_rate,
        schedule="cosine",
        ends_at=0.1,
        weight_decay=0.1,
        batch_size=1024,
        max_length=4096,
    )
