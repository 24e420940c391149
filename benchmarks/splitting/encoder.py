"""Split MiniLM: how well its embeddings still tell the sources of P3 apart, by a logistic
regression, against the share of neurons that run.

Recipes with gradient stages learn to give the dense model's own embeddings (1 - cosine), beside
their losses on activations or scores; all take the same steps over the same texts. The dense
control is the untouched model, whose embeddings they are.

Shapes: P texts, S tokens of the longest, D width, C sources.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecraft as sc
from benchmarks.lab.queue import Rows
from benchmarks.lab.session import Batch, groups_of
from benchmarks.lab.text import TextSession
from benchmarks.splitting.arms import (
    ARMS,
    BY_COUNT,
    BY_NORM,
    COARSE,
    CONTROLS,
    FINE,
    ORACLE,
    OWN,
    RANDOM_ORACLE,
    Variant,
    r,
)
from benchmarks.splitting.curves import Meter, curve, masses, vary
from benchmarks.splitting.run import SCHEDULE
from sparsecraft.recipe.overrides import override
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.recipe.selections import Share
from sparsecraft.recipe.stages import Fit, Stage
from sparsecraft.surgery.budget import run, set_budget, split_layers
from sparsecraft.surgery.trainable import set_trainable
from sparsecraft.training.fit import fit as fitting
from sparsecraft.training.staging import begin_stage, end_stage

BATCH = 512
FIT_TOKENS = 32_768
MASS_TEXTS, CALIBRATION_TEXTS = 256, 128
STEPS, TRAIN_BATCH = 200, 64  # of all gradient stages of a recipe together
RATES = (1e-4, 3e-4, 1e-3)


@dataclass(frozen=True)
class EncoderArm:
    """A recipe, its curves, and at how many times the learning rate its routers learn."""

    recipe: Callable[[], Recipe]
    variants: dict[str, Variant]
    router: float = 1.0


ENCODER = {
    "moefication": EncoderArm(lambda: r.moefication(COARSE), {"moefication": OWN, **CONTROLS}),
    "d2dmoe": EncoderArm(lambda: r.d2dmoe(FINE, sparsity_coef=1e-3), BY_NORM),
    "lte": EncoderArm(
        lambda: r.lte(COARSE, efficiency=1.0, separability=0.0),
        {"lte": OWN, "oracle": ORACLE, "random_oracle": RANDOM_ORACLE}, router=10.0,
    ),
    "gmoefication": EncoderArm(ARMS["gmoefication"].recipe, {"gmoefication": OWN, **CONTROLS}),
    "gmoefication_norm": EncoderArm(
        lambda: r.gmoefication(COARSE, variant="output_norm"), {"gmoefication": OWN, **CONTROLS}
    ),
    "d2dmoe_soft": EncoderArm(
        ARMS["d2dmoe_soft"].recipe,
        {"d2dmoe": OWN, "dsti": Variant({"select": Share(0.9)}),
         "top_k": Variant(BY_COUNT), **CONTROLS},
    ),
    "moefication_soft": EncoderArm(
        ARMS["moefication_soft"].recipe, {"moefication": OWN, **CONTROLS}
    ),
    "cmoe16": EncoderArm(ARMS["cmoe16"].recipe, {"cmoe": OWN}),
    "cmoe48": EncoderArm(ARMS["cmoe48"].recipe, {"cmoe": OWN}),
}  # fmt: skip


class EncoderTexts:
    """Tokens of P3 prompts, some of each source, in training and in test."""

    def __init__(self, path: Path, each: int | None, length: int, device: str):
        with np.load(path) as file:
            arrays = {k.split("/")[1]: file[k] for k in file.files if k.startswith("encoder/")}
        keep = np.ones(len(arrays["labels"]), dtype=bool)
        if each:
            place: dict[tuple, int] = {}
            for number, key in enumerate(zip(arrays["labels"], arrays["test"], strict=True)):
                place[key] = place.get(key, 0) + 1
                keep[number] = place[key] <= (each // 3 if key[1] else each - each // 3)
        order = np.flatnonzero(keep)
        order = order[np.argsort(arrays["lengths"][order], kind="stable")]
        self.ids = torch.from_numpy(arrays["ids"][order, :length].astype(np.int64)).to(device)
        self.lengths = torch.from_numpy(arrays["lengths"][order].astype(np.int64)).to(device)
        self.lengths = self.lengths.clamp(max=length)
        self.labels, self.test = arrays["labels"][order], arrays["test"][order]

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, rows: Tensor | None = None) -> Iterator[dict[str, Tensor]]:
        """Texts of like lengths together; all of them, or those in `rows`."""
        rows = torch.arange(len(self)) if rows is None else rows
        for own in rows.split(BATCH):
            own = own.to(self.ids.device)
            width = int(self.lengths[own].max())
            mask_BS = torch.arange(width, device=own.device) < self.lengths[own, None]
            yield {"input_ids": self.ids[own, :width], "attention_mask": mask_BS.long()}

    def some(self, count: int, seed: int, part: str) -> Tensor:
        """Rows of one part, ascending, so by length."""
        own = np.flatnonzero(self.test if part == "test" else ~self.test)
        own = np.random.default_rng(seed).permutation(own)[:count]
        return torch.from_numpy(np.sort(own))


def real(model: nn.Module, batch: dict[str, Tensor]):
    return lambda layer: batch["attention_mask"].bool()


def embedding(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean of the last states of a text's tokens, of length one, (P, D)."""
    mask_BS = batch["attention_mask"]
    hidden_BSD = model(**batch).last_hidden_state.float()
    total_BD = (hidden_BSD * mask_BS[..., None]).sum(1)
    return F.normalize(total_BD / mask_BS.sum(1, keepdim=True), dim=-1)


