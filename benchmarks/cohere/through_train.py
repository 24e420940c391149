"""One arm of this study through `sc.train`, beside the study's own loop."""

from __future__ import annotations

from benchmarks.cohere.arms import ARMS, Run, best_run
from benchmarks.cohere.measures import CoherePacks
from benchmarks.cohere.run import CohereSession
from benchmarks.lab.queue import read
from benchmarks.lab.through_train import packed

ARM = "mov10"


def through_train(args) -> None:
    """Compare the two loops and write what is found into the page."""
    best = best_run(read(args.results), ARM)
    packed(
        args,
        arm=ARM,
        method=ARMS[ARM],
        run=Run(ARM, "linear", best["lr"], 0, best["router_lr"]),
        packs=CoherePacks,
        session=lambda *arguments: CohereSession(*arguments, batches={}),
        command="python -m benchmarks.cohere through-train",
    )
