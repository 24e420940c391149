"""Omni-SMoLA: many low-rank experts beside every Linear, softly mixed, with sets by modality.

Paper: Wu, Hu, Wang, Pang, Soricut. Omni-SMoLA: Boosting Generalist Multimodal Models with Soft
Mixture of Low-rank Experts. CVPR 2024. Slots: Puigcerver et al. 2024 (Soft MoE).
Command: sparsecraft convert smola --model smollm2 --out runs/smola
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from sparsecraft.errors import RecipeError
from sparsecraft.recipe import (
    Edit,
    Linear,
    LoRASpec,
    Normal,
    Recipe,
    RouterSpec,
    Slots,
    Soft,
    Stage,
)


def smola(
    num_experts: int = 16,
    rank: int = 4,
    mixing: Literal["token", "slots"] = "token",
    modalities: bool = False,
    alpha: float | None = None,
    dropout: float = 0.0,
    paths: str = "*",
) -> Recipe:
    """Soft mixtures of low-rank experts, y = W x + sum_i w_i B_i A_i x.

    Args:
        num_experts: low-rank experts in each set; 16 of rank 4 is our choice, as the text that we
            could read does not say.
        rank: of each.
        mixing: `token` mixes the experts for each token, which decoders need; `slots` gives every
            expert one weighted mean of a sequence's tokens, as Soft MoE does: in encoders, and in
            a causal model over the prefix that `prefix_mask` marks, the other tokens one by one.
        modalities: three sets at every Linear, for all, for text and for visual tokens, which
            `mm_token_type_ids` distinguishes.
        alpha: updates are scaled by alpha / rank; None takes the rank, which is no scale.
        dropout: on the updates' input, in training.
        paths: glob over the paths of the Linears.
    """
    alpha = float(rank) if alpha is None else alpha
    experts = LoRASpec(
        num_experts=num_experts, rank=rank, alpha=alpha, dropout=dropout, init="normal"
    )
    router = RouterSpec(scorer=Linear(start=Normal()), select=_select(mixing))
    edit = Edit(site="linear", paths=paths, place="beside", experts=experts, router=router)
    subsets = ("text", "visual") if modalities else ()
    return Recipe(
        name="smola",
        title="Soft mixture of low-rank experts, by modality if wanted",
        paper="Wu et al., CVPR 2024 (Omni-SMoLA)",
        exact_at_start=True,
        edits=(edit, *(replace(edit, modality=name) for name in subsets)),
        stages=(
            Stage(
                learning_rate=5e-4,
                router_learning_rate=4e-3,
                schedule="linear",
                batch_size=32,
                max_length=1024,
            ),
        ),
    )


def _select(mixing: str) -> Soft | Slots:
    if mixing not in ("token", "slots"):
        raise RecipeError(f"mixing is {mixing!r}; it must be 'token' or 'slots'.")
    return Soft() if mixing == "token" else Slots()
