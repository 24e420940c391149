"""One training: the texts, and the gradient stages of a recipe on all weights.

Products are bf16 in training (autocast, float32 weights) and tf32 in what follows.

Shapes: B packs of a batch, S = 512 tokens of a pack.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import sparsecraft as sc
from benchmarks.lab.session import Batch, Schedule, groups_of
from benchmarks.lab.text import LENGTH, TINY_LENGTH, Texts, TextSession, inputs_of
from benchmarks.splitting.arms import TINY, TINY_WORDS, TRAININGS, Sizes
from sparsecraft.moe.init.balanced import balanced_kmeans
from sparsecraft.moe.init.banks import first_rows
from sparsecraft.recipe.overrides import override
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.recipe.stages import Fit, Stage
from sparsecraft.surgery.budget import split_layers
from sparsecraft.surgery.trainable import set_trainable
from sparsecraft.training.fit.fit import fit
from sparsecraft.training.staging import begin_stage, end_stage

DOMAINS = ("general", "math", "code")
SCHEDULE = Schedule("linear", 0.05)


class SplitTexts(Texts):
    """The packs that data.py wrote, on a device. Routers, rates and thresholds are fitted to the
    last packs of the training part, which no gradient sees."""

    def __init__(self, path: Path, sizes: Sizes, device: str, cache: Path):
        size = (TINY_LENGTH, TINY_WORDS) if sizes == TINY else (LENGTH, 1 << 16)
        super().__init__(device, *size)
        self.partitions, self.sizes = Partitions(cache), sizes
        with np.load(path) as file:
            self.prompts = file["prompts"].astype(np.int64) % self.words
            self.add(file, "train")
            for name in DOMAINS:
                self.add(file, name, sizes.valid_packs)
        count = self.count("train")
        self.fit_packs = -(-sizes.fit_tokens // self.length)
        ends = [count - self.fit_packs - 3 * sizes.other_packs + n * sizes.other_packs
                for n in range(4)]  # fmt: skip
        self.pool = ends[0]
        spans = {"dev": ends[:2], "calibrate": ends[1:3], "mass": ends[2:], "fit": [ends[3], count]}
        for name, (first, last) in spans.items():
            self.parts[name] = {k: v[first:last] for k, v in self.parts["train"].items()}

    def order(self, seed: int, steps: int) -> Tensor:
        """(steps, B): the packs of every step."""
        rows = np.random.default_rng(seed).permutation(self.pool)[: steps * self.sizes.batch]
        return torch.from_numpy(rows).view(steps, self.sizes.batch).to(self.device)


# ----------------------------------------------------------------------------------- training


def gradient_stages(recipe: Recipe | None) -> list[Stage | None]:
    """None stands for plain training of the dense model."""
    return [None] if recipe is None else [s for s in recipe.stages if isinstance(s, Stage)]


def _first_fits(recipe: Recipe) -> Iterable[Stage]:
    return itertools.takewhile(lambda stage: isinstance(stage, Fit), recipe.stages)


def session_of(
    model: nn.Module, stage: Stage | None, rates: tuple[float, float], autocast: bool = True
) -> TextSession:
    """The model in a stage, as the stage trains it; without one, all weights."""
    if stage is None:
        model.requires_grad_(True)
    else:
        begin_stage(model, stage)
        set_trainable(model, stage.trains)
    model.train()
    if stage is None:
        return TextSession(model, groups_of(model, rates), autocast=autocast)
    groups = groups_of(model, rates, stage.weight_decay)
    return TextSession(model, groups, stage.losses, stage.loss_schedule, autocast=autocast)


def run_stage(model, stage: Stage | None, texts: SplitTexts, rows: Tensor, rates) -> dict:
    """Train one stage on the packs of `rows`, (steps, B); what the last step's losses were."""
    session, start = session_of(model, stage, rates), time.perf_counter()
    batches = (texts.batch("train", own) for own in rows)
    session.descend(batches, SCHEDULE, len(rows))
    found = {k: round(v.item(), 4) for k, v in session.parts.items() if k != "total"}
    if stage is not None:
        end_stage(model, stage)
    model.requires_grad_(False).eval()
    return found | {"seconds": round(time.perf_counter() - start, 1), "steps": len(rows)}


def rates_of(name: str, lr: float) -> tuple[float, float]:
    """Of all weights, and of routers. CMoE's routers learn at the paper's 1e-3."""
    return lr, (1e-3 if name == "cmoe" else lr * TRAININGS[name].router)


