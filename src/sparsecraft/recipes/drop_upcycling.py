"""Drop-Upcycling: copies of every FFN, a part of each copy's neurons drawn anew.

Paper: Nakamura et al. Drop-Upcycling: Training Sparse Mixture of Experts with Partial
Re-initialization. ICLR 2025.
Command: sparsecraft convert drop_upcycling --model smollm2 --out runs/drop --ratio 0.5
"""

from __future__ import annotations

from typing import Literal

from sparsecraft.recipe import (
    Difference,
    Edit,
    FFNSpec,
    Linear,
    Normal,
    Recipe,
    RouterSpec,
    Stage,
    TopK,
    Uniform,
    check_variant,
)


def drop_upcycling(
    num_experts: int = 8,
    top_k: int = 2,
    ratio: float = 0.5,
    *,
    variant: Literal["paper", "released"] = "paper",
    router_std: float = 0.02,
    balance_coef: float = 0.02,
    learning_rate: float = 2e-4,
    paths: str = "*",
) -> Recipe:
    """Copied experts with floor(ratio * f) neurons of each drawn anew; all parameters train.

    Args:
        num_experts: copies per feed-forward network.
        top_k: experts per token, weighted by the softmax over them.
        ratio: share of every expert's neurons drawn anew; 0 starts as the dense model.
        variant: `paper` draws the same neurons in gate, up and down; `released`, as the code does,
            others in each of them, permutes the neurons of every expert (the half re-initialized
            upcycling of Qwen2 too), and draws the routers uniformly.
        router_std: standard deviation of the routers' initialization.
        balance_coef: weight of the balance loss in transformers' convention, K at balance.
        learning_rate: peak of the cosine.
        paths: glob over the paths of the feed-forward networks.
    """
    check_variant(variant, ("paper", "released"))
    released = variant == "released"
    start = Uniform(router_std) if released else Normal(router_std)
    differ = Difference(redraw=ratio, redraw_apart=released, permute=released)
    experts = FFNSpec(num_experts=num_experts, differ=differ)
    router = RouterSpec(scorer=Linear(start=start), select=TopK(top_k))
    return Recipe(
        name="drop_upcycling",
        title="Copies of every FFN, a part of their neurons drawn anew",
        paper="Nakamura et al., ICLR 2025 (Drop-Upcycling)",
        variant=variant,
        exact_at_start=ratio == 0,
        edits=(Edit(site="ffn", paths=paths, place="replace", experts=experts, router=router),),
        stages=(_stage(balance_coef, learning_rate),),
    )


def _stage(balance_coef: float, learning_rate: float) -> Stage:
    return Stage(
        trains=("all",),
        losses={"switch_unnormalized": balance_coef} if balance_coef else {},
        learning_rate=learning_rate,
        schedule="cosine",
        ends_at=0.1,
        warmup_steps=2000,
        weight_decay=0.1,
        max_grad_norm=1.0,
        batch_size=1024,
        max_length=4096,
    )
