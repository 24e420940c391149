"""One arm of this study through `sc.train`, beside the study's own loop."""

from __future__ import annotations

from benchmarks.lab.packs import Packs
from benchmarks.lab.queue import Run, read
from benchmarks.lab.through_train import packed
from benchmarks.pesc.arms import METHODS, best_lr
from benchmarks.pesc.run import PescSession

ARM = "camelidae8"


def through_train(args) -> None:
    """Compare the two loops and write what is found into the page."""
    rate, _ = best_lr(read(args.results), ARM, "linear")
    packed(
        args,
        arm=ARM,
        method=METHODS[ARM],
        run=Run(ARM, "linear", rate, 0),
        packs=Packs,
        session=PescSession,
        command="python -m benchmarks.pesc through-train",
    )
