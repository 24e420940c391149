"""One training of split_quality.py: the texts, and the gradient stages of a recipe on all weights.

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
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from quality_data import text_batch
from split_arms import TRAININGS
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import sparsecraft as sc
from sparsecraft.data.encoding import IGNORED
from sparsecraft.moe.init.balanced import balanced_kmeans
from sparsecraft.moe.init.banks import first_rows
from sparsecraft.moe.losses import auxiliary_loss
from sparsecraft.recipe.overrides import override
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.recipe.stages import Fit, Stage
from sparsecraft.surgery.budget import split_layers
from sparsecraft.surgery.trainable import matches, set_trainable
from sparsecraft.training.fit.fit import fit
from sparsecraft.training.staging import begin_stage, end_stage

DOMAINS = ("general", "math", "code")
WARMUP = 0.05


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of everything; the same for all trainings and all arms."""

    steps: int = 128
    search_steps: int = 32
    batch: int = 32
    fit_tokens: int = 65_536
    valid_packs: int = 40  # of each domain
    other_packs: int = 32  # for a learning rate, thresholds and captured masses
    evaluation: int = 40  # packs in one forward pass

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * 512


TINY = Sizes(4, 2, 2, 1024, 1, 2, 2)
TINY_LENGTH, TINY_WORDS = 64, 512


class Texts:
    """The packs that split_data.py wrote, on a device. Routers, rates and thresholds are fitted to
    the last packs of the training part, which no gradient sees."""

    def __init__(self, path: Path, sizes: Sizes, device: str, cache: Path):
        self.partitions = Partitions(cache)
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files if not name.startswith("encoder")}
        self.sizes, self.device = sizes, device
        length, words = (TINY_LENGTH, TINY_WORDS) if sizes == TINY else (512, 1 << 16)
        self.prompts = arrays.pop("prompts").astype(np.int64) % words
        self.parts = {}
        for name in ("train", *DOMAINS):
            limit = None if name == "train" else sizes.valid_packs
            self.parts[name] = {
                key: torch.from_numpy(
                    arrays[f"{name}/{key}"][:limit, :length].astype(np.int64) % words
                ).to(device)
                for key in ("ids", "positions")
            }
        count = len(self.parts["train"]["ids"])
        self.fit_packs = -(-sizes.fit_tokens // length)
        ends = [count - self.fit_packs - 3 * sizes.other_packs + n * sizes.other_packs
                for n in range(4)]  # fmt: skip
        self.pool = ends[0]
        spans = {"dev": ends[:2], "calibrate": ends[1:3], "mass": ends[2:], "fit": [ends[3], count]}
        for name, (first, last) in spans.items():
            self.parts[name] = {k: v[first:last] for k, v in self.parts["train"].items()}

    def batches(self, name: str, size: int) -> Iterator[dict[str, Tensor]]:
        part = self.parts[name]
        for start in range(0, len(part["ids"]), size):
            yield self.batch(name, slice(start, start + size))

    def batch(self, name: str, rows) -> dict[str, Tensor]:
        return text_batch(*(self.parts[name][key][rows] for key in ("ids", "positions")))

    def order(self, seed: int, steps: int) -> Tensor:
        """(steps, B): the packs of every step."""
        rows = np.random.default_rng(seed).permutation(self.pool)[: steps * self.sizes.batch]
        return torch.from_numpy(rows).view(steps, self.sizes.batch).to(self.device)


def dense_model(source: str, device: str, words: int = TINY_WORDS) -> LlamaForCausalLM:
    """The dense model in float32; `tiny` has random weights, and so many words."""
    if source != "tiny":
        return sc.hub.load_dense(source, dtype=torch.float32).to(device)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=words, tie_word_embeddings=True, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device).eval()


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "targets"}
    return model(**inputs, use_cache=False).logits


# ----------------------------------------------------------------------------------- training


def gradient_stages(recipe: Recipe | None) -> list[Stage | None]:
    """None stands for plain training of the dense model."""
    return [None] if recipe is None else [s for s in recipe.stages if isinstance(s, Stage)]


