"""MoE++: feed-forward experts beside zero-computation experts, routers that go on from each other.

Paper: Jin, Zhu, Yuan, Yan. MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation
Experts. ICLR 2025 (arXiv:2410.07348).
Command: sparsecraft convert moepp --model smollm2 --out runs/moepp --preset 8+4
"""

from __future__ import annotations

from typing import Literal

from sparsecraft.errors import RecipeError
from sparsecraft.recipe import (
    Capacity,
    Edit,
    HeterogeneousSpec,
    Hold,
    Normal,
    Recipe,
    Residual,
    RouterSpec,
    Stage,
    TopK,
    check_variant,
)
from sparsecraft.recipe.numbers import check_whole

VARIANTS = ("paper", "released")
# Feed-forward, constant, copy and zero experts of the paper's models.
PRESETS = {"8+4": (8, 2, 1, 1), "16+4": (16, 2, 1, 1), "32+8": (32, 6, 1, 1)}


def moepp(
    num_experts: int | None = None,
    top_k: int = 2,
    tau: float = 0.75,
    variant: Literal["paper", "released"] = "paper",
    *,
    preset: Literal["8+4", "16+4", "32+8"] | None = None,
    constant: int | None = None,
    copy: int = 1,
    zero: int = 1,
    capacity: float = 1.1,
    hold_steps: int = 500,
    renormalize: bool = True,
    balance_coef: float = 0.01,
    paths: str = "*",
) -> Recipe:
    """Copied experts and experts that compute nothing; all parameters train.

    Args:
        num_experts: feed-forward experts; None: the preset's.
        top_k: experts per token, of all kinds.
        tau: times the tokens of a zero-computation expert that a feed-forward one is meant to get.
        variant: `released` scores by two layers instead of one row for each expert, and gives the
            weight of a token's zero expert to its others.
        preset: numbers of the paper's models, feed-forward + others; None: 8+4 if none is given.
        constant: constant experts; None: num_experts / 4 less copies and zeros, but one at least.
        copy: experts that copy the token.
        zero: experts that give nothing.
        capacity: gamma, the most that an expert takes of its meant load in training; 0: all.
        hold_steps: optimizer steps over which zero-computation experts come into use (paper: 0).
        renormalize: the weights of a token's experts sum to one (paper: they do not).
        balance_coef: beta, the weight of the heterogeneous balance loss; 0 turns it off.
        paths: glob over the paths of the feed-forward networks.
    """
    check_variant(variant, VARIANTS)
    counts = _counts(preset, num_experts, constant, copy, zero)
    released = variant == "released"
    shared = "shared" if released else "lost"
    experts = HeterogeneousSpec(**counts, tau=tau, zero_weight=shared)
    limits = {"capacity": Capacity(factor=capacity) if capacity else None}
    limits |= {"balance": Hold(steps=hold_steps) if hold_steps else None}
    router = RouterSpec(
        scorer=Residual(start=Normal(0.02), hidden=8 if released else None),
        select=TopK(top_k, renormalize=renormalize, **limits),
    )
    return Recipe(
        name="moepp",
        title="Copies of every FFN beside zero-computation experts",
        paper="Jin et al., ICLR 2025 (MoE++)",
        variant=variant,
        exact_at_start=False,
        edits=(Edit(site="ffn", paths=paths, place="replace", experts=experts, router=router),),
        stages=(_stage(balance_coef),),
    )


def _counts(
    preset: str | None, networks: int | None, constant: int | None, copy: int, zero: int
) -> dict[str, int]:
    """How many experts there are of all kinds, and of those that compute nothing.

    Raises:
        RecipeError: an unknown preset, or numbers that are not its own.
    """
    if preset is None and (networks, constant, copy, zero) == (None, None, 1, 1):
        preset = "8+4"
    if preset is not None:
        check_variant(preset, tuple(PRESETS))
        of_preset = PRESETS[preset]
        asked = (networks, constant, None if copy == 1 else copy, None if zero == 1 else zero)
        if any(n not in (None, own) for n, own in zip(asked, of_preset, strict=True)):
            raise RecipeError(
                f"preset is {preset!r}, which has num_experts={of_preset[0]}, "
                f"constant={of_preset[1]}, copy={of_preset[2]} and zero={of_preset[3]}; leave "
                "these out, or the preset."
            )
        networks, constant, copy, zero = of_preset
    networks = 8 if networks is None else networks
    check_whole("num_experts", networks)
    if constant is None:  # 8 + 4 has one more than the paper's formula gives
        constant = 2 if networks == 8 else max(networks // 4 - copy - zero, 1)
    counts = {"constant": constant, "copy": copy, "zero": zero}
    return counts | {"num_experts": networks + sum(counts.values())}


def _stage(balance_coef: float) -> Stage:
    """The paper's first strategy, of 100 billion tokens: 4 million in a batch, 2,048 in a
    sequence; a batch of 128 sequences is what fits here."""
    return Stage(
        trains=("all",),
        losses={"heterogeneous": balance_coef} if balance_coef else {},
        learning_rate=5e-4,
        schedule="cosine",
        ends_at=0.1,
        warmup_steps=2000,
        weight_decay=0.1,
        max_grad_norm=1.0,
    )
