"""One training of a method, what it is measured on, and the worker that takes runs from the queue.

Shapes: B packs of a batch, S = 512 tokens of a pack, E experts.
"""

from __future__ import annotations

import json
import logging
import os
import time
import traceback

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import sparsecraft as sc
from benchmarks.lab import clocks
from benchmarks.lab.models import dense_model, forget
from benchmarks.lab.packed import PackedSession
from benchmarks.lab.packs import Packs
from benchmarks.lab.queue import Queue, Rows, Run
from benchmarks.lab.scores import accuracies, add_counts, routing_facts, select
from benchmarks.lab.session import Batch
from benchmarks.pesc.arms import METHODS, next_run
from sparsecraft.data.encoding import IGNORED
from sparsecraft.moe.losses import auxiliary_loss

DOMAINS = ("general", "math", "code")


class PescSession(PackedSession):
    """A session whose losses read every layer's routing, and that evaluates by domain."""

    methods = METHODS

    def _watch(self) -> None:
        recipe = self.method.recipe
        self.losses = {} if recipe is None else recipe(**self.method.options).stages[0].losses
        self._trace = sc.trace(self.model)
        self.routing = self._trace.__enter__()

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        task = self.task(batch)
        kept = {n: select(r, batch["real_index"]) for n, r in self.routing.items()}
        added, parts = auxiliary_loss(kept, self.losses)
        return task if added is None else task + added, {"task": task, **parts}

    # -------------------------------------------------------------- evaluation
    def batches(self, part: str):
        """Batches of one shape; the last is filled with rows that count nowhere."""
        arrays, labels = self.packs.parts[part], self.packs.labels(part)
        rows = len(labels)
        extra = -rows % self.batch
        pad = {k: np.pad(v, ((0, extra), (0, 0))) for k, v in arrays.items()}
        labels = np.pad(labels, ((0, extra), (0, 0)), constant_values=IGNORED)
        pad["positions"][rows:] = np.arange(labels.shape[1])
        for first in range(0, rows + extra, self.batch):
            at = slice(first, first + self.batch)
            label = labels[at].reshape(-1)
            index = np.flatnonzero(label != IGNORED)
            batch = {k: torch.from_numpy(v[at].astype(np.int64)) for k, v in pad.items()}
            batch |= {"index": torch.from_numpy(index), "target": torch.from_numpy(label[index])}
            yield {key: value.to(self.device) for key, value in batch.items()}

    def nll(self, batch: Batch) -> Tensor:
        """The loss of every trained token. Gradients stay on: it is the training step's graph."""
        with self.autocast():
            rows = self.hidden(batch["ids"], batch["positions"])[batch["index"]]
            logits = self.model.lm_head(rows)
        return F.cross_entropy(logits.float(), batch["target"], reduction="none").detach()

    def evaluate(self, parts: tuple[str, ...] = (*DOMAINS, "gsm8k")) -> dict:
        valid, top, load = {}, {}, {}
        for part in parts:
            total, count = 0.0, 0
            for batch in self.batches(part):
                values = self.nll(batch).double()
                total, count = total + values.sum(), count + values.numel()
                if part in DOMAINS:
                    add_counts(self.routing, batch["real"].flatten().bool(), part, top, load)
            valid[part] = float(total / count)
        out = {"valid": valid}
        if "math" in valid:
            out["mc"] = (valid["math"] + valid["code"]) / 2
        return out | ({"routing": routing_facts(top, load, DOMAINS)} if top else {})

    def before(self, seed: int) -> dict:
        """The evaluation of the untrained start of `seed`; the model is at that start."""
        if seed not in self.untrained:
            self.untrained[seed] = self.evaluate()
        return self.untrained[seed]

    def choices(self) -> dict[str, dict[str, float]]:
        """Accuracy by summed and by mean log-probability, the median over a task's templates."""
        questions = self.packs.facts["choice"]
        number = questions[-1]["documents"][1]
        total = torch.zeros(2, number, dtype=torch.float64, device=self.device)
        for batch in self.batches("choice"):
            owner = batch["owner"].flatten()[batch["index"]]
            values = self.nll(batch).double()
            total.index_add_(1, owner, torch.stack([-values, torch.ones_like(values)]))
        scores = {"sum": total[0].tolist(), "mean": (total[0] / total[1]).tolist()}
        return {name: accuracies(questions, values) for name, values in scores.items()}


