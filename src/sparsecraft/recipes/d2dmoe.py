"""D2DMoE (Szatkowski et al. 2024): sparsify, split, predict each expert's norm, dynamic k.

Command: sparsecraft convert d2dmoe --model smollm2 --out runs/d2d --num-experts 128
"""

from __future__ import annotations

from typing import Literal

from sparsecraft.recipe import (
    Edit,
    Fit,
    GateSpec,
    Norm,
    Recipe,
    Relative,
    SplitSpec,
    Stage,
    check_variant,
)

PAPER = "Exploiting Activation Sparsity with Dense to Dynamic-k Mixture-of-Experts Conversion"


PAPER += " (arXiv:2310.04361)"


VARIANTS = ("paper", "bert", "released")

Sparsity = Literal["relu_hoyer", "relu_l1", "gelu_clamped_l1", "gelu_clamped_hoyer", "none"]


def d2dmoe(
    num_experts: int = 128,
    threshold: float = 0.1,
    *,
    variant: Literal["paper", "bert", "released"] = "paper",
    sparsity: Sparsity | None = None,
    sparsity_coef: float | None = None,
    router_dim: int | None = None,
    compensate: bool | None = None,
    attention_experts: int = 0,
    paths: str = "*",
) -> Recipe:
    """Train for sparse activations, split every FFN, fit routers to the norms of what experts add.

    Args:
        num_experts: E, which divides the neurons. The paper has 1 to 128 neurons in each.
        threshold: an expert runs that reaches this times the largest norm. The paper's figures
            have 0.1, 0.01 and 0.001; its code counts 1 - threshold.
        variant: `paper`, as for Gemma-2B but for the routers (512 wide, 1000 steps there); `bert`,
            as for BERT-base; `released`, the pip package's example, its routers E wide with biases.
        sparsity: loss of the first stage; those called relu also put ReLU into the network. None is
            the variant's: relu_hoyer, or relu_l1.
        sparsity_coef: its weight; None is the variant's. L1 sums over neurons and grows with them.
        router_dim: width inside the router; None is the variant's 128, or in `released` E.
        compensate: experts that do not run give their mean; None: unless the activation is ReLU.
        attention_experts: experts of each attention projection, which a ReLU network of the same
            cost learns to imitate first; 0 leaves attention alone.
        paths: glob over the paths of the feed-forward networks.
    """
    check_variant(variant, VARIANTS)
    router = norm_router(num_experts, threshold, router_dim, released=variant == "released")
    sparsity = sparsity or ("relu_hoyer" if variant == "paper" else "relu_l1")
    return Recipe(
        name="d2dmoe",
        title="Sparsified FFNs in groups, as many run as the token needs",
        paper=PAPER,
        variant=variant,
        exact_at_start=True,
        edits=(
            split_edit(num_experts, router, sparsity, compensate, paths),
            *attention_edits(attention_experts, router),
        ),
        stages=(
            *((distillation(),) if attention_experts else ()),
            *sparsify_stages(variant, sparsity, sparsity_coef),
            norm_stage(variant),
        ),
    )


def norm_router(
    num_experts: int, threshold: float, width: int | None, *, released: bool
) -> GateSpec:
    """Predicts the norm of each expert's output; those run that come near the largest."""
    if width is None:
        width = num_experts if released else 128
    scorer = Norm(hidden=width, bias=0.0 if released else None)
    return GateSpec(
        scorer=scorer, select=Relative(threshold), weighting="one", target="output_norm"
    )


def split_edit(
    num_experts: int, router: GateSpec, sparsity: str, compensate: bool | None, paths: str
) -> Edit:
    """Balanced k-means on the first matrix, the gate's where there is one."""
    if compensate is None and sparsity.startswith("relu"):
        compensate = False
    experts = SplitSpec(num_experts=num_experts, partition="kmeans", compensate=compensate)
    return Edit(site="ffn", paths=paths, place="replace", experts=experts, router=router)


def attention_edits(num_experts: int, router: GateSpec) -> tuple[Edit, ...]:
    if not num_experts:
        return ()
    experts = SplitSpec(num_experts=num_experts, partition="kmeans", compensate=False)
    return (Edit(site="attention_linear", place="imitate", experts=experts, router=router),)


def distillation() -> Fit:
    """Fit the networks that imitate projections: 3 epochs, dropout 0.05, Hoyer 1e-3 from zero."""
    return Fit(
        name="distill",
        what="imitations",
        epochs=3,
        batch_tokens=1024,
        learning_rate=1e-3,
        sparsity=1e-3,
        dropout=0.05,
        batch_size=64,
        max_length=512,
    )


def sparsify_stages(variant: str, sparsity: str, coefficient: float | None) -> tuple[Stage, ...]:
    """Train the whole network with a loss on its activations; no stage without one."""
    if sparsity == "none":
        return ()
    if coefficient is None:
        coefficient = {"paper": 1e-4, "bert": 1e-4, "released": 1e-3}[variant]
    common = {
        "name": "sparsify",
        "trains": ("model",),
        "runs": "every",
        "activation": "relu" if sparsity.startswith("relu") else None,
        "losses": {sparsity: coefficient},
    }
    if variant == "paper":  # Gemma-2B, 1000 steps
        return (
            Stage(
                **common,
                learning_rate=1e-4,
                weight_decay=0.01,
                warmup_ratio=0.05,
                batch_size=1024,
                max_length=1024,
            ),
        )
    return (Stage(**common, learning_rate=2e-5, warmup_ratio=0.0, batch_size=64, max_length=512),)


def norm_stage(variant: str) -> Fit:
    """Regression on norms: Adam at 1e-3. The paper says 10 epochs (BERT) or 1000 steps (Gemma)."""
    return Fit(
        name="router",
        loss="mse",
        epochs=10,
        batch_tokens=1024,
        learning_rate=1e-3,
        batch_size=64,
        max_length=1024 if variant == "paper" else 512,
    )
