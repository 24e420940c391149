"""CMoE (Pei et al. 2025): shared and routed experts from activations, without training.

Command: sparsecraft convert cmoe --model smollm2 --out runs/cmoe --num-experts 8
"""

from __future__ import annotations

from typing import Literal

from sparsecraft.recipe import (
    Analytic,
    Edit,
    Fit,
    GateSpec,
    LoRASpec,
    Recipe,
    SplitSpec,
    Stage,
    TopK,
    check_variant,
)

PAPER = "CMoE: Converting Mixture-of-Experts from Dense to Accelerate LLM Inference"


PAPER += " (arXiv:2502.04416)"


VARIANTS = ("paper", "released", "finetuned")


def cmoe(
    num_experts: int = 8,
    top_k: int = 3,
    *,
    shared: int = 3,
    variant: Literal["paper", "released", "finetuned"] = "paper",
    markers: int = 10,
    compensate: bool | None = False,
    paths: str = "*",
) -> Recipe:
    """Split every FFN by what activates its neurons; a neuron of each expert is its router.

    The stage `build` needs 8 samples of 2048 tokens and no gradient.

    Args:
        num_experts: E, the shared ones among them; it has to divide the number of neurons.
        top_k: routed experts per token. The paper's S3A3E8 runs 3 shared and 3 of 5 routed ones.
        shared: experts of the neurons that are active most often; every token has them.
        variant: `paper`; `released`, whose clusters are of one step by L1 distance and whose
            routers read directions and score by size; `finetuned`, the
            paper's 2048 samples of training after `build`, with LoRA on the attention.
        markers: neurons that each token marks.
        compensate: experts that do not run give their mean; the paper's give nothing.
        paths: glob over the paths of the feed-forward networks.
    """
    check_variant(variant, VARIANTS)
    released, tuned = variant == "released", variant == "finetuned"
    experts = SplitSpec(
        num_experts=num_experts,
        partition="activation_released" if released else "activation",
        markers=markers,
        compensate=compensate,
    )
    router = GateSpec(
        scorer=Analytic(normalize=released),
        select=TopK(top_k),
        shared=shared,
        squash="abs" if released else "none",
        weighting="gain" if tuned else "one",
    )
    lora = LoRASpec(rank=8, alpha=32.0, dropout=0.0)
    return Recipe(
        name="cmoe",
        title="Shared and routed groups of neurons, built from a few samples",
        paper=PAPER,
        variant=variant,
        exact_at_start=True,
        edits=(
            Edit(site="ffn", paths=paths, place="replace", experts=experts, router=router),
            *((Edit(site="attention_linear", place="beside", experts=lora),) if tuned else ()),
        ),
        stages=_stages(tuned),
    )


def _stages(tuned: bool) -> tuple[Stage | Fit, ...]:
    """8 samples of 2048 tokens; then, if tuned, 2048 samples at the paper's rates."""
    build = Fit(name="build", loss="none", tokens=16_384, batch_size=8, max_length=2048)
    tune = Stage(
        name="tune",
        trains=("router", "*.lora_*"),
        learning_rate=5.95e-5,
        router_learning_rate=1e-3,
        batch_size=8,
        max_length=2048,
    )
    return (build, tune) if tuned else (build,)
