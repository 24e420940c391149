"""LTE, Learn To be Efficient (Zheng et al. 2024): routers and model learn what to leave out.

Command: sparsecraft convert lte --model smollm2 --out runs/lte --num-experts 48
"""

from __future__ import annotations

from typing import Literal

from sparsecraft.recipe import (
    Above,
    Edit,
    GateSpec,
    LinearParts,
    Normal,
    Recipe,
    SplitSpec,
    Stage,
    check_variant,
)

PAPER = "Learn To be Efficient: Build Structured Sparsity in Large Language Models"


PAPER += " (arXiv:2402.06126)"


VARIANTS = ("paper", "tuned")


def lte(
    num_experts: int = 64,
    *,
    variant: Literal["paper", "tuned"] = "paper",
    efficiency: float | None = None,
    separability: float | None = None,
    learning_rate: float = 5e-5,
    paths: str = "*",
) -> Recipe:
    """Train sigmoid routers with the model, then the model with the routers' hard decisions.

    Args:
        num_experts: E; it has to divide the number of neurons. The paper has 32 neurons in each,
            E = f / 32.
        variant: `paper`; `tuned`, ours: without the separability loss, which holds the scores where
            they start, and with routers that learn at ten times the rate.
        efficiency: eta, the weight of the mean squared score; more makes the model sparser. The
            paper's figures go from 0 to 2. None is 0.5, tuned 1.
        separability: lambda, the weight of what keeps scores away from the threshold. None is the
            paper's 0.5, tuned 0.
        learning_rate: of both stages: 5e-5 for GPT-2 and RoBERTa-base, 1.5e-5 for LLaMA-7B.
        paths: glob over the paths of the feed-forward networks.
    """
    check_variant(variant, VARIANTS)
    experts = SplitSpec(num_experts=num_experts, partition="kmeans", compensate=False)
    # sigmoid(2.2) = 0.9: nearly dense at the start, and off the threshold, where the separability
    # loss of the paper is infinite.
    router = GateSpec(
        scorer=LinearParts(start=Normal(0.01), bias=2.2),
        squash="sigmoid",
        select=Above(0.5),
        weighting="one",
    )
    return Recipe(
        name="lte",
        title="Groups of neurons that the model learns to do without",
        paper=PAPER,
        variant=variant,
        exact_at_start=True,
        edits=(Edit(site="ffn", paths=paths, place="replace", experts=experts, router=router),),
        stages=_stages(variant == "tuned", efficiency, separability, learning_rate),
    )


def _stages(
    tuned: bool, efficiency: float | None, separability: float | None, learning_rate: float
) -> tuple[Stage, Stage]:
    if efficiency is None:
        efficiency = 1.0 if tuned else 0.5
    if separability is None:
        separability = 0.0 if tuned else 0.5
    common = {
        "learning_rate": learning_rate,
        "schedule": "linear",
        "warmup_ratio": 0.06,
        "batch_size": 16,
        "max_length": 1024,
    }
    losses = {"lte_efficiency": efficiency, "lte_separability": separability}
    return (
        Stage(
            name="soft",
            trains=("all",),
            runs="soft",
            losses={name: weight for name, weight in losses.items() if weight},
            router_learning_rate=10 * learning_rate if tuned else None,
            **common,
        ),
        Stage(name="hard", trains=("model",), **common),
    )
