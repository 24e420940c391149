"""MoEfication (Zhang et al. 2022): split a ReLU network's neurons, run a fifth of them.

Command: sparsecraft convert moefication --model smollm2 --out runs/moefied --num-experts 48
"""

from __future__ import annotations

from typing import Literal

from sparsecraft.errors import RecipeError
from sparsecraft.recipe import (
    MLP,
    Edit,
    Fit,
    GateSpec,
    Oracle,
    Recipe,
    Similarity,
    SplitSpec,
    Stage,
    TopK,
    check_variant,
)

PAPER = "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts (arXiv:2110.01786)"
VARIANTS = ("paper", "released")


def moefication(
    num_experts: int = 64,
    top_k: int | None = None,
    *,
    variant: Literal["paper", "released"] = "paper",
    partition: Literal["kmeans", "coactivation", "random"] = "kmeans",
    router: Literal["mlp", "similarity", "oracle"] = "mlp",
    relu: bool = True,
    compensate: bool | None = None,
    paths: str = "*",
) -> Recipe:
    """Split every FFN into groups of neurons and select groups by a router fitted afterwards.

    Args:
        num_experts: E; it has to divide the number of neurons. The paper has 32 neurons in each,
            E = f / 32.
        top_k: experts per token; None is the paper's 20 %.
        variant: `paper`; or `released`, whose co-activation counts small batches, and whose random
            split goes by position.
        partition: balanced k-means on the first matrix; the co-activation graph; at random.
        router: `mlp`, fitted to what each expert sums up to; `similarity`, to its center, without
            fitting; `oracle`, the sums themselves: a bound that saves nothing.
        relu: put ReLU into the network and train all of it first, as the paper does with BERT.
        compensate: experts that do not run give their mean; None: unless the activation is ReLU.
        paths: glob over the paths of the feed-forward networks.
    """
    check_variant(variant, VARIANTS)
    if variant == "released":
        partition = {"coactivation": "coactivation_released", "random": "contiguous"}.get(
            partition, partition
        )
    top_k = max(1, round(0.2 * num_experts)) if top_k is None else top_k
    experts = SplitSpec(
        num_experts=num_experts,
        partition=partition,
        compensate=False if relu and compensate is None else compensate,
    )
    routing = GateSpec(scorer=scorer_of(router), select=TopK(top_k), weighting="one", target="mass")
    return Recipe(
        name="moefication",
        title="The neurons of every FFN in groups, a fifth of them run",
        paper=PAPER,
        variant=variant,
        exact_at_start=True,
        edits=(Edit(site="ffn", paths=paths, place="replace", experts=experts, router=routing),),
        stages=(*((relufication(),) if relu else ()), router_stage(router)),
    )


def scorer_of(router: str) -> MLP | Similarity | Oracle:
    known = {"mlp": MLP(), "similarity": Similarity(), "oracle": Oracle()}
    if router not in known:
        raise RecipeError(f"router is {router!r}; it must be {' or '.join(known)}.")
    return known[router]


def relufication() -> Stage:
    """Train the whole network with ReLU; the settings are those of the paper's fine-tuning."""
    return Stage(
        name="sparsify",
        trains=("model",),
        activation="relu",
        runs="every",
        learning_rate=2e-5,
        schedule="constant",
        warmup_ratio=0.1,
        batch_size=32,
        max_length=128,
        epochs=3.0,
    )


def router_stage(router: str) -> Fit:
    """MoEfication's regression: Adam, 0.01, 30 epochs of batches of 512 tokens, 10 % held out."""
    loss = "bce" if router == "mlp" else "none"
    return Fit(
        name="router",
        loss=loss,
        epochs=30,
        batch_tokens=512,
        learning_rate=0.01,
        holdout=0.1,
        batch_size=32,
        max_length=128,
    )
