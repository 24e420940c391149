"""Nexus: experts of several domains beside the dense FFN, routed by embeddings of their domains.

Paper: Gritsch, Zhang, Locatelli, Hooker, Ustun. Nexus: Specialization meets Adaptability for
Efficiently Training Mixture of Experts. arXiv 2408.15901, 2024.
Command: sparsecraft convert nexus --model BASE --sources A B --domains a.jsonl b.jsonl --out DIR
"""

from __future__ import annotations

from typing import Literal

from sparsecraft.recipe import (
    Domain,
    Edit,
    FFNSpec,
    Linear,
    Normal,
    Recipe,
    RouterSpec,
    Stage,
    TopK,
    check_variant,
)

VARIANTS = ("paper", "linear")


def nexus(
    num_experts: int = 4,
    variant: Literal["paper", "linear"] = "paper",
    encoder: str = "minilm",
    embedding_dim: int = 384,
    balance_coef: float = 0.05,
    router_std: float = 0.02,
    learning_rate: float = 1e-3,
    paths: str = "*",
) -> Recipe:
    """One expert of several runs beside the dense network; all parameters train.

    Args:
        num_experts: experts beside every feed-forward network, one for each domain.
        variant: `paper` projects embeddings of the domains to the router's rows; `linear` is the
            paper's baseline, a linear router and all else the same.
        encoder: of the domains: a frozen sentence encoder (the packaged `minilm`, a hub id or a
            folder), or `self`, the mean last hidden state of the model that is converted.
        embedding_dim: width of the embeddings; `self` has the model's own.
        balance_coef: weight of the Switch balance loss; 0 turns it off.
        router_std: standard deviation of the router's rows at the start.
        learning_rate: peak of the cosine.
        paths: glob over the paths of the feed-forward networks.
    """
    check_variant(variant, VARIANTS)
    if variant == "paper":
        scorer = Domain(encoder=encoder, dim=embedding_dim, std=router_std)
    else:
        scorer = Linear(start=Normal(router_std))
    # A softmax over the one kept would be one, and the router would not learn.
    router = RouterSpec(scorer=scorer, select=TopK(1, renormalize=False))
    experts = FFNSpec(num_experts=num_experts)
    return Recipe(
        name="nexus",
        title="Experts of several domains beside the dense FFN, routed by domain embeddings",
        paper="Gritsch et al., arXiv 2408.15901, 2024 (Nexus)",
        variant=variant,
        exact_at_start=False,
        others="mean",
        edits=(Edit(site="ffn", paths=paths, place="beside", experts=experts, router=router),),
        stages=(_stage(balance_coef, learning_rate),),
    )


def _stage(balance_coef: float, learning_rate: float) -> Stage:
    return Stage(
        trains=("all",),
        losses={"switch": balance_coef} if balance_coef else {},
        learning_rate=learning_rate,
        schedule="cosine",
        ends_at=0.3,
        warmup_ratio=0.1,
    )
