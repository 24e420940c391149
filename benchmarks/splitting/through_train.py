"""One arm of this study through `sc.train`, beside the study's own loop."""

from __future__ import annotations

import sparsecraft as sc
from benchmarks.lab.queue import read
from benchmarks.lab.through_train import TextPlan, text
from benchmarks.splitting.arms import TRAININGS, Sizes, rate
from benchmarks.splitting.run import SCHEDULE, SplitTexts, gradient_stages, rates_of, session_of

ARM = "hoyer_1e-3"


def through_train(args) -> None:
    """Compare the two loops and write what is found into the page."""
    sizes, recipe = Sizes(), TRAININGS[ARM].recipe()
    stage = gradient_stages(recipe)[0]
    rates = rates_of(ARM, rate(read(args.results), ARM)[0])

    def packs() -> tuple:
        texts = SplitTexts(args.data, sizes, "cpu", args.cache)
        return tuple(texts.parts["train"][key][: texts.pool] for key in ("ids", "positions"))

    text(
        args,
        arm=ARM,
        convert=lambda model: sc.convert(model, recipe, certify=False, seed=0),
        packs=packs,
        plan=TextPlan(
            amount=(sizes.steps, sizes.batch),
            rates=rates,
            schedule=SCHEDULE,
            stage=stage.name,
            changes={"weight_decay": stage.weight_decay},
        ),
        session=lambda model, autocast: session_of(model, stage, rates, autocast),
        command="python -m benchmarks.splitting through-train",
    )
