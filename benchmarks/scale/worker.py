"""One training as it is measured, in this process and its siblings: under torchrun, under
`accelerate launch`, or alone. Process 0 writes what all of them found."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

import sparsecraft as sc
from benchmarks.scale.subject import converted
from benchmarks.scale.watch import Clock, Enough, Profile, Strides
from sparsecraft.training import descend


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--recipe", default="camelidae")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--checkpoint", type=Path, help="train to the end and save it here")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--ddp", default="{}", help="JSON of fields of TrainingArguments, a trial")
    asked = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    model = converted(asked.dense, asked.recipe, device)
    clock, strides = Clock(asked.warmup, asked.steps, not asked.checkpoint), Strides()
    callbacks = [clock, strides]
    if asked.profile:
        callbacks.append(Profile(asked.warmup))
    loaded = time.perf_counter() - began
    with watched(callbacks, json.loads(asked.ddp)) as trainers:
        try:
            sc.train(
                model,
                asked.rows,
                asked.checkpoint or asked.out.with_suffix(".never"),
                overwrite=True,
                steps=asked.steps,
                batch_size=asked.batch,
                micro_batch=asked.micro,
                max_length=asked.length,
                log_every=10,
                progress=False,
            )
        except Enough:
            pass
    losses = [(e["step"], e["loss"]) for e in trainers[0].state.log_history if "loss" in e]
    tokens = asked.batch * asked.length * (asked.steps - asked.warmup)
    found = {
        "recipe": asked.recipe,
        "tokens_per_second": tokens / clock.seconds,
        **clock.found(),
        "before_train": loaded,
        "losses": losses,
        "strides": dict(strides.found),
    }
    report(asked, found, callbacks[-1] if asked.profile else None)


@contextmanager
def watched(callbacks: list, changes: dict) -> Iterator[list]:
    """Let the trainers that `train` makes have these callbacks, and changed arguments."""
    make, arguments, trainers = descend.make_trainer, descend.training_arguments, []

    def made(*args, **kwargs):
        trainers.append(trainer := make(*args, **kwargs))
        for callback in callbacks:
            trainer.add_callback(callback)
        return trainer

    def changed(*args, **kwargs):
        return arguments(*args, **kwargs) | changes

    with (
        mock.patch.object(descend, "make_trainer", made),
        mock.patch.object(descend, "training_arguments", changed),
    ):
        yield trainers


def report(asked: argparse.Namespace, found: dict, profile: Profile | None) -> None:
    rank, world = 0, 1
    every = [found["peak_gib"]]
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
        every = [None] * world
        dist.all_gather_object(every, found["peak_gib"])
    if rank == 0:
        found |= {"processes": world, "peak_gib": every}
        asked.out.write_text(json.dumps(found, indent=1))
        print(json.dumps(found), flush=True)
        if profile is not None:
            text = [profile.text, "-- the host waits for the device, in one step"]
            text += [f"{count:5d}  {where}" for where, count in profile.waits.most_common(20)]
            asked.out.with_suffix(".txt").write_text("\n".join(text) + "\n")
            print("\n".join(text), flush=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
