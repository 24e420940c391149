"""MixLoRA: LoRA experts inside one frozen FFN behind a top-k router, and LoRA on attention.

Paper: Li, Ma, Wang, Ye, Cheng, Tang, et al. MixLoRA: Enhancing Large Language Models Fine-Tuning
with LoRA-based Mixture of Experts. 2024.
Command: sparsecraft convert mixlora --model smollm2 --out runs/mixlora
"""

from __future__ import annotations

from typing import Literal

from sparsecraft.recipe import (
    Edit,
    FFNLoRASpec,
    Linear,
    LoRASpec,
    Normal,
    Recipe,
    RouterSpec,
    Stage,
    TopK,
    check_variant,
)

VARIANTS = ("paper", "released")


def mixlora(
    num_experts: int = 8,
    top_k: int = 2,
    rank: int = 16,
    variant: Literal["paper", "released"] = "paper",
    alpha: float = 32.0,
    dropout: float = 0.05,
    balance_coef: float | None = None,
    attention_rank: int | None = None,
    paths: str = "*",
) -> Recipe:
    """Every FFN becomes E virtual ones that share its weights; attention learns by LoRA.

    Args:
        num_experts: virtual feed-forward networks per layer.
        top_k: experts per token.
        rank: of the LoRAs on gate, up and down of each expert.
        variant: `paper`, or `released`, whose code has 0.001 as the default balance coefficient.
        alpha: updates are scaled by alpha / rank.
        dropout: on the updates' input, in training.
        balance_coef: weight of Mixtral's balance loss; default 0.01, and 0.001 in `released`.
        attention_rank: of attention's LoRA; None takes `rank`, 0 leaves attention frozen.
        paths: glob over the paths of the feed-forward networks.
    """
    check_variant(variant, VARIANTS)
    if balance_coef is None:
        balance_coef = 0.001 if variant == "released" else 0.01
    experts = FFNLoRASpec(num_experts=num_experts, rank=rank, alpha=alpha, dropout=dropout)
    edits = [
        Edit(
            site="ffn", paths=paths, place="inside", experts=experts,
            router=RouterSpec(scorer=Linear(start=Normal()), select=TopK(top_k)),
        )
    ]  # fmt: skip
    attention_rank = rank if attention_rank is None else attention_rank
    if attention_rank:
        attention = LoRASpec(rank=attention_rank, alpha=alpha, dropout=dropout)
        edits.append(Edit(site="attention_linear", place="beside", experts=attention))
    return Recipe(
        name="mixlora",
        title="LoRA experts inside every FFN, LoRA on attention",
        paper="Li et al., 2024 (MixLoRA)",
        variant=variant,
        exact_at_start=True,
        edits=tuple(edits),
        stages=(
            Stage(
                losses={"switch_unnormalized": balance_coef} if balance_coef else {},
                learning_rate=2e-4,
                batch_size=16,
                max_length=512,
                epochs=2.0,
            ),
        ),
    )
