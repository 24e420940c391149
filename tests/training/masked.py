"""A training with a gradient mask, by any engine: `python -m tests.training.masked FOLDER`, alone
or under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import sparsecraft as sc
from benchmarks.scale.on_cpu import let_fsdp_run
from tests import tiny
from tests.training import cut

SEED, STEPS = 1, 5  # of which some are masked and some are not


def train(folder: Path, micro_batch: int = 1) -> dict:
    model = tiny.llama()
    recipe = sc.recipes.mpoe(4, 2, balance_coef=0.0)
    changes = {"warmup_steps": 0, "warmup_ratio": 0.0, "weight_decay": 0.1}
    sc.convert(model, sc.override(recipe, changes), certify=False)
    options = {"model": model, "seed": SEED, "steps": STEPS, "learning_rate": 1e-3}
    return cut.train("causal", folder, cut.rows("causal"), micro_batch, **options)


def main() -> None:
    let_fsdp_run()
    folder = Path(sys.argv[1])
    found = train(folder)
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main()
