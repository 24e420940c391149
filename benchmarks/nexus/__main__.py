"""Experts of three domains joined, and a domain added later: BTX, Nexus, BAM and their baselines.

SmolLM2 is trained on each domain apart; every mixture of the three is then trained on the same
steps of all domains, and mixtures of two are extended by the third, with several amounts of data.
A results file is carried on where it stops.

    python -m benchmarks.nexus.data --data ../shared/data --out nexus.npz
    python -m benchmarks.nexus run --data nexus.npz
    python -m benchmarks.nexus through-train --data nexus.npz    # or --tiny: on a CPU
    python -m benchmarks.nexus table
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.lab.commands import run_verb, text_options
from benchmarks.nexus.page import write
from benchmarks.nexus.run import run
from benchmarks.nexus.through_train import through_train

VERBS = {"run": run, "through-train": through_train, "table": write}


def main() -> None:
    parser = argparse.ArgumentParser()
    text_options(parser, VERBS, Path(__file__).parent, "nexus.npz")
    parser.add_argument("--rows", nargs="+", type=Path, help="training files, for upit's buckets")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    run_verb(parser, VERBS)


if __name__ == "__main__":
    main()