@torch.no_grad()
def embed(model: nn.Module, batches, meter: Meter | None = None) -> Tensor:
    """Embeddings of all batches, (P, D). In bf16, routers apart."""
    found = []
    with sc.trace(model) as routings, torch.autocast(model.device.type, torch.bfloat16):
        for batch in batches:
            found.append(embedding(model, batch))
            if meter:
                meter.add(routings, batch["attention_mask"].bool().flatten())
    return torch.cat(found)


class Judge:
    """Accuracy of a logistic regression on embeddings, and their nearness to the dense ones."""

    def __init__(self, texts: EncoderTexts, dense: nn.Module):
        self.texts = texts
        self.dense_PD = embed(dense, texts.batches())
        self.labels = torch.from_numpy(texts.labels.astype(np.int64)).to(self.dense_PD.device)
        self.test = torch.from_numpy(texts.test).to(self.dense_PD.device)
        self.head = self._fit(self.dense_PD)

    def _fit(self, found_PD: Tensor) -> nn.Linear:
        """scikit-learn's LogisticRegression(C=10), by the same L-BFGS, on the device: embeddings
        have length one and need weaker regularization than the default."""
        x_PD, y_P = found_PD[~self.test], self.labels[~self.test]
        head = nn.Linear(x_PD.shape[1], int(self.labels.max()) + 1).to(x_PD.device)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        optimizer = torch.optim.LBFGS(
            head.parameters(), max_iter=100, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            fit = F.cross_entropy(head(x_PD), y_P, reduction="sum")
            loss = (fit + head.weight.square().sum() / 20) / len(x_PD)
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        return head.requires_grad_(False)

    def _right(self, head: nn.Linear, found_PD: Tensor) -> float:
        guess_P = head(found_PD[self.test]).argmax(-1)
        return (guess_P == self.labels[self.test]).float().mean().item()

    def __call__(self, model: nn.Module, routed: bool = True) -> dict:
        meter = Meter(model) if routed else None
        found_PD = embed(model, self.texts.batches(), meter)
        found = {
            "accuracy": self._right(self._fit(found_PD), found_PD),
            "dense_head": self._right(self.head, found_PD),
            "cosine": (found_PD * self.dense_PD).sum(-1).mean().item(),
        }
        found |= meter.facts() if meter else {}
        return {key: round(value, 4) for key, value in found.items()}


class EncoderSession(TextSession):
    """Trains a model to give embeddings that are wanted: 1 - cosine, beside a stage's losses."""

    fuses = False

    def task(self, batch: Batch) -> Tensor:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        return 1 - (embedding(self.model, inputs) * batch["wanted"]).sum(-1).mean()

    def masks(self, batch: Batch):
        return real(self.model, batch)


def teach(model, stage, texts: EncoderTexts, judge: Judge, lr: float, steps: int, arm, seed: int):
    """One gradient stage of so many steps."""
    begin_stage(model, stage)
    set_trainable(model, stage.trains)
    model.train()
    groups = groups_of(model, (lr, lr * arm.router), stage.weight_decay)
    session = EncoderSession(model, groups, stage.losses, stage.loss_schedule)
    train = texts.some(len(texts), 1, "train")
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[Batch]:
        for _ in range(steps):
            rows = train[torch.randperm(len(train), generator=generator)[:TRAIN_BATCH]]
            rows = rows.sort().values
            (batch,) = texts.batches(rows)
            yield batch | {"wanted": judge.dense_PD[rows.to(judge.dense_PD.device)]}

    session.descend(batches(), SCHEDULE, steps)
    end_stage(model, stage)
    model.requires_grad_(False).eval()


def taught(start: nn.Module, arm: EncoderArm, texts, judge: Judge, args) -> tuple[nn.Module, dict]:
    """The model after its gradient stages, at the rate whose embeddings and losses end lowest."""
    stages = [stage for stage in start.sparsecraft.recipe.stages if isinstance(stage, Stage)]
    if not stages:
        return start, {}
    found, tried = {}, {}
    for lr in RATES:
        model = copy.deepcopy(start)
        for number, stage in enumerate(stages):
            steps = args.steps or STEPS
            teach(model, stage, texts, judge, lr, steps // len(stages), arm, number)
        run(model, "every" if stages[-1].runs == "every" else "sparse")
        near = embed(model, texts.batches(texts.some(CALIBRATION_TEXTS, 3, "train")))
        rows = texts.some(CALIBRATION_TEXTS, 3, "train").to(near.device)
        tried[lr] = round((near * judge.dense_PD[rows]).sum(-1).mean().item(), 4)
        found[lr] = model
    best = max(tried, key=tried.get)
    return found[best], {"lr": best, "tried": tried, "steps": args.steps or STEPS,
                         "batch": TRAIN_BATCH}  # fmt: skip


def measure(args) -> None:
    """Rows of kind `encoder`, one for each arm."""
    rows = Rows(args.results, args.copy)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    texts = EncoderTexts(args.data, args.texts, args.length, device)
    dense = sc.hub.load_dense("minilm", dtype=torch.float32).base_model.to(device).eval()
    judge, start = Judge(texts, dense), time.time()
    about = {"kind": "encoder", "machine": device, "torch": torch.__version__,
             "train_texts": int((~texts.test).sum()), "test_texts": int(texts.test.sum()),
             "sources": len(set(texts.labels.tolist())), "length": args.length}  # fmt: skip
    done = {r["arm"] for r in rows.read() if r["kind"] == "encoder"}
    whole = judge(dense, routed=False) if "dense" not in done else {}
    if whole:
        rows.put(about | {"arm": "dense", "whole": whole})
        print(f"{time.time() - start:6.0f}s dense {whole} {about}", flush=True)
    for name, arm in ENCODER.items():
        if name in done or time.time() - start > args.seconds:
            continue
        begun = time.time()
        row = about | {"arm": name} | _arm(name, arm, dense, texts, judge, args)
        rows.put(row | {"wall_s": round(time.time() - begun, 1)})


def _arm(name: str, arm: EncoderArm, dense, texts: EncoderTexts, judge: Judge, args) -> dict:
    model, recipe = copy.deepcopy(dense), arm.recipe()
    # Partitions are made again from the weights as they are when routers are fitted.
    fits = any(isinstance(stage, Fit) for stage in recipe.stages)
    changes = {"experts.partition": "contiguous"} if fits else {}
    sc.convert(model, override(recipe, changes), certify=False)
    model, facts = taught(model, arm, texts, judge, args)
    model.sparsecraft.recipe = recipe
    for layer in split_layers(model).values():
        layer.experts.spec = recipe.edits[0].experts
    report = {"tokens": 0}
    for stage in (stage for stage in recipe.stages if isinstance(stage, Fit)):
        spec = dataclasses.replace(stage, tokens=FIT_TOKENS)
        # In random order, as text would come: the last tokens are held out by the fit.
        train = texts.some(len(texts), 1, "train")
        shuffled = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
        report = fitting.fit(model, texts.batches(shuffled), spec, masks=real)
        end_stage(model, stage)
    model.eval()
    batches = texts.batches(texts.some(MASS_TEXTS, 2, "test"))
    layer = next(iter(split_layers(model).values()))
    row = {"experts": layer.experts.num_experts, "fit_tokens": report["tokens"], "training": facts,
           "masses": masses(model, batches, real, 1 << 20), "curves": {}}  # fmt: skip
    set_budget(model, 1.0)
    row["whole"] = judge(model, routed=False)
    few = texts.some(CALIBRATION_TEXTS, 3, "train")

    def share_now(other: nn.Module) -> float:
        meter = Meter(other)
        embed(other, texts.batches(few), meter)
        return meter.facts()["share"]

    for label, variant in arm.variants.items():
        other = copy.deepcopy(model) if variant.random or variant.spec else model
        vary(other, variant, 0)
        other.eval()
        row["curves"][label] = curve(
            other, variant.shares, lambda m=other: share_now(m), lambda m=other: judge(m)
        )
        shown = [f"{p['share']:.2f}:{p['accuracy']:.3f}/{p['cosine']:.3f}"
                 for p in row["curves"][label] if "share" in p]  # fmt: skip
        print("       ", name, label, *shown, flush=True)
    return row
