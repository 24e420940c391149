"""The worker: trainings, and the arms of each, that are not among the results."""

from __future__ import annotations

import copy
import dataclasses
import time
import traceback

import torch

from benchmarks.lab import worker
from benchmarks.splitting.arms import (
    ARMS,
    JOBS,
    TINY,
    TINY_WORDS,
    TRAININGS,
    Job,
    Sizes,
    arms_of,
    rate,
)
from benchmarks.splitting.curves import measure_arm
from benchmarks.splitting.run import SplitTexts, dense_of, objective, trained
from benchmarks.splitting.speed import keep

# Models that `speed` generates with: arm, training.
KEPT = (("d2dmoe", "hoyer_1e-3"), ("lte", "lte_1_free"))


class Worker(worker.Worker):
    """Texts, the dense model, and what has been trained of it."""

    def __init__(self, args):
        sizes = TINY if args.tiny else Sizes()
        asked = {"steps": args.steps, "fit_tokens": args.fit_tokens}
        sizes = dataclasses.replace(sizes, **{k: v for k, v in asked.items() if v})
        super().__init__(args, sizes, TINY_WORDS)
        self.texts = SplitTexts(args.data, self.sizes, self.device, args.cache)

    def rate(self, training: str) -> float | None:
        """The learning rate of a training, searched for where it is not known yet."""
        owner = TRAININGS[training].rates_of
        while True:
            best, further = rate(self.rows.read(), training)
            if further is None or owner is None:
                return best
            found = objective(owner, self.dense, self.texts, further, self.sizes)
            self.rows.put({"kind": "search", "training": owner, "lr": further} | found)
            self.say("search", owner, f"{further:.3g}", found)

    def weights(self, job: Job, lr: float | None):
        """The trained model, from the cache if it is there, and what its stages report."""
        path = self.args.cache / f"{job.training}-{job.seed}-{self.sizes.steps}.pt"
        in_place = any(ARMS[name].in_place for name in arms_of(job.training))
        if path.exists() and not in_place:
            state, facts = torch.load(path, map_location=self.device)
            model = copy.deepcopy(self.dense)
            model.load_state_dict(state)
            return model, facts
        model, facts = trained(job.training, self.dense, self.texts, lr, job.seed, self.sizes)
        if not in_place:
            model = dense_of(model, self.dense)
            if job.training != "untouched":
                torch.save((model.state_dict(), facts), path)
        return model, facts

    def arms(self, job: Job) -> None:
        done = {(r["arm"], r["training"], r["seed"]) for r in self.rows.read()
                if r["kind"] == "arm"}  # fmt: skip
        missing = [n for n in arms_of(job.training) if (n, job.training, job.seed) not in done]
        if not missing:
            return
        if self.spent + self.args.least > self.args.seconds:
            return
        lr = self.rate(job.training)
        start = time.time()
        weights, facts = self.weights(job, lr)
        seconds = round(time.time() - start, 1)
        self.say(job.training, f"lr {lr}", f"trained in {seconds}s", facts)
        if job.training == "dense" and job.seed == 0:
            keep(self.args.cache, "dense", dense_of(weights, self.dense))
        for name in missing:
            if self.spent + self.args.least > self.args.seconds:
                return
            row = {"kind": "arm", "arm": name, "training": job.training, "seed": job.seed,
                   "lr": lr, "stages": facts, "train_s": seconds}  # fmt: skip
            try:
                found = measure_arm(name, job.training, weights, self.texts, job.seed)
            except Exception:
                traceback.print_exc(limit=-6)
                self.rows.put(row | {"kind": "failed", "error": traceback.format_exc(limit=-4)})
                continue
            model = found.pop("_model")
            if (name, job.training) in KEPT and job.seed == 0:
                keep(self.args.cache, f"{name}:{job.training}", model)
            self.rows.put(row | self.about | found)
            self.say(name, job.training, found["whole"]["loss"], found["masses"]["0.2"],
                     found["fit_s"], found["curve_s"], found["wall_s"])  # fmt: skip
            for label, points in found["curves"].items():
                shown = [f"{p['share']:.2f}:{p['loss']:.3f}" for p in points if "loss" in p]
                print("          ", label, " ".join(shown), flush=True)
            del model


def run(args) -> None:
    own = Worker(args)
    own.say("ready", own.about)
    wanted = [
        job
        for job in JOBS
        if (not args.trainings or job.training in args.trainings)
        and (not args.seeds or job.seed in args.seeds)
    ]
    for job in wanted:
        try:
            own.arms(job)
        except Exception:
            traceback.print_exc(limit=-6)
            own.rows.put({"kind": "failed", "training": job.training, "seed": job.seed,
                             "error": traceback.format_exc(limit=-4)})  # fmt: skip
    own.say("done", len(own.rows.read()), "rows")
