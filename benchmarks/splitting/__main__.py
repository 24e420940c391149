"""Dense networks split into experts: loss against the share of neurons that run.

Every training of arms.py takes the same steps over the same text; each of its arms splits the
weights that came of it and fits routers to the same number of tokens. A results file is carried on
where it stops; `speed` measures generation with the models that `run` left in the cache.

    python -m benchmarks.splitting.data --data ../shared/data --out split.npz
    python -m benchmarks.splitting run --data split.npz
    python -m benchmarks.splitting speed --data split.npz
    python -m benchmarks.splitting encoder --data split.npz
    python -m benchmarks.splitting through-train --data split.npz    # or --tiny: on a CPU
    python -m benchmarks.splitting table
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.lab.commands import run_verb, text_options
from benchmarks.splitting import encoder, speed
from benchmarks.splitting.arms import TRAININGS
from benchmarks.splitting.page import write
from benchmarks.splitting.through_train import through_train
from benchmarks.splitting.work import Worker, run

VERBS = {
    "run": run,
    "speed": lambda args: speed.measure(Worker(args)),
    "encoder": encoder.measure,
    "through-train": through_train,
    "table": write,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    text_options(parser, VERBS, Path(__file__).parent, "split.npz")
    parser.add_argument("--trainings", nargs="+", choices=TRAININGS)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--fit-tokens", type=int)
    parser.add_argument("--least", type=float, default=30, help="seconds that an arm may take")
    parser.add_argument("--texts", type=int, help="encoder: so many texts of each source")
    parser.add_argument("--length", type=int, default=128, help="encoder: tokens of each text")
    parser.add_argument("--devices", nargs="+", choices=("cuda", "cpu"), help="of speed")
    parser.add_argument("--threads", type=int, default=2, help="of speed on the CPU")
    run_verb(parser, VERBS)


if __name__ == "__main__":
    main()
