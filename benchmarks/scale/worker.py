"""One training as it is measured, in this process and its siblings: under torchrun, under
`accelerate launch`, or alone. Process 0 writes what all of them found."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import sparsecraft as sc
from benchmarks.scale.on_cpu import let_fsdp_run
from benchmarks.scale.subject import converted
from benchmarks.scale.watch import Clock, Enough, Prints, Profile, Strides
from sparsecraft.training import descend

IDS = torch.arange(3, 67).reshape(2, 32)  # what the logits of a checkpoint are compared on


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--recipe", default="camelidae")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--checkpoint", type=Path, help="where `train` writes")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--leave-at", type=int, help="leave `train` behind this step, unsaved")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--save-every", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--prints", type=int, nargs="*", default=(), help="digests behind them")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--arguments", default="{}", help="JSON of fields of TrainingArguments")
    return parser.parse_args()


def main() -> None:
    began, asked = time.perf_counter(), options()
    let_fsdp_run()
    if asked.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    model = converted(asked.dense, asked.recipe, device, getattr(torch, asked.dtype))
    clock, strides = Clock(asked.warmup, asked.steps, asked.leave_at), Strides()
    prints = Prints(tuple(asked.prints))
    callbacks: list[Any] = [clock, strides, prints]
    profile = Profile(asked.warmup) if asked.profile else None
    callbacks += [profile] if profile else []
    loaded = time.perf_counter() - began
    with watched(callbacks, json.loads(asked.arguments)) as trainers, suppress(Enough):
        sc.train(
            model,
            asked.rows,
            asked.checkpoint or asked.out.with_suffix(".never"),
            overwrite=True,
            resume=asked.resume,
            steps=asked.steps,
            batch_size=asked.batch,
            micro_batch=asked.micro,
            max_length=asked.length,
            save_every=asked.save_every,
            learning_rate=asked.rate,
            log_every=10,
            progress=False,
        )
    history = [entry for trainer in trainers for entry in trainer.state.log_history]
    tokens = asked.batch * asked.length * (asked.steps - asked.warmup)
    found = {
        "recipe": asked.recipe,
        "tokens_per_second": tokens / clock.seconds if clock.seconds else 0.0,
        **clock.found(),
        "before_train": loaded,
        "losses": [(e["step"], e["loss"]) for e in history if "loss" in e],
        "prints": prints.found,
        "strides": dict(strides.found),
    }
    if asked.checkpoint and not asked.leave_at:
        keep_logits(model, asked.checkpoint)
    report(asked.out, found, profile)


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


def keep_logits(model: nn.Module, checkpoint: Path) -> None:
    """Beside a checkpoint, what the model in memory gives."""
    with torch.no_grad():
        logits = model.eval()(IDS.to(next(model.buffers()).device)).logits
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(logits.float().cpu(), checkpoint.with_suffix(".logits"))


def report(out: Path, found: dict, profile: Profile | None) -> None:
    names = ("peak_gib", "peak_before_gib")
    own = [found[name] for name in names]
    rank, every = 0, [own]
    if dist.is_initialized():
        rank, every = dist.get_rank(), [None] * dist.get_world_size()
        dist.all_gather_object(every, own)
    if rank == 0:
        found |= {"processes": len(every)}
        found |= {name: [peaks[i] for peaks in every] for i, name in enumerate(names)}
        out.write_text(json.dumps(found, indent=1))
        if profile is not None:
            text = [profile.text, "-- the host waits for the device, in one step"]
            text += [f"{count:5d}  {where}" for where, count in profile.waits.most_common(20)]
            out.with_suffix(".txt").write_text("\n".join(text) + "\n")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
