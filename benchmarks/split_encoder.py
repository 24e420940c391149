"""Split MiniLM: how well its embeddings still tell the sources of P3 apart, by a logistic
regression, against the share of neurons that run. No gradient goes through the encoder.

Shapes: P texts, S tokens of the longest, D width.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from split_arms import ARMS, BY_COUNT, CONTROLS, ORACLE, OWN, SIMILARITY, Variant
from split_curves import Meter, curve, masses, vary
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecraft as sc
from sparsecraft import budget, fitting

BATCH = 64
FIT_TOKENS = 32_768
MASS_TEXTS, CALIBRATION_TEXTS = 256, 128
# With fewer texts, as on a CPU: of the arms' own curves, and of the others.
COARSER, COARSEST = (0.02, 0.1, 0.2, 0.3, 0.5, 0.7), (0.2, 0.5)
# Arms of no gradient stage, and their curves.
ENCODER = {
    "gmoefication": {"gmoefication": OWN, **CONTROLS},
    "d2dmoe_soft": {
        "d2dmoe": OWN,
        "dsti": Variant({"select": "share", "threshold": 0.9}),
        "top_k": Variant(BY_COUNT),
        "oracle": ORACLE,
    },
    "moefication_soft": {"moefication": OWN, "similarity": SIMILARITY, "oracle": ORACLE},
    "cmoe16": {"cmoe": OWN},
    "cmoe48": {"cmoe": OWN},
}


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


@torch.no_grad()
def embed(model: nn.Module, batches, meter: Meter | None = None) -> Tensor:
    """Mean of the last states of a text's tokens, of length one, (P, D), on the CPU. In bf16,
    routers apart."""
    found = []
    with sc.trace(model) as routings, torch.autocast(model.device.type, torch.bfloat16):
        for batch in batches:
            mask_BS = batch["attention_mask"]
            hidden_BSD = model(**batch).last_hidden_state.float()
            total_BD = (hidden_BSD * mask_BS[..., None]).sum(1)
            found.append(F.normalize(total_BD / mask_BS.sum(1, keepdim=True), dim=-1).cpu())
            if meter:
                meter.add(routings, mask_BS.bool().flatten())
    return torch.cat(found)


class Judge:
    """Accuracy of a logistic regression on embeddings, and their nearness to the dense ones."""

    def __init__(self, texts: EncoderTexts, dense: nn.Module):
        self.texts = texts
        self.dense_PD = embed(dense, texts.batches())
        self.head = self._fit(self.dense_PD)

    def _fit(self, found_PD: Tensor):
        from sklearn.linear_model import LogisticRegression

        # Embeddings have length one: weaker regularization than the default, the same for all.
        head = LogisticRegression(C=10.0, max_iter=200)
        return head.fit(found_PD[~self.texts.test].numpy(), self.texts.labels[~self.texts.test])

    def __call__(self, model: nn.Module, routed: bool = True) -> dict:
        meter = Meter(model) if routed else None
        found_PD = embed(model, self.texts.batches(), meter)
        test, labels = self.texts.test, self.texts.labels
        found = {
            "accuracy": self._fit(found_PD).score(found_PD[test].numpy(), labels[test]),
            "dense_head": self.head.score(found_PD[test].numpy(), labels[test]),
            "cosine": (found_PD * self.dense_PD).sum(-1).mean().item(),
        }
        found |= meter.facts() if meter else {}
        return {key: round(value, 4) for key, value in found.items()}


def measure(args, rows) -> None:
    """Rows of kind `encoder`, one for each arm."""
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
    for name, variants in ENCODER.items():
        if name in done or time.time() - start > args.seconds:
            continue
        begun = time.time()
        row = about | {"arm": name} | _arm(name, variants, dense, texts, judge, args)
        rows.put(row | {"wall_s": round(time.time() - begun, 1)})


def _arm(name: str, variants: dict, dense, texts: EncoderTexts, judge: Judge, args) -> dict:
    model, recipe = copy.deepcopy(dense), ARMS[name].recipe()
    sc.convert(model, recipe, certify=False)
    spec = dataclasses.replace(recipe.stages[-1].fit, tokens=FIT_TOKENS)
    # In random order, as text would come: the last tokens are held out by the fit.
    train = texts.some(len(texts), 1, "train")
    shuffled = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
    report = fitting.fit(model, texts.batches(shuffled), spec, masks=real)
    budget.end_stage(model, recipe.stages[-1])
    model.eval()
    batches = texts.batches(texts.some(MASS_TEXTS, 2, "test"))
    layer = next(iter(budget.split_layers(model).values()))
    row = {"experts": layer.experts.num_experts, "fit_tokens": report["tokens"],
           "masses": masses(model, batches, real, 1 << 20), "curves": {}}  # fmt: skip
    budget.set_budget(model, 1.0)
    row["whole"] = judge(model, routed=False)
    few = texts.some(CALIBRATION_TEXTS, 3, "train")

    def share_now(other: nn.Module) -> float:
        meter = Meter(other)
        embed(other, texts.batches(few), meter)
        return meter.facts()["share"]

    for label, variant in variants.items():
        other = copy.deepcopy(model) if variant.random or variant.spec else model
        vary(other, variant, 0)
        other.eval()
        shares = variant.shares
        if args.texts:
            shares = (
                COARSER if label in ("gmoefication", "moefication", "d2dmoe", "cmoe") else COARSEST
            )
        row["curves"][label] = curve(
            other, shares, lambda m=other: share_now(m), lambda m=other: judge(m)
        )
        shown = [f"{p['share']:.2f}:{p['accuracy']:.3f}/{p['cosine']:.3f}"
                 for p in row["curves"][label] if "share" in p]  # fmt: skip
        print("       ", name, label, *shown, flush=True)
    return row
