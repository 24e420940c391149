"""MoLORA: every Linear learns by a soft mixture of LoRAs, each with a router of its own.

Paper: Zadouri, Ustun, Ahmadian, Ermis, Locatelli, Hooker. Pushing Mixture of Experts to the Limit:
Extremely Parameter Efficient MoE for Instruction Tuning. ICLR 2024.
Command: sparsecraft convert molora --model smollm2 --out runs/molora --num-experts 10
"""

from __future__ import annotations

from typing import Literal

from sparsecraft.recipe import Edit, Linear, LoRASpec, Normal, Recipe, RouterSpec, check_variant
from sparsecraft.recipes.mov import PAPER, VARIANTS, cohere_stage, decided, selected, tuned_stage

# The released code leaves out the linear half of a gated feed-forward network.
RELEASED_SITES = ("query", "key", "value", "output", "gate", "down")


def molora(
    num_experts: int = 10,
    rank: int = 4,
    variant: Literal["paper", "released", "tuned"] = "paper",
    alpha: float = 16.0,
    top_k: int | None = None,
    renormalize: bool | None = None,
    router: Literal["token", "sequence", "sentence"] = "token",
    dropout: float = 0.0,
    paths: str = "*",
) -> Recipe:
    """Mixtures of LoRAs on every Linear of attention and FFN.

    Args:
        num_experts: LoRAs at each Linear (paper: 2, 5, 10, 15).
        rank: of each (paper: 4).
        variant: `paper`; `released`, whose code adapts q, k, v, o and, of the FFN, the gate and
            down projections only, with top-k weights that do not sum to one; `tuned` is `paper`
            with AdamW and the learning rates that were best in our benchmark.
        alpha: updates are scaled by alpha / rank.
        top_k: experts per token; None mixes all of them softly, as the paper recommends.
        renormalize: whether the weights of the top k are scaled to sum to one; default yes, and
            no in `released`.
        router: decides for each token, for the mean of a sequence (encoders), or for a frozen
            sentence embedding, the paper's ablation.
        dropout: on the updates' input, in training.
        paths: glob over the paths of the Linears.
    """
    check_variant(variant, VARIANTS)
    released = variant == "released"
    route = RouterSpec(
        scorer=Linear(start=Normal()),
        select=selected(top_k, released, renormalize),
        decides=decided(router),
    )
    experts = LoRASpec(
        num_experts=num_experts, rank=rank, alpha=alpha, dropout=dropout, init="normal"
    )
    return Recipe(
        name="molora",
        title="Mixture of LoRAs on every Linear",
        paper=PAPER,
        variant=variant,
        exact_at_start=True,
        edits=tuple(
            Edit(site=site, paths=paths, place="beside", experts=experts, router=route)
            for site in (RELEASED_SITES if released else ("linear",))
        ),
        stages=(tuned_stage(5e-4, 6.25e-5) if variant == "tuned" else cohere_stage(),),
    )
