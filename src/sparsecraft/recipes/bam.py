"""Branch-Attend-Mix: attentions and feed-forward networks of several dense models as experts.

Paper: Zhang et al. BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of
Experts. NeurIPS 2024.
Command: sparsecraft convert bam --model BASE --sources BASE MATH CODE --out runs/bam
"""

from __future__ import annotations

from typing import Literal

from sparsecraft.recipe import (
    AttentionSpec,
    Edit,
    FFNSpec,
    Linear,
    Normal,
    Recipe,
    RouterSpec,
    Soft,
    Stage,
    TopK,
)


def bam(
    num_experts: int = 4,
    kv: Literal["expert", "shared"] = "expert",
    *,
    balance_coef: float = 0.01,
    z_coef: float = 0.001,
    router_std: float = 0.02,
    learning_rate: float = 1e-4,
) -> Recipe:
    """Attention experts, all mixed by the token, beside top-1 feed-forward experts.

    Args:
        num_experts: experts of every attention and of every feed-forward network; with sources a
            multiple of their number.
        kv: keys and values of each attention expert, whose cache is as many times as large, or
            one of both for all (the paper's shared KV).
        balance_coef: weight of the Switch balance loss on the feed-forward routers; the default is
            Switch's, as the paper gives none.
        z_coef: weight of the z-loss on them; the default is ST-MoE's, for the same reason.
        router_std: standard deviation of the normal router initialization.
        learning_rate: peak of the cosine.
    """
    scorer = Linear(start=Normal(router_std))
    attentions = AttentionSpec(num_experts=num_experts, kv=kv)
    soft = RouterSpec(scorer=scorer, select=Soft(), balanced=False)
    networks = FFNSpec(num_experts=num_experts)
    top_1 = RouterSpec(scorer=scorer, select=TopK(1, renormalize=False))
    return Recipe(
        name="bam",
        title="Attentions and feed-forward networks of several dense models",
        paper="Zhang et al., NeurIPS 2024 (BAM)",
        variant=f"{kv}_kv",
        exact_at_start=num_experts == 1,
        others="mean",
        edits=(
            Edit(site="attention", experts=attentions, router=soft),
            Edit(site="ffn", experts=networks, router=top_1),
        ),
        stages=(_stage({"switch": balance_coef, "z": z_coef}, learning_rate),),
    )


def _stage(losses: dict[str, float], learning_rate: float) -> Stage:
    return Stage(
        trains=("all",),
        losses={name: weight for name, weight in losses.items() if weight},
        learning_rate=learning_rate,
        schedule="cosine",
        ends_at=0.1,
        warmup_steps=1000,
        weight_decay=0.1,
        batch_size=1024,
        max_length=2048,
    )
