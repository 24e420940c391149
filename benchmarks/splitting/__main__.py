"""Dense networks split into experts: loss against the share of neurons that run.

Every training of split_arms.py takes the same steps over the same text; each of its arms splits the
weights that came of it and fits routers to the same number of tokens. A results file is carried on
where it stops; `speed` measures generation with the models that `run` left in the cache.

    python benchmarks/split_data.py --data ../shared/data --out split.npz
    python benchmarks/split_quality.py run --data split.npz
    python benchmarks/split_quality.py speed --data split.npz
    python benchmarks/split_quality.py encoder --data split.npz
    python benchmarks/split_quality.py table
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
import traceback
from pathlib import Path

from report import Rows
from split_arms import ARMS, JOBS, TRAININGS, Job, arms_of, rate

HERE = Path(__file__).parent
# Models that `speed` generates with: arm, training.
KEPT = (("d2dmoe", "hoyer_1e-3"), ("lte", "lte_1_free"))


class Worker:
    """Texts, the dense model, and what has been trained of it."""

    def __init__(self, args):
        import torch
        from split_run import TINY, Sizes, Texts, dense_model

        # On a CPU this changes nothing.
        torch.set_float32_matmul_precision("high")
        self.args, self.begun = args, time.time()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.sizes = TINY if args.tiny else Sizes()
        if args.steps:
            self.sizes = dataclasses.replace(self.sizes, steps=args.steps)
        if args.fit_tokens:
            self.sizes = dataclasses.replace(self.sizes, fit_tokens=args.fit_tokens)
        args.cache.mkdir(parents=True, exist_ok=True)
        self.texts = Texts(args.data, self.sizes, self.device, args.cache)
        self.dense = dense_model("tiny" if args.tiny else "smollm2", self.device)
        self.rows = Rows(args.results, args.copy)
        name = torch.cuda.get_device_name() if self.device == "cuda" else "CPU"
        self.about = {"machine": name, "torch": torch.__version__,
                      "sizes": dataclasses.asdict(self.sizes)}  # fmt: skip

    @property
    def spent(self) -> float:
        return time.time() - self.begun

    def say(self, *words) -> None:
        print(f"{self.spent:6.0f}s", *words, flush=True)

    def rate(self, training: str) -> float | None:
        """The learning rate of a training, searched for where it is not known yet."""
        from split_run import objective

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
        import torch
        from split_run import dense_of, trained

        path = self.args.cache / f"{job.training}-{job.seed}-{self.sizes.steps}.pt"
        in_place = any(ARMS[name].in_place for name in arms_of(job.training))
        if path.exists() and not in_place:
            state, facts = torch.load(path, map_location=self.device)
            import copy

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
        from split_curves import measure_arm
        from split_run import dense_of
        from split_speed import keep

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
    worker = Worker(args)
    worker.say("ready", worker.about)
    wanted = [
        job
        for job in JOBS
        if (not args.trainings or job.training in args.trainings)
        and (not args.seeds or job.seed in args.seeds)
    ]
    for job in wanted:
        try:
            worker.arms(job)
        except Exception:
            traceback.print_exc(limit=-6)
            worker.rows.put({"kind": "failed", "training": job.training, "seed": job.seed,
                             "error": traceback.format_exc(limit=-4)})  # fmt: skip
    worker.say("done", len(worker.rows.read()), "rows")


def speed(args) -> None:
    from split_speed import measure

    worker = Worker(args)
    measure(worker)


def encoder(args) -> None:
    from split_encoder import measure

    measure(args, Rows(args.results, args.copy))


def table(args) -> None:
    from split_page import write

    write(args)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=("run", "speed", "encoder", "table"))
    parser.add_argument("--data", type=Path, default=Path("split.npz"))
    parser.add_argument("--results", type=Path, default=HERE / "split_quality.jsonl")
    parser.add_argument("--copy", type=Path, help="copy the results here after every row")
    parser.add_argument("--cache", type=Path, default=Path("runs/split"), help="trained weights")
    parser.add_argument("--tiny", action="store_true", help="random weights, a few steps: a trial")
    parser.add_argument("--trainings", nargs="+", choices=TRAININGS)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--fit-tokens", type=int)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start nothing after this")
    parser.add_argument("--least", type=float, default=30, help="seconds that an arm may take")
    parser.add_argument("--texts", type=int, help="encoder: so many texts of each source")
    parser.add_argument("--length", type=int, default=128, help="encoder: tokens of each text")
    parser.add_argument("--devices", nargs="+", choices=("cuda", "cpu"), help="of speed")
    parser.add_argument("--threads", type=int, default=2, help="of speed on the CPU")
    parser.add_argument("--page", type=Path, default=HERE / "split_quality.md")
    args = parser.parse_args()
    {"run": run, "speed": speed, "encoder": encoder, "table": table}[args.verb](args)


if __name__ == "__main__":
    sys.exit(main())
