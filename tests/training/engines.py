"""A training that ends in the middle of its second epoch, and one that goes on with it, by any
engine: `python -m tests.training.engines FOLDER begin|go-on`, alone or under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.scale.on_cpu import let_fsdp_run
from sparsecraft.training.progress import ProgressBar
from tests.training import cut

# Nine rows in batches of four: three steps are an epoch, and of the last batch of each a row is
# there.
STEPS, STATE, STOP = 6, 4, 5
TASK = "causal"


class Stopped(Exception):
    pass


def stop(self, args, state, control, **kwargs) -> None:
    if state.global_step == STOP:
        raise Stopped


def train(folder: Path, **options) -> dict:
    model = cut.converted(TASK, balance="none")
    options = {"model": model, "steps": STEPS, "log_every": 1, **options}
    return cut.train(TASK, folder, cut.rows(TASK), 1, **options)


def begin(folder: Path) -> None:
    """Train a step beyond the state of the fourth, in the middle of an epoch."""
    plain, ProgressBar.on_step_end = ProgressBar.on_step_end, stop
    try:
        train(folder, save_every=STATE)
    except Stopped:
        pass
    finally:
        ProgressBar.on_step_end = plain


def go_on(folder: Path) -> dict:
    return train(folder, save_every=STATE, resume=True)


def main() -> None:
    let_fsdp_run()
    folder = Path(sys.argv[1])
    if sys.argv[2] == "begin":
        begin(folder)
        return
    found = go_on(folder)
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main()
