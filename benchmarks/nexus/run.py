"""One training, extension or evaluation, and the worker that does what is missing.

Training is AdamW on float32 weights with bf16 products, 10 % warm-up and a cosine to zero.

Shapes: B packs of a batch, S = 512 tokens of a pack, E experts.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import sparsecraft as sc
from benchmarks.lab import worker
from benchmarks.lab.session import Schedule
from benchmarks.lab.text import LENGTH, TINY_LENGTH, Texts, TextSession, held_out, text_batch
from benchmarks.nexus.arms import (
    CHECKPOINTS,
    DENSE,
    DOMAINS,
    EXTENSIONS,
    MIXTURES,
    NEW,
    OLD,
    TINY,
    TINY_WORDS,
    Sizes,
)
from sparsecraft.moe.layer import MoELayer

SCHEDULE = Schedule("cosine", 0.1)


class NexusTexts(Texts):
    """The packs that data.py wrote, on a device."""

    def __init__(self, path: Path, sizes: Sizes, device: str):
        size = (TINY_LENGTH, TINY_WORDS) if sizes == TINY else (LENGTH, 1 << 16)
        super().__init__(device, *size)
        self.sizes = sizes
        with np.load(path) as file:
            self.embeddings = torch.from_numpy(file["embeddings"]).float()
            for part in dict.fromkeys(n.split("/")[0] for n in file.files if "/" in n):
                self.add(file, part)

    def steps(self, shares: Mapping[str, int], steps: int, seed: int) -> Iterator[dict]:
        """Batches with so many packs of each domain, in an order of the seed, again and again."""
        generator = np.random.default_rng(seed)
        orders = {}
        for name, each in shares.items():
            count = self.count(f"{name}.train")
            passes = -(-steps * each // count)
            orders[name] = np.concatenate([generator.permutation(count) for _ in range(passes)])
        for step in range(steps):
            rows = {n: orders[n][step * each : (step + 1) * each] for n, each in shares.items()}
            yield text_batch(
                *(
                    torch.cat([self.parts[f"{n}.train"][key][own] for n, own in rows.items()])
                    for key in ("ids", "positions")
                )
            )

    def some(self, domain: str) -> list[Tensor]:
        """A few packs of the training part, as batches of ids."""
        ids = self.parts[f"{domain}.train"]["ids"][: self.sizes.calibration]
        return list(ids.split(8))


def shares_of(domains: tuple[str, ...], batch: int) -> dict[str, int]:
    """The packs of a step, alike of each domain."""
    return dict.fromkeys(domains, batch // len(domains))


def session_of(model: nn.Module, rate: float, autocast: bool = True) -> TextSession:
    """All weights in training, with the losses of the recipe's last stage where there is one."""
    record = getattr(model, "sparsecraft", None)
    coefficients = record.recipe.stages[-1].losses if record else {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, MoELayer)}
    counted = {n for n, layer in layers.items() if layer.router.spec.balanced}
    model.requires_grad_(True).train()
    groups = [{"params": list(model.parameters()), "peak": rate}]
    return TextSession(model, groups, coefficients, counted=counted, autocast=autocast)


def train(
    model: nn.Module, texts: NexusTexts, shares: Mapping[str, int], steps: int, seed: int
) -> dict[str, float]:
    """Train all weights on so many packs of each domain a step."""
    session, start = session_of(model, texts.sizes.learning_rate), time.perf_counter()
    losses = session.descend(texts.steps(shares, steps, seed), SCHEDULE, steps)
    model.requires_grad_(False).eval()
    last = round(losses[-10:].mean().item(), 4)
    seconds = time.perf_counter() - start
    return {
        "steps": steps,
        "last_loss": last,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(steps * sum(shares.values()) * texts.length / seconds),
    }


@torch.no_grad()
def evaluate(model: nn.Module, texts: NexusTexts) -> dict:
    """Held-out loss per token of each domain; and the share of a domain's tokens, by weight, that
    each expert gets, mean over the layers whose routers select."""
    loss, routing = {}, {}
    for domain in DOMAINS:
        shares: list[Tensor] = []

        def meet(routings, shares=shares) -> None:
            found = [r.weights_TE() for r in routings.values() if not r.in_order]
            shares += [(w / w.sum(-1, keepdim=True)).mean(0) for w in found]

        part = f"{domain}.valid"
        rows = torch.arange(min(texts.count(part), texts.sizes.valid_packs))
        batches = (texts.batch(part, own) for own in rows.split(texts.sizes.evaluation))
        with torch.autocast(model.device.type, torch.bfloat16):
            total, count = held_out(model, batches, meet)
        loss[domain] = round(total / count, 5)
        if shares:
            routing[domain] = [round(x, 4) for x in torch.stack(shares).mean(0).tolist()]
    return {"loss": loss, "mean": round(sum(loss.values()) / 3, 5), "routing": routing}


def average(models: list[nn.Module], into: nn.Module) -> nn.Module:
    """`into` with the mean of the models' weights."""
    with torch.no_grad():
        for parts in zip(into.parameters(), *(m.parameters() for m in models), strict=True):
            parts[0].copy_(torch.stack(parts[1:]).mean(0))
    return into


