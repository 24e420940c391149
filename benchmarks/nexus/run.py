"""One training, extension or evaluation of nexus.py.

Training is AdamW on float32 weights with bf16 products, 10 % warm-up and a cosine to zero.

Shapes: B packs of a batch, S = 512 tokens of a pack, E experts.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from quality_data import text_batch
from split_run import DOMAINS, logits_of
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecraft as sc
from sparsecraft.data.encoding import IGNORED
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.losses import auxiliary_loss


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of everything, and the peak of every learning rate.

    Attributes:
        expert_steps: of a dense model on one domain, but at most two passes over it.
        mix_steps: of every mixture and every control.
        budgets: steps after an extension.
        batch: packs of a step.
        evaluation: packs of a forward pass.
        calibration: packs of new and of old data for a linear router's new row.
    """

    expert_steps: int = 120
    mix_steps: int = 150
    budgets: tuple[int, ...] = (10, 30, 100)
    batch: int = 24
    evaluation: int = 32
    calibration: int = 16
    valid_packs: int = 160
    learning_rate: float = 2e-4


TINY = Sizes(3, 3, (1, 2), 6, 4, 2, 2)
TINY_LENGTH, TINY_WORDS = 64, 49_152


class Texts:
    """The packs that nexus_data.py wrote, on a device."""

    def __init__(self, path: Path, sizes: Sizes, device: str):
        length, words = (TINY_LENGTH, TINY_WORDS) if sizes == TINY else (512, 1 << 16)
        self.sizes = sizes
        with np.load(path) as file:
            self.embeddings = torch.from_numpy(file["embeddings"]).float()
            self.parts = {
                name: torch.from_numpy(file[name][:, :length].astype(np.int64) % words).to(device)
                for name in file.files
                if "/" in name
            }

    def count(self, domain: str) -> int:
        return len(self.parts[f"{domain}.train/ids"])

    def packs(self, part: str, rows) -> tuple[Tensor, Tensor]:
        """Ids and positions of some packs, (B, S) each."""
        ids, positions = (self.parts[f"{part}/{key}"][rows] for key in ("ids", "positions"))
        return ids, positions

    def steps(self, shares: Mapping[str, int], steps: int, seed: int) -> Iterator[dict]:
        """Batches with so many packs of each domain, in an order of the seed, again and again."""
        generator = np.random.default_rng(seed)
        orders = {
            name: np.concatenate(
                [
                    generator.permutation(self.count(name))
                    for _ in range(-(-steps * each // self.count(name)))
                ]
            )
            for name, each in shares.items()
        }
        for step in range(steps):
            parts = [
                self.packs(f"{name}.train", orders[name][step * each : (step + 1) * each])
                for name, each in shares.items()
            ]
            yield text_batch(*map(torch.cat, zip(*parts, strict=True)))

    def some(self, domain: str) -> list[Tensor]:
        """A few packs of the training part, as batches of ids."""
        ids = self.parts[f"{domain}.train/ids"][: self.sizes.calibration]
        return list(ids.split(8))


def shares_of(domains: tuple[str, ...], batch: int) -> dict[str, int]:
    """The packs of a step, alike of each domain."""
    return dict.fromkeys(domains, batch // len(domains))


def train(
    model: nn.Module, texts: Texts, shares: Mapping[str, int], steps: int, seed: int
) -> dict[str, float]:
    """Train all weights, with the losses of the recipe where there is one."""
    record = getattr(model, "sparsecraft", None)
    coefficients = record.recipe.stages[-1].losses if record else {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, MoELayer)}
    unbalanced = {n for n, layer in layers.items() if not layer.router.spec.balanced}
    model.requires_grad_(True).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=0.0, weight_decay=0.0, fused=model.device.type == "cuda"
    )
    start, warm = time.perf_counter(), max(1, round(0.1 * steps))
    losses = []
    for step, batch in enumerate(texts.steps(shares, steps, seed)):
        done = max(0.0, (step - warm) / max(1, steps - warm))
        rise = min(1.0, (step + 1) / warm)
        optimizer.param_groups[0]["lr"] = (
            texts.sizes.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * done))
        )
        for layer in layers.values():
            layer.router.at_step(step)
        traced = sc.trace(model) if coefficients else nullcontext({})
        with torch.autocast(model.device.type, torch.bfloat16), traced as routings:
            task = task_loss(model, batch)
            counted = {n: r for n, r in routings.items() if n not in unbalanced}
            added, _ = auxiliary_loss(counted, coefficients)
        (task if added is None else task + added).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(task.detach())
    model.requires_grad_(False).eval()
    found = torch.stack(losses).float()
    seconds = time.perf_counter() - start
    length = batch["input_ids"].shape[1]
    return {
        "steps": steps,
        "last_loss": round(found[-10:].mean().item(), 4),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(steps * sum(shares.values()) * length / seconds),
    }


def task_loss(model: nn.Module, batch: dict[str, Tensor], reduction: str = "mean") -> Tensor:
    return F.cross_entropy(
        logits_of(model, batch).flatten(0, 1).float(),
        batch["targets"].flatten(),
        ignore_index=IGNORED,
        reduction=reduction,
    )


@torch.no_grad()
def evaluate(model: nn.Module, texts: Texts) -> dict:
    """Held-out loss per token of each domain; and the share of a domain's tokens, by weight, that
    each expert gets, mean over the layers whose routers select."""
    routed = any(isinstance(m, MoELayer) for m in model.modules())
    loss, routing = {}, {}
    for domain in DOMAINS:
        total, count, shares = 0.0, 0, []
        part = f"{domain}.valid"
        packs = min(len(texts.parts[f"{part}/ids"]), texts.sizes.valid_packs)
        for rows in torch.arange(packs).split(texts.sizes.evaluation):
            batch = text_batch(*texts.packs(part, rows.to(model.device)))
            traced = sc.trace(model) if routed else nullcontext({})
            with torch.autocast(model.device.type, torch.bfloat16), traced as routings:
                total += task_loss(model, batch, "sum").item()
            count += (batch["targets"] != IGNORED).sum().item()
            found = [r.weights_TE() for r in routings.values() if not r.in_order]
            shares += [(w / w.sum(-1, keepdim=True)).mean(0) for w in found]
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
