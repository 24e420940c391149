"""Camel: the dense LoRA / QLoRA baseline of the PESC paper, on the same path as Camelidae.

Paper: Wu et al., EMNLP 2024, Table 2 (Camel rows); Hu et al. 2022; Dettmers et al. 2023.
Command: sparsecraft convert camel --model smollm2 --out runs/camel
"""

from __future__ import annotations

from typing import Literal

from sparsecraft.recipe import Quantize, Recipe, Stage
from sparsecraft.recipes.camelidae import PAPER, lora_edits


def camel(
    lora_rank: int = 64,
    lora_alpha: float = 16.0,
    dropout: float = 0.1,
    quantize: Literal["nf4"] | None = None,
) -> Recipe:
    """LoRA on every Linear of attention and FFN, and no experts.

    Args:
        lora_rank: rank of the updates.
        lora_alpha: alpha; the update is scaled by alpha / rank.
        dropout: on the updates' inputs, in training.
        quantize: `nf4` keeps the backbone in 4 bits (QLoRA).
    """
    return Recipe(
        name="camel",
        title="Dense baseline: LoRA on attention and FFN",
        paper=f"{PAPER}, the dense baseline",
        exact_at_start=True,
        backbone=quantize and Quantize(quantize),
        edits=lora_edits(lora_rank, lora_alpha, dropout),
        stages=(Stage(trains=("experts",), max_grad_norm=0.3),),
    )