class Partitions:
    """Clusters of weights, computed once and kept in a folder: what `fit` would make, with its
    seeds, for every arm and every learning rate that begins from the same weights."""

    def __init__(self, folder: Path):
        self.folder = folder

    def convert(self, model, recipe: Recipe, weights: str, seed: int) -> None:
        """Convert `model`, which has the weights of the training `weights` and `seed`."""
        wanted = [e.experts for e in recipe.edits if e.experts.kind == "split"]
        # A contiguous one stays as it is arranged below.
        changes = {"experts.partition": "contiguous"} if wanted[0].partition == "kmeans" else {}
        sc.convert(model, override(recipe, changes), certify=False, seed=seed)
        if not changes:
            return
        banks = [layer.experts for layer in split_layers(model).values()]
        path = self.folder / f"clusters-{weights}-{seed}-{wanted[0].num_experts}.pt"
        if not path.exists():
            torch.save(self._cluster(banks, seed), path)
        for bank, neurons_EM in zip(banks, torch.load(path), strict=True):
            bank.arrange(neurons_EM)

    def _cluster(self, banks: list, seed: int) -> list[Tensor]:
        """The clusters of every layer; in processes of their own where the device is slow at it."""
        start, rows = time.perf_counter(), [first_rows(bank) for bank in banks]
        E, first = banks[0].num_experts, balanced_kmeans(rows[0], banks[0].num_experts, seed=seed)
        took, workers = time.perf_counter() - start, min(14, (os.cpu_count() or 1) - 2)
        rest = range(1, len(rows))
        if took < 1 or workers < 4:
            found = [balanced_kmeans(rows[n], E, seed=seed + n) for n in rest]
        else:
            os.environ["OMP_NUM_THREADS"] = "1"  # of the new processes alone
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, mp_context=context) as pool:
                jobs = [pool.submit(balanced_kmeans, rows[n].cpu(), E, seed=seed + n) for n in rest]
                found = [job.result() for job in jobs]
        seconds = time.perf_counter() - start
        print(f"        clusters of {len(rows)} layers: first {took:.1f}s, all {seconds:.1f}s")
        return [neurons_EM.cpu() for neurons_EM in (first, *found)]


def trained(name: str, dense, texts: SplitTexts, lr: float | None, seed: int, sizes: Sizes):
    """The model after a training: dense, or converted where the training needs it. And facts."""
    model, training, facts = copy.deepcopy(dense), TRAININGS[name], {}
    if training.rates_of is None:
        return model, facts
    recipe = training.recipe and training.recipe()
    if recipe is not None:
        texts.partitions.convert(model, recipe, "untouched", seed)
        pass_stages(model, texts, _first_fits(recipe), seed)
    stages = gradient_stages(recipe)
    order = texts.order(seed, sizes.steps)
    for number, (stage, rows) in enumerate(zip(stages, order.chunk(len(stages)), strict=True)):
        label = f"{number}-{stage.name}" if stage else "0-train"
        facts[label] = run_stage(model, stage, texts, rows, rates_of(name, lr))
    return model, facts


def objective(name: str, dense, texts: SplitTexts, lr: float, sizes: Sizes) -> dict:
    """What the first stage of a training minimizes, on text apart, after a short trial at `lr`."""
    model, training = copy.deepcopy(dense), TRAININGS[name]
    recipe = training.recipe and training.recipe()
    if recipe is not None:
        texts.partitions.convert(model, recipe, "untouched", 0)
        pass_stages(model, texts, _first_fits(recipe), 0)
    stage = gradient_stages(recipe)[0]
    rates = rates_of(name, lr)
    facts = run_stage(model, stage, texts, texts.order(0, sizes.search_steps), rates)
    session = session_of(model, stage, rates)  # activations are recorded in training only
    session.step = session.steps  # the losses at their whole weight
    with torch.no_grad():
        batches = texts.batches("dev", sizes.batch)
        found = [session.loss(batch)[0].item() for batch in batches]
    value = sum(found) / len(found)
    return {"objective": value if math.isfinite(value) else 1e9, "seconds": facts["seconds"]}


def pass_stages(model, texts: SplitTexts, stages: Iterable[Stage], seed: int) -> dict:
    """Fit the stages that fit; note the others, whose gradients are done, as through. The report
    of the last fit."""
    report: dict = {}
    for stage in stages:
        begin_stage(model, stage)
        if isinstance(stage, Fit):
            spec = dataclasses.replace(stage, tokens=texts.sizes.fit_tokens)
            start = time.perf_counter()
            report = fit(model, fit_batches(texts, "fit"), spec, masks=every, seed=seed)
            report["seconds"] = round(time.perf_counter() - start, 1)
        end_stage(model, stage)
    return report


def fit_batches(texts: SplitTexts, part: str) -> Iterator[Batch]:
    yield from map(inputs_of, texts.batches(part, texts.sizes.evaluation))


def every(model, batch):
    """Every token of a pack is real."""
    return lambda layer: None


def dense_of(model, dense) -> LlamaForCausalLM:
    """A dense model with the weights of a trained split one; ReLU is put in again by the stage."""
    layers = split_layers(model)
    if not layers:
        return model
    own = {name: value for name, value in model.state_dict().items()
           if not any(name.startswith(f"{layer}.") for layer in layers)}  # fmt: skip
    for name, layer in layers.items():
        tensors = layer.experts.dense()
        gate, up = tensors["first"].chunk(2)
        own |= {f"{name}.gate_proj.weight": gate, f"{name}.up_proj.weight": up,
                f"{name}.down_proj.weight": tensors["down"]}  # fmt: skip
    found = copy.deepcopy(dense)
    found.load_state_dict(own)
    return found
