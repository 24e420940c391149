"""Does routing beat the matched dense adapter? Every method at its own best learning rate.

A queue over methods x {linear, constant} x learning rates: each cell's grid grows by factors of
two until its best (mean of math and code validation loss, seed 0) lies inside; then the best is
run with a second seed. One worker process per GPU; a results file is carried on where it stops.

    python benchmarks/packing.py --data ../shared/data --out packed.npz
    python benchmarks/pesc_quality.py run --data packed.npz --results pesc_quality.jsonl
    python benchmarks/pesc_quality.py table --results pesc_quality.jsonl
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

from quality_page import table
from quality_queue import Queue, run_workers

HERE = Path(__file__).parent


# ------------------------------------------------------------------ workers
def work(args, gpu: int | None) -> None:
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    logging.basicConfig(level=logging.WARNING)
    import torch
    from quality_data import Packs
    from quality_run import Run, Session, dense_model, forget

    device = "cpu" if gpu is None else "cuda"
    dense, packs = dense_model(args.model, device), Packs(args.data, args.rows)
    machine = torch.cuda.get_device_name() if gpu is not None else "CPU"
    about = {"machine": machine, "torch": torch.__version__, "mode": args.mode}
    queue, session, costs = Queue(args.results, args.claims), None, {}
    while True:
        start = time.time()
        expected = costs.get(session.name, 0) if session else 0
        if start + expected > args.deadline:
            return
        job = queue.take(session.name if session else None)
        if job is None:
            return
        run = Run(*job)
        if session is None or session.name != run.method:
            if start + args.setup > args.deadline:
                return
            session = None
            forget()
            session = Session(run.method, dense, packs, args.mode, args.steps, args.batch)
        elif start + expected > args.deadline:
            return
        row = {**run.__dict__, **about, **one_run(session, run)}
        costs[run.method] = time.time() - start
        row["wall_s"] = round(costs[run.method], 1)
        queue.put(row)
        print(
            f"{time.time() - args.begun:6.0f}s gpu{gpu} {run.key} mc={row['mc']:.4f} "
            f"{row['train_s']}s {row['tokens_per_s']} tok/s wall {row['wall_s']}",
            flush=True,
        )


def one_run(session, run) -> dict:
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


def run_all(args) -> None:
    args.claims = args.results.with_suffix(".claims")
    if not args.join:
        args.claims.unlink(missing_ok=True)
    run_workers(work, args)


def untouched(args) -> None:
    """The base model's losses and choice scores, as one more row."""
    import torch
    from quality_data import Packs
    from quality_run import Session, dense_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    session = Session(
        "camel",
        dense_model(args.model, device),
        Packs(args.data, args.rows),
        "eager",
        3,
        args.batch,
    )
    session.reset(0)
    row = {"method": "untouched", "schedule": "-", "lr": 0.0, "seed": 0, **session.evaluate()}
    row |= {"choice": session.choices()}
    with open(args.results, "a") as out:
        out.write(json.dumps(row) + "\n")
    print(row)


# ------------------------------------------------------------------ a short check
def smoke(args) -> None:
    """A few steps of every method in every mode: speed, and whether the losses agree."""
    import torch
    from quality_data import Packs
    from quality_run import METHODS, Run, Session, dense_model, forget

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense, packs = dense_model(args.model, device), Packs(args.data, args.rows)
    losses: dict[str, dict[str, list[float]]] = {}
    for name in args.methods or METHODS:
        for mode in args.modes:
            try:
                session = None
                forget()
                session = Session(name, dense, packs, mode, args.steps, args.batch)
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
        print(
            name, "losses", [round(v, 4) for v in first[:8]], "largest gap to the first mode", gaps
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=("run", "smoke", "untouched", "table"))
    parser.add_argument("--data", type=Path, default=Path("packed.npz"))
    parser.add_argument("--results", type=Path, default=HERE / "pesc_quality.jsonl")
    parser.add_argument("--model", default="smollm2", help="or `random`, `tiny`: random weights")
    parser.add_argument("--mode", default="graph", choices=("eager", "compile", "graph"))
    parser.add_argument("--modes", nargs="+", default=("eager", "compile", "graph"))
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--steps", type=int, default=372)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rows", type=int, help="only this many packs of each part, for a trial")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no run after this")
    parser.add_argument("--setup", type=float, default=45, help="seconds a new method may take")
    parser.add_argument("--gpus", type=int, nargs="+", help="default: every visible one")
    parser.add_argument("--join", action="store_true", help="beside another `run` of these results")
    parser.add_argument("--page", type=Path)
    args = parser.parse_args()
    {"run": run_all, "smoke": smoke, "untouched": untouched, "table": table}[args.verb](args)


if __name__ == "__main__":
    sys.exit(main())
