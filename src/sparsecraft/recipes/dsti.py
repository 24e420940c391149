"""DSTI, the first version of D2DMoE (Piorczynski et al. 2023): experts by their cumulative share.

Command: sparsecraft convert dsti --model smollm2 --out runs/dsti --num-experts 128
"""

from __future__ import annotations

from typing import Literal

from sparsecraft.recipe import GateSpec, Norm, Recipe, Share, check_variant
from sparsecraft.recipes.d2dmoe import Sparsity, norm_stage, sparsify_stages, split_edit

PAPER = "Exploiting Transformer Activation Sparsity with Dynamic Inference (arXiv:2310.04361v1)"
VARIANTS = ("paper", "bert")


def dsti(
    num_experts: int = 128,
    threshold: float = 0.9,
    *,
    variant: Literal["paper", "bert"] = "paper",
    sparsity: Sparsity | None = None,
    sparsity_coef: float | None = None,
    router_dim: int = 128,
    compensate: bool | None = None,
    paths: str = "*",
) -> Recipe:
    """As `d2dmoe`, but the best experts run until their norms sum to a share of all.

    Args:
        num_experts: E; it has to divide the number of neurons.
        threshold: the share of the predicted norms that the experts which run have to reach.
        variant: `paper` or `bert`, training as in `d2dmoe`; the first version's own settings are
            not in the text that we read.
        sparsity: loss of the first stage, as in `d2dmoe`.
        sparsity_coef: its weight; None is the variant's.
        router_dim: width inside the router.
        compensate: experts that do not run give their mean; None: unless the activation is ReLU.
        paths: glob over the paths of the feed-forward networks.
    """
    check_variant(variant, VARIANTS)
    routing = GateSpec(
        scorer=Norm(hidden=router_dim),
        select=Share(threshold),
        weighting="one",
        target="output_norm",
    )
    sparsity = sparsity or ("relu_hoyer" if variant == "paper" else "relu_l1")
    return Recipe(
        name="dsti",
        title="Sparsified FFNs in groups, the best run up to a share of their norms",
        paper=PAPER,
        variant=variant,
        exact_at_start=True,
        edits=(split_edit(num_experts, routing, sparsity, compensate, paths),),
        stages=(*sparsify_stages(variant, sparsity, sparsity_coef), norm_stage(variant)),
    )
