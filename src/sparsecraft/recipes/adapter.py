"""One dense adapter after every FFN: the control that Camelidae has to be compared with.

Ours; the PESC paper has no such baseline. An adapter of width E * h has Camelidae's parameters
(less the router's), one of width k * h its active width. Adapters: Houlsby et al. 2019.
Command: sparsecraft convert adapter --model smollm2 --out runs/adapter --adapter-dim 512
"""

from __future__ import annotations

from typing import Literal

from sparsecraft.recipe import AdapterSpec, Edit, Quantize, Recipe, Stage
from sparsecraft.recipes.camelidae import lora_edits


def adapter(
    adapter_dim: int = 512,
    adapter_scale: float = 1.0,
    dropout: float = 0.1,
    lora_rank: int = 64,
    lora_alpha: float = 16.0,
    quantize: Literal["nf4"] | None = None,
    paths: str = "*",
) -> Recipe:
    """Every FFN output passes through one adapter; the backbone learns by LoRA.

    Args:
        adapter_dim: bottleneck width.
        adapter_scale: factor on the adapter's output.
        dropout: on the inputs of adapter and LoRA, in training.
        lora_rank: rank of the backbone's LoRA; 0 leaves the backbone frozen.
        lora_alpha: LoRA's alpha; its update is scaled by alpha / rank.
        quantize: `nf4` keeps the backbone in 4 bits (QLoRA).
        paths: glob over the paths of the feed-forward networks.
    """
    experts = AdapterSpec(num_experts=1, dim=adapter_dim, dropout=dropout, scale=adapter_scale)
    return Recipe(
        name="adapter",
        title="Dense baseline: one adapter after every FFN, LoRA on the backbone",
        paper="control of ours for Wu et al., EMNLP 2024",
        exact_at_start=True,
        backbone=quantize and Quantize(quantize),
        edits=(
            Edit(site="ffn", paths=paths, place="after", experts=experts),
            *lora_edits(lora_rank, lora_alpha, dropout),
        ),
        stages=(Stage(trains=("experts",), max_grad_norm=0.3),),
    )
