"""Does routing beat the matched dense adapter? Every method at its own best learning rate.

One worker process per GPU; a results file is carried on where it stops.

    python -m benchmarks.pesc.data --data ../shared/data --out packed.npz
    python -m benchmarks.pesc untouched --data packed.npz
    python -m benchmarks.pesc run --data packed.npz
    python -m benchmarks.pesc through-train --data packed.npz    # or --tiny: on a CPU
    python -m benchmarks.pesc table
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.lab.commands import packed_options, run_verb
from benchmarks.lab.queue import run_workers
from benchmarks.pesc.page import table
from benchmarks.pesc.run import smoke, untouched, work
from benchmarks.pesc.through_train import through_train

VERBS = {
    "run": lambda args: run_workers(work, args),
    "smoke": smoke,
    "untouched": untouched,
    "through-train": through_train,
    "table": table,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    packed_options(parser, VERBS, Path(__file__).parent, data="packed.npz", steps=372, batch=24)
    parser.add_argument("--mode", default="graph", choices=("eager", "compile", "graph"))
    parser.add_argument("--modes", nargs="+", default=("eager", "compile", "graph"))
    parser.add_argument("--setup", type=float, default=45, help="seconds a new method may take")
    run_verb(parser, VERBS)


if __name__ == "__main__":
    main()
