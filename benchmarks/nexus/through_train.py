"""One arm of this study through `sc.train`, beside the study's own loop."""

from __future__ import annotations

import torch
from torch import Tensor

import sparsecraft as sc
from benchmarks.lab.through_train import TextPlan, text
from benchmarks.nexus.arms import DOMAINS, MIXTURES, Sizes
from benchmarks.nexus.run import SCHEDULE, NexusTexts, session_of

ARM = "upcycling"  # it needs no experts of domains


def through_train(args) -> None:
    """Compare the two loops and write what is found into the page."""
    sizes, recipe = Sizes(), MIXTURES[ARM][0](sc.recipes)
    rate = sizes.learning_rate

    def packs() -> tuple[Tensor, ...]:
        parts = NexusTexts(args.data, sizes, "cpu").parts
        own = [parts[f"{domain}.train"] for domain in DOMAINS]
        return tuple(torch.cat([part[key] for part in own]) for key in ("ids", "positions"))

    text(
        args,
        arm=ARM,
        convert=lambda model: sc.convert(model, recipe, certify=False, seed=0),
        packs=packs,
        plan=TextPlan(
            amount=(sizes.mix_steps, sizes.batch),
            rates=(rate, rate),
            schedule=SCHEDULE,
            stage=recipe.stages[-1].name,
            changes={"trains": ("all",)},
        ),
        session=lambda model, autocast: session_of(model, rate, autocast),
        command="python -m benchmarks.nexus through-train",
    )
