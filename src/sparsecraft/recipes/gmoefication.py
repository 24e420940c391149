"""G-MoEfication (Lee et al. 2024): split networks of any activation, keep the means.

Command: sparsecraft convert gmoefication --model smollm2 --out runs/gmoefied --num-experts 48
"""

from __future__ import annotations

from typing import Literal

from sparsecraft.recipe import Edit, GateSpec, Recipe, SplitSpec, TopK, check_variant
from sparsecraft.recipes.moefication import router_stage, scorer_of

PAPER = "Breaking ReLU Barrier: Generalized MoEfication for Dense Pretrained Models (EMNLP 2024)"
TARGETS = {
    "paper": "deviation",
    "squared": "squared_deviation",
    "output_norm": "output_norm",
}


def gmoefication(
    num_experts: int = 64,
    top_k: int | None = None,
    *,
    variant: Literal["paper", "squared", "output_norm"] = "paper",
    partition: Literal["kmeans", "coactivation", "random"] = "kmeans",
    router: Literal["mlp", "similarity", "oracle"] = "mlp",
    paths: str = "*",
) -> Recipe:
    """Split every FFN as it is; a router finds the experts that are far from their mean.

    Args:
        num_experts: E; it has to divide the number of neurons. The released example has 64.
        top_k: experts per token; None is MoEfication's 20 %.
        variant: `paper` sums |a - mean| over an expert (the code's `use_abs`), `squared` its
            square; `output_norm`, ours, is the norm of what the expert adds to its mean.
        partition: balanced k-means on the first matrix, the gate's where there is one; the
            co-activation graph; at random.
        router: `mlp`, `similarity` or `oracle`, as in `moefication`.
        paths: glob over the paths of the feed-forward networks.
    """
    check_variant(variant, tuple(TARGETS))
    top_k = max(1, round(0.2 * num_experts)) if top_k is None else top_k
    experts = SplitSpec(num_experts=num_experts, partition=partition, compensate=True)
    routing = GateSpec(
        scorer=scorer_of(router), select=TopK(top_k), weighting="one", target=TARGETS[variant]
    )
    return Recipe(
        name="gmoefication",
        title="Groups of neurons with any activation; those left out give their mean",
        paper=PAPER,
        variant=variant,
        exact_at_start=True,
        edits=(Edit(site="ffn", paths=paths, place="replace", experts=experts, router=routing),),
        stages=(router_stage(router),),
    )
