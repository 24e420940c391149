"""HydraLoRA: LoRAs that share one A, with a soft mixture of several B.

Paper: Tian, Shi, Guo, Li, Xu. HydraLoRA: An Asymmetric LoRA Architecture for Efficient
Fine-Tuning. NeurIPS 2024.
Command: sparsecraft convert hydralora --model smollm2 --out runs/hydralora
"""

from __future__ import annotations

from sparsecraft.recipe import Edit, LoRASpec, Recipe, RouterSpec, Soft, Stage


def hydralora(
    num_experts: int = 4,
    rank: int = 4,
    alpha: float = 32.0,
    dropout: float = 0.05,
    attention: bool = False,
    paths: str = "*",
) -> Recipe:
    """Every Linear of the FFN learns by one shared A and a soft mixture of B.

    Args:
        num_experts: B matrices at each Linear.
        rank: of A and of each B.
        alpha: updates are scaled by alpha / rank.
        dropout: on the updates' input, in training.
        attention: adapt the Linears of attention too; the released scripts adapt the FFN's.
        paths: glob over the paths of the Linears.
    """
    experts = LoRASpec(
        num_experts=num_experts, rank=rank, alpha=alpha, dropout=dropout, shared_a=True
    )
    edit = Edit(
        site="linear" if attention else "ffn_linear",
        paths=paths,
        place="beside",
        experts=experts,
        router=RouterSpec(select=Soft()),
    )
    return Recipe(
        name="hydralora",
        title="Mixture of B matrices over one shared A",
        paper="Tian et al., NeurIPS 2024 (HydraLoRA)",
        exact_at_start=True,
        edits=(edit,),
        stages=(Stage(learning_rate=2e-4, schedule="cosine", batch_size=16, max_length=1024),),
    )
