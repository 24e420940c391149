"""MoV, MoLORA, SMoLA and their dense baselines on P3: does routing beat the matched LoRA?

A queue over the arms of cohere_arms.py. Each brackets the learning rate of its experts, then that
of its router, by the loss on held-out examples, and runs its best with a second seed. One worker
process per GPU; a results file is carried on where it stops.

    python benchmarks/cohere_data.py --data ../shared/data --out cohere.npz
    python benchmarks/cohere_quality.py run --data cohere.npz
    python benchmarks/cohere_quality.py table
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
import traceback
from pathlib import Path

from cohere_arms import ARMS, Run, best_run, host, key_of, next_run, score
from cohere_page import table
from quality_queue import Queue, read, run_workers

HERE = Path(__file__).parent
NAMES = ("method", "schedule", "lr", "router_lr", "seed")


class Worker:
    """One device: the data, the dense model, and the session of the arm that runs."""

    def __init__(self, args, gpu: int | None):
        import torch
        from cohere_tests import CoherePacks, all_batches
        from quality_run import dense_model

        self.args, self.gpu, self.session, self.costs = args, gpu, None, {}
        self.device = "cpu" if gpu is None else "cuda"
        self.packs = CoherePacks(args.data, args.rows)
        self.tests = all_batches(self.packs, args.batch, self.device)
        self.dense = dense_model(args.model, self.device)
        name = torch.cuda.get_device_name() if gpu is not None else "CPU"
        self.about = {"machine": name, "torch": torch.__version__}

    def prepare(self, name: str) -> None:
        """The session of an arm; without the compiler where that fails, and the row says so."""
        modes = [self.args.mode] + (["eager_graph"] if self.args.mode == "graph" else [])
        for mode in modes:
            try:
                return self._build(name, mode)
            except Exception:
                print(f"gpu{self.gpu} {name} {mode} FAILED", flush=True)
                traceback.print_exc(limit=-6)
                failure = traceback.format_exc(limit=-2)
        raise RuntimeError(failure)

    def _build(self, name: str, mode: str) -> None:
        from cohere_run import CohereSession
        from quality_run import forget

        self.session = None
        forget()
        args = self.args
        self.session = CohereSession(
            name, self.dense, self.packs, mode, args.steps, self.tests, args.batch
        )
        if not ARMS[name].recipe(**ARMS[name].options).exact_at_start:
            self.session.reset(0)
            self.session.facts["start"] = self.session.evaluate()[0]["valid"]

    def run(self, run: Run, earlier: list[dict]) -> tuple[dict, dict]:
        """The row of one run, and the losses of its documents."""
        session, row = self.session, {}
        if ARMS[run.method].recipe is None:
            session.uniform = False
            session.reset(run.seed)
        else:
            row = session.train(run)
            del row["first_losses"]
        found, documents = session.evaluate()
        row |= found | session.facts | {"mode": session.mode}
        if session.uniform:
            row["trainable"] -= row["router"]
        best = best_run(earlier, run.method)
        if run.seed or best is None or score(row) < score(best) or not ARMS[run.method].search:
            row["choice"] = session.choices()
        if run.seed and session.routers and not session.uniform:
            row["routing"] = session.routing_facts()
        return row, documents


def work(args, gpu: int | None) -> None:
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    logging.basicConfig(level=logging.WARNING)
    worker = Worker(args, gpu)
    queue, last = Queue(args.results, args.claims, next_run, key_of), None
    print(f"{time.time() - args.begun:6.0f}s gpu{gpu} ready", flush=True)
    while True:
        job = queue.take(last)
        start = time.time()
        if job is None:
            return
        run = Run(*job)
        new = host(run.method) != last
        if start + worker.costs.get(last, 15) + (args.setup if new else 0) > args.deadline:
            return
        row = dict(zip(NAMES, job, strict=True))
        try:
            if new:
                last = host(run.method)
                worker.prepare(last)
            found, documents = worker.run(run, read(args.results))
        except Exception:
            queue.put(row | {"failed": traceback.format_exc(limit=-4)})
            traceback.print_exc(limit=-6)
            last, worker.session = None, None
            continue
        if not new:
            worker.costs[last] = time.time() - start
        row |= worker.about | found | {"wall_s": round(time.time() - start, 1)}
        queue.put(row)
        with open(args.documents, "a") as file:
            file.write(json.dumps(dict(zip(NAMES, job, strict=True)) | documents) + "\n")
        valid = {k: round(v, 4) for k, v in row["valid"].items()}
        print(f"{time.time() - args.begun:6.0f}s gpu{gpu} {run.key} {valid} train "
              f"{row.get('train_s')}s {row.get('tokens_per_s')} tok/s setup {row['setup_s']} "
              f"wall {row['wall_s']} {row['mode']}", flush=True)  # fmt: skip


def run_all(args) -> None:
    args.claims = args.results.with_suffix(".claims")
    args.documents = args.results.with_suffix(".documents")
    args.claims.unlink(missing_ok=True)
    run_workers(work, args)


def smoke(args) -> None:
    """A few steps of some arms in one mode, evaluation and choices included; no results file."""
    import torch

    worker = Worker(args, 0 if torch.cuda.is_available() else None)
    failed = []
    for name in args.methods or [name for name, arm in ARMS.items() if arm.recipe]:
        arm, start = ARMS[name], time.time()
        try:
            if worker.session is None or worker.session.name != host(name):
                worker.prepare(host(name))
            run = Run(name, "linear", arm.rate, arm.router or 0.0, 1)
            row, documents = worker.run(run, [])
        except Exception:
            print(name, "FAILED", traceback.format_exc(limit=-6), flush=True)
            failed.append(name)
            continue
        keys = ("mode", "trainable", "router", "train_s", "tokens_per_s", "setup_s", "peak_gib")
        print(name, {k: row.get(k) for k in keys}, row["valid"], row.get("start"),
              row["choice"]["sum"], row.get("routing"), {k: len(v) for k, v in documents.items()},
              f"{time.time() - start:.1f}s", flush=True)  # fmt: skip
    print("failed:", failed)
    sys.exit(1 if failed else 0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=("run", "smoke", "table"))
    parser.add_argument("--data", type=Path, default=Path("cohere.npz"))
    parser.add_argument("--results", type=Path, default=HERE / "cohere_quality.jsonl")
    parser.add_argument("--model", default="smollm2", help="or `random`, `tiny`: random weights")
    modes = ("eager", "compile", "eager_graph", "graph")
    parser.add_argument("--mode", default="graph", choices=modes)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--steps", type=int, default=248)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rows", type=int, help="only this many packs of each part, for a trial")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no run after this")
    parser.add_argument("--setup", type=float, default=20, help="seconds a new method may take")
    parser.add_argument("--gpus", type=int, nargs="+", help="default: every visible one")
    parser.add_argument("--page", type=Path, default=HERE / "cohere_quality.md")
    args = parser.parse_args()
    {"run": run_all, "smoke": smoke, "table": table}[args.verb](args)


if __name__ == "__main__":
    sys.exit(main())