def _first_fits(recipe: Recipe) -> Iterable[Stage]:
    return itertools.takewhile(lambda stage: isinstance(stage, Fit), recipe.stages)


def loss_of(model, batch, stage: Stage | None, factor: float = 1.0) -> tuple[Tensor, dict]:
    """What a stage minimizes, on one batch, and its parts."""
    coefficients = {} if stage is None else stage.losses
    traced = sc.trace(model) if coefficients else nullcontext({})
    with torch.autocast(model.device.type, torch.bfloat16), traced as routings:
        logits = logits_of(model, batch)
        task = F.cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten(),
                               ignore_index=IGNORED)  # fmt: skip
        added, parts = auxiliary_loss(routings, {k: factor * c for k, c in coefficients.items()})
    total = task if added is None else task + added
    return total, {"task": task.detach(), **{k: v.detach() for k, v in parts.items()}}


def run_stage(model, stage: Stage | None, texts: Texts, rows: Tensor, rates) -> dict:
    """Train one stage: AdamW, 5 % warm-up, then linear to zero, gradients of length 1 at most."""
    if stage is not None:
        begin_stage(model, stage)
        set_trainable(model, stage.trains)
    else:
        model.requires_grad_(True)
    model.train()
    optimizer = torch.optim.AdamW(_groups(model, stage, rates), fused=model.device.type == "cuda")
    steps, parts = len(rows), {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    start, warm = time.perf_counter(), max(1, round(WARMUP * len(rows)))
    for step in range(steps):
        done = step / steps
        factor = min(1.0, (step + 1) / warm) * min(1.0, (steps - step) / (steps - warm))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        schedule = "constant" if stage is None else stage.loss_schedule
        added = {"constant": 1.0, "linear": done, "linear_warmup": min(1.0, 2 * done)}[schedule]
        loss, parts = loss_of(model, texts.batch("train", rows[step]), stage, added)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    found = {key: round(value.item(), 4) for key, value in parts.items()}
    if stage is not None:
        end_stage(model, stage)
    model.requires_grad_(False).eval()
    return found | {"seconds": round(time.perf_counter() - start, 1), "steps": steps}


def _groups(model, stage: Stage | None, rates: tuple[float, float]) -> list[dict]:
    decay = 0.0 if stage is None else stage.weight_decay
    groups: dict[tuple, list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((matches(name, "router"), parameter.ndim > 1), []).append(parameter)
    return [
        {"params": own, "peak": rates[router], "lr": 0.0, "weight_decay": decay if matrix else 0.0}
        for (router, matrix), own in groups.items()
    ]


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


def trained(name: str, dense, texts: Texts, lr: float | None, seed: int, sizes: Sizes):
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


def objective(name: str, dense, texts: Texts, lr: float, sizes: Sizes) -> dict:
    """What the first stage of a training minimizes, on text apart, after a short trial at `lr`."""
    model, training = copy.deepcopy(dense), TRAININGS[name]
    recipe = training.recipe and training.recipe()
    if recipe is not None:
        texts.partitions.convert(model, recipe, "untouched", 0)
        pass_stages(model, texts, _first_fits(recipe), 0)
    stage = gradient_stages(recipe)[0]
    facts = run_stage(model, stage, texts, texts.order(0, sizes.search_steps), rates_of(name, lr))
    if stage is not None:
        begin_stage(model, stage)
    model.train()  # activations are recorded in training only
    with torch.no_grad():
        batches = texts.batches("dev", sizes.batch)
        found = [loss_of(model, batch, stage)[0].item() for batch in batches]
    value = sum(found) / len(found)
    return {"objective": value if math.isfinite(value) else 1e9, "seconds": facts["seconds"]}


def pass_stages(model, texts: Texts, stages: Iterable[Stage], seed: int) -> dict:
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


def fit_batches(texts: Texts, part: str) -> Iterator[dict[str, Tensor]]:
    for batch in texts.batches(part, texts.sizes.evaluation):
        yield {key: value for key, value in batch.items() if key != "targets"}


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