def one_run(session: PescSession, run: Run) -> dict:
    """Evaluate the start, train, evaluate again; choice tasks for a second seed only."""
    session.reset(run.seed)
    before = session.before(run.seed)
    row = session.train(run)
    row.pop("first_losses")
    row |= session.evaluate() | {"start": before["valid"]} | session.facts
    if "routing" in before:
        row["mi_bits_before"] = before["routing"]["mi_bits"]
    if run.seed:
        row["choice"] = session.choices()
    return row


# ------------------------------------------------------------------ workers
class Worker:
    """One device: the data, the dense model, and the session of the method that runs."""

    def __init__(self, args, gpu: int | None = None):
        self.args, self.gpu, self.session = args, gpu, None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dense = dense_model(args.model, device, rounded=True)
        self.packs = Packs(args.data, args.rows)
        self.about = clocks.about(device)

    def prepare(self, name: str, mode: str) -> PescSession:
        self.session = None
        forget()
        args = self.args
        self.session = PescSession(name, self.dense, self.packs, mode, args.steps, args.batch)
        return self.session


def work(args, gpu: int | None) -> None:
    """Take runs from the queue until the deadline."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    logging.basicConfig(level=logging.WARNING)
    worker, queue, costs = Worker(args, gpu), Queue(args.results, next_run), {}
    while True:
        start, held = time.time(), worker.session.name if worker.session else None
        expected = costs.get(held, 0)
        if start + expected > args.deadline:
            return
        run = queue.take(held)
        if run is None:
            return
        if held != run.method:
            if start + args.setup > args.deadline:
                return
            worker.prepare(run.method, args.mode)
        row = run.__dict__ | worker.about | {"mode": args.mode} | one_run(worker.session, run)
        costs[run.method] = time.time() - start
        row["wall_s"] = round(costs[run.method], 1)
        queue.put(row)
        print(
            f"{time.time() - args.begun:6.0f}s gpu{gpu} {run.key} mc={row['mc']:.4f} "
            f"{row['train_s']}s {row['tokens_per_s']} tok/s wall {row['wall_s']}",
            flush=True,
        )


def untouched(args) -> None:
    """The base model's losses and choice scores, as one more row."""
    args.steps = 3
    session = Worker(args).prepare("camel", "eager")
    session.reset(0)
    row = {"method": "untouched", "schedule": "-", "lr": 0.0, "seed": 0, **session.evaluate()}
    row |= {"choice": session.choices()}
    Rows(args.results).put(row)
    print(row)


def smoke(args) -> None:
    """A few steps of every method in every mode: speed, and whether the losses agree."""
    worker = Worker(args)
    losses: dict[str, dict[str, list[float]]] = {}
    for name in args.methods or METHODS:
        for mode in args.modes:
            try:
                session = worker.prepare(name, mode)
                run = Run(name, "linear", 1e-4 if session.method.full else 1e-3, 0)
                session.train(run, min(args.steps, 10))
                row = session.train(run)
                losses.setdefault(name, {})[mode] = row.pop("first_losses")
                start = time.time()
                found = session.evaluate()
                row |= {"eval_s": round(time.time() - start, 2), "mc": found["mc"]}
                row |= {"routing": found.get("routing")} | session.facts
                print(name, mode, json.dumps(row), flush=True)
            except Exception:  # the other modes are still worth knowing
                print(name, mode, "FAILED", traceback.format_exc(limit=-4), flush=True)
    for name, found in losses.items():
        first = next(iter(found.values()))
        gaps = {m: max(abs(a - b) for a, b in zip(first, v, strict=True)) for m, v in found.items()}
        print(name, "losses", [round(v, 4) for v in first[:8]], "largest gap to the first mode",
              gaps)  # fmt: skip
