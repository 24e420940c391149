"""MPOE: copied experts whose matrices are products of five cores, the central one shared.

Paper: Gao, Liu, Zhao, Lu, Wen. Parameter-Efficient Mixture-of-Experts Architecture for Pre-trained
Language Models. COLING 2022 (arXiv:2203.01104).
Command: sparsecraft convert mpoe --model smollm2 --out runs/mpoe --num-experts 8
"""

from __future__ import annotations

from typing import Literal

from sparsecraft.recipe import (
    Edit,
    Linear,
    MPOSpec,
    Normal,
    Recipe,
    RouterSpec,
    Stage,
    TopK,
    check_variant,
)
from sparsecraft.recipe.numbers import check_whole

VARIANTS = ("paper", "released")


def mpoe(
    num_experts: int = 8,
    top_k: int = 2,
    variant: Literal["paper", "released"] = "paper",
    *,
    bond: int | None = None,
    mask: float | None = None,
    router_std: float = 0.02,
    balance_coef: float = 0.01,
    paths: str = "*",
) -> Recipe:
    """Experts that share the central core of every matrix; all parameters train.

    Args:
        num_experts: networks for each feed-forward network (paper: 8, 12, 16).
        top_k: experts per token, weighted by the softmax over them.
        variant: `paper` masks the gradient of the central cores; the released code does not.
        bond: largest number of terms between two cores; the matrices are then approximations and
            the model does not start as the dense one. None keeps all.
        mask: probability with which a step leaves the central cores as they are. None: 1 - k / E
            in `paper`, so that they are updated about as often as an expert meets a token; 0 in
            `released`.
        router_std: standard deviation of the normal router initialization.
        balance_coef: weight of the Switch balance loss; 0 turns it off.
        paths: glob over the paths of the feed-forward networks.
    """
    check_variant(variant, VARIANTS)
    check_whole("num_experts", num_experts)
    check_whole("top_k", top_k)
    if mask is None:
        mask = max(0.0, 1 - top_k / num_experts) if variant == "paper" else 0.0
    experts = MPOSpec(num_experts=num_experts, bond=bond, mask=mask)
    router = RouterSpec(scorer=Linear(start=Normal(router_std)), select=TopK(top_k))
    return Recipe(
        name="mpoe",
        title="Networks of five-core matrices with a shared central core",
        paper="Gao et al., COLING 2022 (MPOE)",
        variant=variant,
        exact_at_start=bond is None,
        edits=(Edit(site="ffn", paths=paths, place="replace", experts=experts, router=router),),
        stages=(_stage(balance_coef),),
    )


def _stage(balance_coef: float) -> Stage:
    """The released configuration of T5-base on single tasks of GLUE; its label smoothing of 0.1 is
    not ours."""
    return Stage(
        trains=("all",),
        losses={"switch": balance_coef} if balance_coef else {},
        learning_rate=2e-6,
        warmup_steps=320,
        batch_size=32,
        max_length=128,
    )
