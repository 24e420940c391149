"""MoV, MoLORA, SMoLA and their dense baselines on P3: does routing beat the matched LoRA?

A queue over the arms of arms.py. Each brackets the learning rate of its experts, then that of its
router, by the loss on held-out examples, and runs its best with a second seed. One worker process
per GPU; a results file is carried on where it stops.

    python -m benchmarks.cohere.data --data ../shared/data --out cohere.npz
    python -m benchmarks.cohere run --data cohere.npz
    python -m benchmarks.cohere through-train --data cohere.npz    # or --tiny: on a CPU
    python -m benchmarks.cohere table
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.cohere.page import table
from benchmarks.cohere.run import smoke, work
from benchmarks.cohere.through_train import through_train
from benchmarks.lab.commands import packed_options, run_verb
from benchmarks.lab.queue import run_workers

VERBS = {
    "run": lambda args: run_workers(work, args),
    "smoke": smoke,
    "through-train": through_train,
    "table": table,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    packed_options(parser, VERBS, Path(__file__).parent, data="cohere.npz", steps=248, batch=16)
    modes = ("eager", "compile", "eager_graph", "graph")
    parser.add_argument("--mode", default="graph", choices=modes)
    parser.add_argument("--setup", type=float, default=20, help="seconds a new method may take")
    run_verb(parser, VERBS)


if __name__ == "__main__":
    main()
