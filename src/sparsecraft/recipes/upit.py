"""UpIT: checkpoints of one fine-tuning run as experts, and others that are mixed from them.

Paper: Hui et al. Upcycling Instruction Tuning from Dense to Mixture-of-Experts via Parameter
Merging. ACL 2025 (arXiv:2410.01610).
Command: sparsecraft convert upit --model BASE --sources CKPT1 CKPT2 CKPT3 CKPT4 --out runs/upit
"""

from __future__ import annotations

from typing import Literal

from sparsecraft.errors import RecipeError
from sparsecraft.recipe import (
    Deal,
    Edit,
    ExpansionSpec,
    FFNSpec,
    Linear,
    Normal,
    Recipe,
    RouterSpec,
    Stage,
    TopK,
)


def upit(
    num_experts: int = 8,
    top_k: int = 2,
    *,
    expand: bool = True,
    parents: Literal["least_similar", "random"] = "least_similar",
    drop: float = 0.5,
    sample: float = 0.01,
    alpha: float = 0.5,
    balance_coef: float = 0.01,
    router_std: float = 0.02,
    learning_rate: float = 2e-5,
    router_learning_rate: float | None = None,
    paths: str = "*",
) -> Recipe:
    """Experts from checkpoints of one run, expanded by mixing; experts and routers train.

    Stage `router` assigns a sample of the rows to the experts and trains each expert and its row of
    the routers on its own; stage `train` is top-k training on all rows.

    Args:
        num_experts: experts of every feed-forward network; those beyond the sources are mixed.
        top_k: experts per token, weighted by the softmax over them.
        expand: mix experts until there are `num_experts`; otherwise each source gives as many.
        parents: of a mixed expert: the two least similar ones, or any two (the paper's ablation).
        drop: share of each parent's changes to the base that DARE drops.
        sample: share of the training rows that are assigned, 500 at least and 5000 at most.
        alpha: weight of the language model's loss in stage `router`; 1 - alpha is the routers'.
        balance_coef: weight of the balance loss in stage `train`; 0 turns it off.
        router_std: standard deviation of the normal router initialization.
        learning_rate: of both stages; the paper's for feed-forward experts.
        router_learning_rate: of the routers; None is the same.
        paths: glob over the paths of the feed-forward networks.
    """
    rates = {"learning_rate": learning_rate, "router_learning_rate": router_learning_rate}
    experts = FFNSpec(num_experts=num_experts)
    router = RouterSpec(scorer=Linear(start=Normal(router_std)), select=TopK(top_k))
    return Recipe(
        name="upit",
        title="Checkpoints of one fine-tuning run as experts, others mixed from them",
        paper="Hui et al., ACL 2025 (UpIT)",
        exact_at_start=True,
        others="mean",
        expansion=ExpansionSpec(parents=parents, drop=drop) if expand else None,
        edits=(Edit(site="ffn", paths=paths, place="replace", experts=experts, router=router),),
        stages=(_router_stage(sample, alpha, rates), _train_stage(balance_coef, rates)),
    )


def _router_stage(sample: float, alpha: float, rates: dict) -> Stage:
    """alpha L_lm + (1 - alpha) L_aux, divided by alpha, on rows that are assigned to experts."""
    if not 0 < alpha <= 1:
        raise RecipeError(f"alpha is {alpha}; it must lie in (0, 1].")
    return Stage(
        name="router",
        deal=Deal(sample=sample),
        losses={"own_expert": (1 - alpha) / alpha} if alpha < 1 else {},
        epochs=4.0,
        **rates,
    )


def _train_stage(balance_coef: float, rates: dict) -> Stage:
    return Stage(losses={"switch": balance_coef} if balance_coef else {}, epochs=2.0, **rates)
