"""One training of an arm by `sc.train`, and its measures; workers that share a queue of them.

Workers that share a GPU say nothing of an arm's speed: `speed` trains each arm alone, some steps.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import sparsecraft as sc
from benchmarks.lab.clocks import about, sync
from benchmarks.lab.queue import Queue, Run
from benchmarks.parts.arms import ARMS, plan
from sparsecraft.dense import hub
from sparsecraft.dense.loading import load_tokenizer
from tests import tiny

DOMAINS = ("general", "math", "code")
SIZES = {"steps": 130, "batch": 64, "length": 512}
TINY = {"steps": 6, "batch": 4, "length": 64}
TIMED = (4, 14)  # the steps between which `speed` looks at the clock
NEVER = 10**6  # steps between states: one is as long to write as a part of the run to train
MICRO_BATCH = {"attentive": 16}  # whose experts all run


def work(args, gpu: int | None) -> None:
    """Runs of the queue until the time is up."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    logging.disable(logging.INFO)
    queue, last = Queue(args.results, plan), None
    while time.time() < args.deadline and (next_run := queue.take(last)):
        last = next_run.method
        queue.put(one(args, next_run))


def one(args, asked) -> dict:
    """One training and its measures."""
    sizes, begun = sizes_of(args, asked.method), time.time()
    rows = tiny_rows(args.work) if args.tiny else args.work
    model, tokenizer, recipe = start(args, asked)
    # A stage that trains the router alone has a sixth of the steps, at its recipe's own rate.
    last = sizes["steps"] // 6
    shares = [sizes["steps"]] if len(recipe.stages) == 1 else [sizes["steps"] - last, last]
    files, reports = [rows / f"{d}.train.jsonl" for d in DOMAINS], []
    for number, (stage, steps) in enumerate(zip(recipe.stages, shares, strict=True)):
        rate = {"learning_rate": None if number else asked.lr, "seed": asked.seed}
        reports.append(train(model, tokenizer, files, stage, sizes | {"steps": steps}, **rate))
    held_out = {d: str(rows / f"{d}.valid.jsonl") for d in DOMAINS}
    options = {"tokenizer": tokenizer, "limit": 8 if args.tiny else None}
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):  # as it was trained
        found = sc.evaluate(model, list(held_out.values()), **options)["loss"]
    cost = sc.count(model)
    line = [e for e in model.sparsecraft.report["training"][-1]["log"] if "loss" in e][-1]
    counts = reports[-1].counts
    seen = sizes["steps"] * sizes["batch"] / counts["packs"]
    row = {field: getattr(asked, field) for field in ("method", "schedule", "lr", "seed")}
    row |= {"loss": {d: found[path]["loss"] for d, path in held_out.items()}}
    row |= {"train_loss": reports[-1].loss}
    row |= {"trained_tokens": round(seen * counts["trained_tokens"]), "passes": seen}
    row |= {name: line.get(name) for name in ("computing_experts", "dropped", "load_entropy")}
    row |= {"total": cost.total, "active": cost.active, "seconds": time.time() - begun}
    print(json.dumps(row), flush=True)
    return row | about(device)


def sizes_of(args, method: str) -> dict[str, int]:
    sizes = TINY if args.tiny else SIZES
    return sizes | {"micro_batch": min(sizes["batch"], MICRO_BATCH.get(method, sizes["batch"]))}


def start(args, asked) -> tuple[torch.nn.Module, object, sc.Recipe]:
    """The converted model of an arm, its tokenizer and its recipe."""
    model, tokenizer = dense(args)
    recipe = ARMS[asked.method]()
    schedule = {"schedule": "cosine", "warmup_steps": 0, "warmup_ratio": 0.05}
    changes = {f"stages.{n}.{k}": v for n in range(len(recipe.stages)) for k, v in schedule.items()}
    recipe = sc.override(recipe, changes)
    sc.convert(model, recipe, certify=False, seed=asked.seed)
    return model, tokenizer, recipe


def train(model, tokenizer, files: list[Path], stage, sizes: dict, **rate) -> sc.TrainReport:
    """A stage by `sc.train`, whose folder is thrown away."""
    batch, steps = sizes["batch"], sizes["steps"]
    with tempfile.TemporaryDirectory() as folder:
        return sc.train(
            model, files, Path(folder) / "out", tokenizer=tokenizer, stages=(stage.name,),
            steps=steps, batch_size=batch, micro_batch=sizes["micro_batch"],
            max_length=sizes["length"], log_every=max(1, steps // 10), progress=False,
            save_every=NEVER, **rate,
        )  # fmt: skip


def speed(args, method: str) -> dict:
    """Tokens per second of an arm's first stage alone on its GPU, and MiB at the peak of its steps.

    The first steps, which compile kernels, are not counted.
    """
    sizes = sizes_of(args, method) | {"steps": TIMED[1]}
    rows = tiny_rows(args.work) if args.tiny else args.work
    model, tokenizer, recipe = start(args, Run(method, "cosine", 1e-4, 0))
    device, looked = next(model.parameters()).device.type, []

    def look(*_) -> None:
        looked.append(None)
        if len(looked) in TIMED:
            sync(device)
            looked[-1] = time.perf_counter()
        if device == "cuda" and len(looked) == TIMED[0]:
            torch.cuda.reset_peak_memory_stats()

    hook = register_optimizer_step_post_hook(look)
    files = [rows / f"{d}.valid.jsonl" for d in DOMAINS]
    train(model, tokenizer, files, recipe.stages[0], sizes, learning_rate=1e-4, seed=0)
    hook.remove()
    first, last = (looked[number - 1] for number in TIMED)
    milliseconds = 1e3 * (last - first) / (TIMED[1] - TIMED[0])
    row = {"method": method, "ms": milliseconds}
    row["tokens_per_second"] = 1e3 * sizes["batch"] * sizes["length"] / milliseconds
    row["MiB"] = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    print(json.dumps(row), flush=True)
    return row | about(device)


def dense(args) -> tuple[torch.nn.Module, object]:
    """The model that every run begins with, and its tokenizer."""
    if args.tiny:
        return tiny.llama(), tiny.tokenizer()
    folder = hub.resolve("smollm2")
    model = sc.hub.load_dense(folder)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), load_tokenizer(folder)


def tiny_rows(folder: Path) -> Path:
    """Rows that the tiny model can read."""
    folder = folder / "tiny"
    folder.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        for part in ("train", "valid"):
            tiny.write_rows(folder / f"{domain}.{part}.jsonl", tiny.chat_rows())
    return folder
