"""PESC / Camelidae: adapters as experts on a LoRA-tuned backbone.

Paper: Wu, Zheng, He, Yu. Parameter-Efficient Sparsity Crafting from Dense to Mixture-of-Experts
for Instruction Tuning on General Tasks. EMNLP 2024.
Command: sparsecraft convert camelidae --model smollm2 --out runs/camelid --adapter-dim 64
"""

from __future__ import annotations

from typing import Literal

from sparsecraft.recipe import (
    AdapterSpec,
    Edit,
    LoRASpec,
    Quantize,
    Recipe,
    RouterSpec,
    Stage,
    TopK,
    check_variant,
)

VARIANTS = ("paper", "released")
PAPER = "Wu et al., EMNLP 2024 (PESC / Camelidae)"


def camelidae(
    num_experts: int = 8,
    top_k: int = 2,
    adapter_dim: int | None = None,
    variant: Literal["paper", "released"] = "paper",
    adapter_scale: float = 1.0,
    dropout: float = 0.1,
    balance: Literal["switch", "pesc_released", "none"] | None = None,
    balance_coef: float = 0.01,
    lora_rank: int = 64,
    lora_alpha: float = 16.0,
    quantize: Literal["nf4"] | None = None,
    paths: str = "*",
) -> Recipe:
    """Every FFN output passes through the top-k of E adapters; the backbone learns by LoRA.

    Args:
        num_experts: adapters per feed-forward network (paper: 8; also 4 and 16).
        top_k: adapters per token.
        adapter_dim: bottleneck width; default 512 (paper) or 64 (released training script).
        variant: `paper`, or `released` where the published code differs: width 64, no balance
            loss (the script never turns it on), 512 tokens, 200 warm-up steps. The gradient norm of
            0.3 and the dropout are the code's in both; the paper does not say.
        adapter_scale: factor on the adapters' outputs; published checkpoints say 0.25.
        dropout: on the inputs of adapters and LoRA, in training.
        balance: balance loss; default `switch` (paper, Eq. 10) or `none` (released);
            `pesc_released` is the released code's loss, a constant without gradient.
        balance_coef: weight of the balance loss.
        lora_rank: rank of the backbone's LoRA; 0 leaves the backbone frozen.
        lora_alpha: LoRA's alpha; its update is scaled by alpha / rank.
        quantize: `nf4` keeps the backbone in 4 bits (QLoRA), as the paper does.
        paths: glob over the paths of the feed-forward networks, such as `model.layers.1?.mlp`.
    """
    check_variant(variant, VARIANTS)
    released = variant == "released"
    dim = (64 if released else 512) if adapter_dim is None else adapter_dim
    adapters = AdapterSpec(num_experts=num_experts, dim=dim, dropout=dropout, scale=adapter_scale)
    router = RouterSpec(select=TopK(top_k), reads="input")
    return Recipe(
        name="camelidae",
        title="Adapters as experts after every FFN, LoRA on the backbone",
        paper=PAPER,
        variant=variant,
        exact_at_start=True,
        backbone=quantize and Quantize(quantize),
        edits=(
            Edit(site="ffn", paths=paths, place="after", experts=adapters, router=router),
            *lora_edits(lora_rank, lora_alpha, dropout),
        ),
        stages=(_stage(released, balance or ("none" if released else "switch"), balance_coef),),
    )


def _stage(released: bool, balance: str, balance_coef: float) -> Stage:
    return Stage(
        trains=("experts", "router"),
        losses={} if balance == "none" else {balance: balance_coef},
        learning_rate=2e-4,
        schedule="constant",
        warmup_ratio=0.0 if released else 0.03,
        warmup_steps=200 if released else 0,
        max_grad_norm=0.3,
        batch_size=128,
        max_length=512 if released else 2048,
    )


def lora_edits(rank: int, alpha: float, dropout: float) -> tuple[Edit, ...]:
    """LoRA on every Linear of attention and FFN; no edit when the rank is 0."""
    if not rank:
        return ()
    lora = LoRASpec(rank=rank, alpha=alpha, dropout=dropout)
    return (Edit(site="linear", place="beside", experts=lora),)