# ------------------------------------------------------------------ the worker
class Worker(worker.Worker):
    """Texts, the dense model, and what has been trained of it."""

    def __init__(self, args):
        super().__init__(args, TINY if args.tiny else Sizes(), TINY_WORDS)
        self.texts = NexusTexts(args.data, self.sizes, self.device)

    def put(self, kind: str, name: str, seed: int, model, **facts) -> None:
        """Evaluate a model and write its row."""
        found = evaluate(model, self.texts)
        row = {"kind": kind, "name": name, "seed": seed, **facts, **found, **self.about}
        self.rows.put(row)
        self.say(kind, name, seed, facts, found)

    def done(self) -> set[tuple]:
        return {(r["kind"], r["name"], r["seed"], r.get("budget")) for r in self.rows.read()}

    def expert(self, domain: str, seed: int):
        sizes = self.sizes
        steps = min(sizes.expert_steps, 2 * self.texts.count(f"{domain}.train") // sizes.batch)
        order = 100 * seed + DOMAINS.index(domain)
        model, facts = self.kept(
            f"expert-{domain}-{seed}",
            lambda m: train(m, self.texts, {domain: sizes.batch}, steps, order),
        )
        if facts:
            self.put("expert", domain, seed, model, training=facts)
        return model

    def mixture(self, name: str, domains: tuple[str, ...], seed: int):
        """A converted model, not trained."""
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
        model = self.mixture(name, DOMAINS, seed)
        self.put("untrained", name, seed, model)
        shares = shares_of(DOMAINS, self.sizes.batch)
        facts = train(model, self.texts, shares, self.sizes.mix_steps, 1000 + seed)
        self.put("mixture", name, seed, model, training=facts)

    def dense_control(self, name: str, seed: int) -> None:
        """Dense models on the same steps of all domains: from the mean of experts and seed, or from
        the seed, with the experts' steps on top."""
        model, steps = copy.deepcopy(self.dense), self.sizes.mix_steps
        if name == "average_mix":
            average([self.dense, *(self.expert(d, seed) for d in DOMAINS)], model)
            self.put("untrained", "average", seed, model)
        else:
            each = (2 * self.texts.count(f"{d}.train") // self.sizes.batch for d in DOMAINS)
            steps += sum(min(self.sizes.expert_steps, most) for most in each)
        shares = shares_of(DOMAINS, self.sizes.batch)
        facts = train(model, self.texts, shares, steps, 1000 + seed)
        self.put("mixture", name, seed, model, training=facts)

    def two(self, name: str, seed: int):
        """A trained mixture of two domains."""
        shares = shares_of(OLD, self.sizes.batch)
        model, facts = self.kept(
            f"two-{name}-{seed}",
            lambda m: train(m, self.texts, shares, self.sizes.mix_steps, 2000 + seed),
            lambda: self.mixture(name, OLD, seed),
        )
        if facts:
            self.put("two", name, seed, model, training=facts)
        return model

    def extension(self, name: str, seed: int, budget: int) -> None:
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
        count, by_buckets = CHECKPOINTS[name]
        shares, quarter = shares_of(DOMAINS, self.sizes.batch), -(-self.sizes.mix_steps // 4)
        sources: list = []
        for part in range(4):
            model, _ = self.kept(
                f"checkpoint-{part}-{seed}",
                lambda m, order=4000 + 10 * seed + part: train(
                    m, self.texts, shares, quarter, order
                ),
                lambda: copy.deepcopy((sources or [self.dense])[-1]),
            )
            sources.append(model)
        recipe = sc.recipes.upit(count, expand=count > 4)
        mixture = copy.deepcopy(self.dense)
        report = sc.convert(mixture, recipe, certify=False, seed=seed, sources=sources)
        sources.clear()
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


def jobs(own: Worker) -> list[tuple[tuple, Callable]]:
    """What is to be done, the claims of one seed before those of the next, controls at the end."""
    found: list[tuple[tuple, Callable]] = []

    def add(kind: str, name: str, seed: int, job: Callable, budget: int | None = None) -> None:
        more = () if budget is None else (budget,)
        found.append(((kind, name, seed, budget), lambda: job(name, seed, *more)))

    first = ("nexus", "linear", "btx")
    for seed in own.args.seeds:
        if seed == own.args.seeds[0]:
            add("dense", "seed", 0, lambda name, seed: own.put("dense", name, seed, own.dense))
        for domain in DOMAINS:
            add("expert", domain, seed, own.expert)
        for name in first:
            add("mixture", name, seed, own.mix)
        for budget in (0, *own.sizes.budgets):
            for name in EXTENSIONS:
                add("extension", name, seed, own.extension, budget)
        for name in DENSE:
            add("mixture", name, seed, own.dense_control)
        for name in CHECKPOINTS if own.args.rows else ():
            add("mixture", name, seed, own.checkpoints)
        for name in MIXTURES:
            if name not in first:
                add("mixture", name, seed, own.mix)
    return found


def run(args) -> None:
    own = Worker(args)
    own.say("ready", own.about)
    for key, job in jobs(own):
        if key in own.done():
            continue
        if own.late:
            print("stopped before", key)
            return
        try:
            job()
        except Exception:
            traceback.print_exc(limit=-8)
    own.say("done", len(own.rows.read()), "rows")
