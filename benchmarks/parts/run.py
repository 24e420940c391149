"""One training of an arm by `sc.train`, and its measures; workers that share a queue of them."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from pathlib import Path

import torch

import sparsecraft as sc
from benchmarks.lab.clocks import about
from benchmarks.lab.queue import Queue
from benchmarks.parts.arms import ARMS, plan
from sparsecraft.dense import hub
from sparsecraft.dense.loading import load_tokenizer
from tests import tiny

DOMAINS = ("general", "math", "code")
SIZES = {"steps": 130, "batch": 64, "length": 512}
TINY = {"steps": 6, "batch": 4, "length": 64}
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
    sizes, begun = TINY if args.tiny else SIZES, time.time()
    rows = tiny_rows(args.work) if args.tiny else args.work
    model, tokenizer = dense(args)
    recipe = ARMS[asked.method]()
    schedule = {"schedule": "cosine", "warmup_steps": 0, "warmup_ratio": 0.05}
    changes = {f"stages.{n}.{k}": v for n in range(len(recipe.stages)) for k, v in schedule.items()}
    recipe = sc.override(recipe, changes)
    sc.convert(model, recipe, certify=False, seed=asked.seed)
    # A stage that trains the router alone has a sixth of the steps, at its recipe's own rate.
    last = sizes["steps"] // 6
    shares = [sizes["steps"]] if len(recipe.stages) == 1 else [sizes["steps"] - last, last]
    reports = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (stage, steps) in enumerate(zip(recipe.stages, shares, strict=True)):
            report = sc.train(
                model, [rows / f"{d}.train.jsonl" for d in DOMAINS], Path(folder) / stage.name,
                tokenizer=tokenizer, stages=(stage.name,), steps=steps, batch_size=sizes["batch"],
                micro_batch=min(sizes["batch"], MICRO_BATCH.get(asked.method, 64)),
                max_length=sizes["length"], learning_rate=None if number else asked.lr,
                seed=asked.seed, log_every=max(1, steps // 10), progress=False,
                save_every=NEVER,
            )  # fmt: skip
            reports.append(report)
    held_out = {d: str(rows / f"{d}.valid.jsonl") for d in DOMAINS}
    options = {"tokenizer": tokenizer, "limit": 8 if args.tiny else None}
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):  # as it was trained
        found = sc.evaluate(model, list(held_out.values()), **options)["loss"]
    cost = sc.count(model)
    line = [e for e in model.sparsecraft.report["training"][-1]["log"] if "loss" in e][-1]
    counts = report.counts
    seen = sizes["steps"] * sizes["batch"] / counts["packs"]
    row = {field: getattr(asked, field) for field in ("method", "schedule", "lr", "seed")}
    row |= {"loss": {d: found[path]["loss"] for d, path in held_out.items()}}
    seconds = sum(r.seconds for r in reports)
    tokens = sum(r.tokens_per_second * r.seconds for r in reports)
    row |= {"train_loss": report.loss, "tokens_per_second": tokens / seconds}
    row |= {"trained_tokens": round(seen * counts["trained_tokens"]), "passes": seen}
    row |= {name: line.get(name) for name in ("computing_experts", "dropped", "load_entropy")}
    row |= {"total": cost.total, "active": cost.active, "seconds": time.time() - begun}
    print(json.dumps(row), flush=True)
    return row | about("cuda" if torch.cuda.is_available() else "cpu")


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
