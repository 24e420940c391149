"""Sparse upcycling: every FFN becomes E copies of itself behind a top-k router.

Paper: Komatsuzaki et al. Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints.
ICLR 2023.
Command: sparsecraft convert upcycling --model smollm2 --out runs/upcycled --num-experts 4
"""

from __future__ import annotations

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
)


def upcycling(
    num_experts: int = 8,
    top_k: int = 2,
    renormalize: bool = True,
    router_std: float = 0.02,
    balance_coef: float = 0.01,
    paths: str = "*",
    *,
    noise_std: float = 0.0,
    noise_share: float = 1.0,
) -> Recipe:
    """Copied experts; all parameters train.

    Args:
        num_experts: copies per feed-forward network.
        top_k: experts per token.
        renormalize: weights of the kept experts sum to one, so that the model starts as the
            dense one but the router gets no language-model gradient until the copies differ;
            without it the router learns at once and the start is not exact (the paper found
            renormalizing to help vision and to hurt language a little).
        router_std: standard deviation of the normal router initialization.
        balance_coef: weight of the Switch balance loss; 0 turns it off.
        paths: glob over the paths of the feed-forward networks.
        noise_std: standard deviation of noise on every copy's matrices, so that they differ from
            the first step; the model no longer starts as the dense one.
        noise_share: share of the neurons of each matrix that the noise is on.
    """
    differ = Difference(noise_std=noise_std, noise_share=noise_share)
    experts = FFNSpec(num_experts=num_experts, differ=differ)
    select = TopK(top_k, renormalize=renormalize)
    router = RouterSpec(scorer=Linear(start=Normal(router_std)), select=select)
    return Recipe(
        name="upcycling",
        title="Copies of every FFN behind a top-k router",
        paper="Komatsuzaki et al., ICLR 2023 (Sparse Upcycling)",
        exact_at_start=(renormalize or top_k == num_experts) and not (noise_std and noise_share),
        edits=(Edit(site="ffn", paths=paths, place="replace", experts=experts, router=router),),
        stages=(_stage(balance_coef),),
    )


def _stage(balance_coef: float) -> Stage:
    """The paper goes on with the dense model's own hyperparameters, which no checkpoint says: set
    yours. These are the best of benchmarks/pesc/README.md, constant."""
    return Stage(
        trains=("all",),
        losses={"switch": balance_coef} if balance_coef else {},
        learning_rate=1e-4,
        max_grad_norm=1.0,
    )
