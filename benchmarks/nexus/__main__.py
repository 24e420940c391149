"""Experts of three domains joined, and a domain added later: BTX, Nexus, BAM and their baselines.

SmolLM2 is trained on each domain apart; every mixture of the three is then trained on the same
steps of all domains, and mixtures of two are extended by the third, with several amounts of data.
A results file is carried on where it stops.

    python benchmarks/nexus_data.py --data ../shared/data --out nexus.npz
    python benchmarks/nexus.py run --data nexus.npz
    python benchmarks/nexus.py table
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from report import Rows

HERE = Path(__file__).parent
DOMAINS = ("general", "math", "code")
# What is trained on all three domains: name -> recipe, and whether the three sources are in it.
MIXTURES: dict[str, tuple[Callable, bool]] = {
    "nexus": (lambda r: r.nexus(3), True),
    "linear": (lambda r: r.nexus(3, "linear"), True),
    "btx": (lambda r: r.btx(3), True),
    "bam": (lambda r: r.bam(3), True),
    "bam_shared": (lambda r: r.bam(3, kv="shared"), True),
    "btx_switch": (lambda r: r.btx(3, routing="switch"), True),
    "btx_sample": (lambda r: r.btx(3, routing="sample"), True),
    "btx_soft": (lambda r: r.btx(3, routing="soft"), True),
    "upcycling": (lambda r: r.upcycling(3), False),
    "drop_upcycling": (lambda r: r.drop_upcycling(3), False),
}
DENSE = ("mix", "average_mix")
OLD, NEW = ("general", "math"), "code"
# How the third domain comes: name -> mixture of two domains, rows of linear routers.
EXTENSIONS = {
    "nexus": ("nexus", "calibrated"),
    "linear_reset": ("linear", "reset"),
    "linear_calibrated": ("linear", "calibrated"),
    "btx_reset": ("btx", "reset"),
    "btx_calibrated": ("btx", "calibrated"),
}
# Checkpoints of one training as experts: name -> experts of four checkpoints, and whether the
# routers are trained on the experts' buckets before all else.
CHECKPOINTS = {"upit": (6, True), "upit_4": (4, True), "upit_4_random": (4, False)}


class Worker:
    """Texts, the dense model, and what has been trained of it."""

    def __init__(self, args):
        import torch
        from nexus_run import TINY, TINY_WORDS, Sizes, Texts
        from split_run import dense_model

        torch.set_float32_matmul_precision("high")
        self.args, self.begun, self.torch = args, time.time(), torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.sizes = TINY if args.tiny else Sizes()
        args.cache.mkdir(parents=True, exist_ok=True)
        self.rows = Rows(args.results, args.copy)
        self.texts = Texts(args.data, self.sizes, self.device)
        self.dense = dense_model("tiny" if args.tiny else "smollm2", self.device, TINY_WORDS)
        name = torch.cuda.get_device_name() if self.device == "cuda" else "CPU"
        self.about = {"machine": name, "torch": torch.__version__,
                      "sizes": dataclasses.asdict(self.sizes)}  # fmt: skip

    def put(self, kind: str, name: str, seed: int, model, **facts) -> None:
        """Evaluate a model and write its row."""
        from nexus_run import evaluate

        found = evaluate(model, self.texts)
        row = {"kind": kind, "name": name, "seed": seed, **facts, **found, **self.about}
        self.rows.put(row)
        print(f"{time.time() - self.begun:6.0f}s", kind, name, seed, facts, found, flush=True)

    def done(self) -> set[tuple]:
        return {(r["kind"], r["name"], r["seed"], r.get("budget")) for r in self.rows.read()}

    @property
    def late(self) -> bool:
        return time.time() - self.begun > self.args.seconds

    def kept(self, name: str, seed: int, make: Callable, fresh: Callable):
        """A trained model, from the cache if it is there."""
        import torch

        path = self.args.cache / f"{name}-{seed}.pt"
        model = fresh()
        if path.exists():
            model.load_state_dict(torch.load(path, map_location=self.device))
            return model.requires_grad_(False).eval(), None
        facts = make(model)
        torch.save(model.state_dict(), path)
        return model, facts

    def expert(self, domain: str, seed: int):
        from nexus_run import train

        sizes = self.sizes
        steps = min(sizes.expert_steps, 2 * self.texts.count(domain) // sizes.batch)
        order = 100 * seed + DOMAINS.index(domain)
        model, facts = self.kept(
            f"expert-{domain}",
            seed,
            lambda m: train(m, self.texts, {domain: sizes.batch}, steps, order),
            lambda: copy.deepcopy(self.dense),
        )
        if facts:
            self.put("expert", domain, seed, model, training=facts)
        return model

    def mixture(self, name: str, domains: tuple[str, ...], seed: int):
        """A converted model, not trained."""
        import sparsecraft as sc

        make, joined = MIXTURES[name]
        recipe = make(sc.recipes)
        if joined:
            recipe = _of(recipe, len(domains))
        by_domain = any(e.router.of_domains for e in recipe.edits)
        model = copy.deepcopy(self.dense)
        sc.convert(
            model,
            recipe,
            certify=False,
            seed=seed,
            sources=[self.expert(domain, seed) for domain in domains] if joined else (),
            domains=self.embeddings(domains) if by_domain else (),
        )
        return model

    def embeddings(self, domains: tuple[str, ...]):
        return self.texts.embeddings[[DOMAINS.index(domain) for domain in domains]]

    def mix(self, name: str, seed: int) -> None:
        from nexus_run import shares_of, train

        model = self.mixture(name, DOMAINS, seed)
        self.put("untrained", name, seed, model)
        shares = shares_of(DOMAINS, self.sizes.batch)
        facts = train(model, self.texts, shares, self.sizes.mix_steps, 1000 + seed)
        self.put("mixture", name, seed, model, training=facts)

    def dense_control(self, name: str, seed: int) -> None:
        """Dense models on the same steps of all domains: from the mean of experts and seed, or from
        the seed, with the experts' steps on top."""
        from nexus_run import average, shares_of, train

        model, steps = copy.deepcopy(self.dense), self.sizes.mix_steps
        if name == "average_mix":
            average([self.dense, *(self.expert(d, seed) for d in DOMAINS)], model)
            self.put("untrained", "average", seed, model)
        else:
            each = (2 * self.texts.count(d) // self.sizes.batch for d in DOMAINS)
            steps += sum(min(self.sizes.expert_steps, most) for most in each)
        shares = shares_of(DOMAINS, self.sizes.batch)
        facts = train(model, self.texts, shares, steps, 1000 + seed)
        self.put("mixture", name, seed, model, training=facts)

    def two(self, name: str, seed: int):
        """A trained mixture of two domains."""
        from nexus_run import shares_of, train

        shares = shares_of(OLD, self.sizes.batch)
        model, facts = self.kept(
            f"two-{name}",
            seed,
            lambda m: train(m, self.texts, shares, self.sizes.mix_steps, 2000 + seed),
            lambda: self.mixture(name, OLD, seed),
        )
        if facts:
            self.put("two", name, seed, model, training=facts)
        return model

    def extension(self, name: str, seed: int, budget: int) -> None:
        from nexus_run import train

        import sparsecraft as sc

        of, rows = EXTENSIONS[name]
        model = self.two(of, seed)
        old = [batch for domain in OLD for batch in self.texts.some(domain)]
        start = time.perf_counter()
        report = sc.extend(
            model,
            self.expert(NEW, seed),
            self.texts.some(NEW),
            old,
            embedding=self.embeddings((NEW,))[0] if of == "nexus" else None,
            rows=rows,
            seed=seed,
        )
        extension = dataclasses.asdict(report) | {"seconds": round(time.perf_counter() - start, 1)}
        half = self.sizes.batch // 2
        shares = {NEW: half} | dict.fromkeys(OLD, half // len(OLD))
        facts = train(model, self.texts, shares, budget, 3000 + seed) if budget else None
        self.put("extension", name, seed, model, budget=budget, extension=extension,
                 training=facts)  # fmt: skip

    def checkpoints(self, name: str, seed: int) -> None:
        """UpIT: four checkpoints of one training on all domains, mixed to more."""
        from nexus_run import shares_of, train

        import sparsecraft as sc

        count, by_buckets = CHECKPOINTS[name]
        shares, quarter = shares_of(DOMAINS, self.sizes.batch), -(-self.sizes.mix_steps // 4)
        sources, model = [], copy.deepcopy(self.dense)
        for part in range(4):
            path = self.args.cache / f"checkpoint-{part}-{seed}.pt"
            if path.exists():
                model.load_state_dict(self.torch.load(path, map_location=self.device))
            else:
                train(model, self.texts, shares, quarter, 4000 + 10 * seed + part)
                self.torch.save(model.state_dict(), path)
            sources.append(copy.deepcopy(model))
        recipe = sc.recipes.upit(count, expand=count > 4)
        mixture = copy.deepcopy(self.dense)
        report = sc.convert(mixture, recipe, certify=False, seed=seed, sources=sources)
        del sources
        facts = {"children": [dataclasses.asdict(child) for child in report.children]}
        if by_buckets:
            out, start = self.args.cache / f"out-{name}-{seed}", time.perf_counter()
            tokenizer = sc.hub.load_tokenizer(sc.hub.resolve("smollm2"))
            sc.train(
                mixture, self.args.rows, out, tokenizer=tokenizer, stages=("router",),
                batch_size=self.sizes.batch, max_length=512, seed=seed, overwrite=True,
                progress=False,
            )  # fmt: skip
            report = mixture.sparsecraft.report["training"][-1]
            facts |= {"seconds": round(time.perf_counter() - start, 1), **report["buckets"]}
            shutil.rmtree(out)
            mixture.float()
        self.put("untrained", name, seed, mixture, buckets=facts)
        facts = train(mixture, self.texts, shares, self.sizes.mix_steps, 1000 + seed)
        self.put("mixture", name, seed, mixture, training=facts)


def _of(recipe, count: int):
    """The recipe with so many experts in every edit."""
    edits = tuple(
        dataclasses.replace(edit, experts=dataclasses.replace(edit.experts, num_experts=count))
        for edit in recipe.edits
    )
    return dataclasses.replace(recipe, edits=edits)


def jobs(worker: Worker) -> list[tuple[tuple, Callable]]:
    """What is to be done, the claims of one seed before those of the next, controls at the end."""
    found: list[tuple[tuple, Callable]] = []
    for seed in worker.args.seeds:
        if seed == worker.args.seeds[0]:
            found.append(
                (("dense", "seed", 0, None), lambda: worker.put("dense", "seed", 0, worker.dense))
            )
        for domain in DOMAINS:
            found.append(
                (("expert", domain, seed, None), lambda d=domain, s=seed: worker.expert(d, s))
            )
        first = ("nexus", "linear", "btx")
        rest = [name for name in MIXTURES if name not in first]
        for name in first:
            found.append((("mixture", name, seed, None), lambda n=name, s=seed: worker.mix(n, s)))
        for budget in (0, *worker.sizes.budgets):
            for name in EXTENSIONS:
                found.append(
                    (
                        ("extension", name, seed, budget),
                        lambda n=name, s=seed, b=budget: worker.extension(n, s, b),
                    )
                )
        for name in DENSE:
            found.append(
                (("mixture", name, seed, None), lambda n=name, s=seed: worker.dense_control(n, s))
            )
        for name in CHECKPOINTS if worker.args.rows else ():
            found.append(
                (("mixture", name, seed, None), lambda n=name, s=seed: worker.checkpoints(n, s))
            )
        for name in rest:
            found.append((("mixture", name, seed, None), lambda n=name, s=seed: worker.mix(n, s)))
    return found


def run(args) -> None:
    worker = Worker(args)
    print("ready", worker.about, flush=True)
    for key, job in jobs(worker):
        if key in worker.done():
            continue
        if worker.late:
            print("stopped before", key)
            return
        try:
            job()
        except Exception:
            traceback.print_exc(limit=-8)
    print("done", len(worker.rows.read()), "rows", f"{time.time() - worker.begun:.0f}s")


def table(args) -> None:
    from nexus_page import write

    write(args)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=("run", "table"))
    parser.add_argument("--data", type=Path, default=Path("nexus.npz"))
    parser.add_argument("--results", type=Path, default=HERE / "nexus.jsonl")
    parser.add_argument("--copy", type=Path, help="copy the results here after every row")
    parser.add_argument("--cache", type=Path, default=Path("runs/nexus"), help="trained weights")
    parser.add_argument("--rows", nargs="+", type=Path, help="training files, for upit's buckets")
    parser.add_argument("--tiny", action="store_true", help="random weights, a few steps: a trial")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--seconds", type=float, default=math.inf, help="start nothing after this")
    parser.add_argument("--page", type=Path, default=HERE / "nexus.md")
    args = parser.parse_args()
    {"run": run, "table": table}[args.verb](args)


if __name__ == "__main__":
    sys.exit(main())
