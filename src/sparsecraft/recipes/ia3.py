"""(IA)3: one vector on keys, values and FFN activations, the dense baseline of MoV.

Paper: Liu, Tam, Muqeeth, Mohta, Huang, Bansal, Raffel. Few-Shot Parameter-Efficient Fine-Tuning is
Better and Cheaper than In-Context Learning. NeurIPS 2022. Training as in Zadouri et al. 2024.
Command: sparsecraft convert ia3 --model smollm2 --out runs/ia3
"""

from __future__ import annotations

from typing import Literal

from sparsecraft.recipe import Edit, Recipe, VectorSpec, check_variant
from sparsecraft.recipes.mov import cohere_stage, tuned_stage


def ia3(variant: Literal["paper", "tuned"] = "paper", paths: str = "*") -> Recipe:
    """Keys, values and the FFN's intermediate activation are scaled by a learned vector.

    Args:
        variant: `paper` trains as the MoV paper trains this baseline; `tuned` uses AdamW and the
            learning rate that was best in our benchmark.
        paths: glob over the paths of the scaled modules.
    """
    check_variant(variant, ("paper", "tuned"))
    vector = VectorSpec(num_experts=1)
    trains = ("experts",)
    return Recipe(
        name="ia3",
        title="Dense baseline: one vector on keys, values and FFN activations",
        paper="Liu et al., NeurIPS 2022 ((IA)3)",
        variant=variant,
        exact_at_start=True,
        edits=tuple(
            Edit(site=site, paths=paths, place="after", experts=vector)
            for site in ("key", "value", "intermediate")
        ),
        stages=(tuned_stage(1e-2, trains=trains) if variant == "tuned" else cohere_stage(trains),),
    )
