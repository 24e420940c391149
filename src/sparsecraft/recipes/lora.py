"""LoRA on every Linear: the dense baseline of MoLORA.

Paper: Hu et al. LoRA: Low-Rank Adaptation of Large Language Models. ICLR 2022. Training as in
Zadouri et al. 2024.
Command: sparsecraft convert lora --model smollm2 --out runs/lora --rank 16
"""

from __future__ import annotations

import math
from typing import Literal

from sparsecraft.recipe import Edit, LoRASpec, Recipe, check_variant
from sparsecraft.recipes.molora import RELEASED_SITES
from sparsecraft.recipes.mov import VARIANTS, cohere_stage, tuned_stage


def lora(
    rank: int = 4,
    variant: Literal["paper", "released", "tuned"] = "paper",
    alpha: float | None = None,
    dropout: float = 0.0,
    paths: str = "*",
) -> Recipe:
    """One LoRA on every Linear of attention and FFN.

    Args:
        rank: of the updates (the MoV paper's baselines: 4, 8, 16).
        variant: `paper`; `released` adapts q, k, v, o, gate and down only, as the MoV paper's code
            does; `tuned` is `paper` with AdamW and a learning rate fitted to the best ones of our
            benchmark.
        alpha: updates are scaled by alpha / rank; None takes 16, and in `tuned` four times the
            rank, the scale that 16 gives rank 4, with a learning rate that falls as the rank rises.
        dropout: on the updates' input, in training.
        paths: glob over the paths of the Linears.
    """
    check_variant(variant, VARIANTS)
    tuned = variant == "tuned"
    if alpha is None:
        alpha = 4.0 * rank if tuned else 16.0
    experts = LoRASpec(rank=rank, alpha=alpha, dropout=dropout, init="normal")
    trains = ("experts",)
    # Through the best rates measured at rank 1, 4 and 16; within a factor of two up to rank 72.
    rate = 1e-3 / math.sqrt(rank)
    return Recipe(
        name="lora",
        title="Dense baseline: one LoRA on every Linear",
        paper="Hu et al., ICLR 2022 (LoRA)",
        variant=variant,
        exact_at_start=True,
        edits=tuple(
            Edit(site=site, paths=paths, place="beside", experts=experts)
            for site in (RELEASED_SITES if variant == "released" else ("linear",))
        ),
        stages=(tuned_stage(rate, trains=trains) if tuned else cohere_stage(trains),),
    )
