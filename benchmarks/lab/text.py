"""Packs of plain text: batches, the loss of a causal model, its training and held-out loss.

Shapes: N packs, B packs of a batch, S tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecraft as sc
from benchmarks.lab.packs import document_mask
from benchmarks.lab.session import Batch, Session, adamw
from sparsecraft.data.encoding import IGNORED
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.losses import auxiliary_loss
from sparsecraft.moe.routers.selectors import Sample

LENGTH, TINY_LENGTH = 512, 64


class Texts:
    """Packed arrays by part, on a device: `ids` and `positions`, (N, S)."""

    def __init__(self, device: str, length: int = LENGTH, words: int = 1 << 16):
        self.device, self.length, self.words = device, length, words
        self.parts: dict[str, dict[str, Tensor]] = {}

    def add(self, file, part: str, limit: int | None = None) -> None:
        """Read a part of the file; ids are taken modulo the vocabulary of a tiny model."""
        self.parts[part] = {
            key: torch.from_numpy(
                file[f"{part}/{key}"][:limit, : self.length].astype(np.int64) % self.words
            ).to(self.device)
            for key in ("ids", "positions")
        }

    def count(self, part: str) -> int:
        return len(self.parts[part]["ids"])

    def batch(self, part: str, rows) -> Batch:
        return text_batch(*(self.parts[part][key][rows] for key in ("ids", "positions")))

    def batches(self, part: str, size: int) -> Iterator[Batch]:
        for start in range(0, self.count(part), size):
            yield self.batch(part, slice(start, start + size))


def text_batch(ids_BS: Tensor, positions_BS: Tensor) -> Batch:
    """A model's inputs, and `targets`: the next token of the same text, IGNORED where there is
    none."""
    next_ids = ids_BS[:, 1:].masked_fill(positions_BS[:, 1:] == 0, IGNORED)
    return {
        "input_ids": ids_BS,
        "position_ids": positions_BS,
        "attention_mask": document_mask(positions_BS),
        "targets": F.pad(next_ids, (0, 1), value=IGNORED),
    }


def inputs_of(batch: Batch) -> Batch:
    """What the model takes of a batch."""
    return {key: value for key, value in batch.items() if key not in ("targets", "real")}


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    return model(**inputs_of(batch), use_cache=False).logits


def task_loss(model: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
    """Cross entropy of the next tokens, in float32."""
    logits = logits_of(model, batch).flatten(0, 1).float()
    targets = batch["targets"].flatten()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction=reduction)


class TextSession(Session):
    """Trains a causal model on text, in bf16 products, with a recipe's losses beside the task's.

    Args:
        coefficients, ramp: the stage's `losses` and `loss_schedule`.
        counted: the layers whose routing the losses count; all by default.
        autocast: False computes in the weights' own type.
    """

    fuses = True  # AdamW, on a GPU

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict],
        coefficients: Mapping[str, float] | None = None,
        ramp: str = "constant",
        counted: Collection[str] | None = None,
        autocast: bool = True,
    ):
        fused = (model.device.type == "cuda") if self.fuses else None
        super().__init__(model, adamw(groups, fused=fused))
        self.coefficients, self.ramp, self.counted = coefficients or {}, ramp, counted
        self.autocast = autocast
        routers = [m.router for m in model.modules() if isinstance(m, MoELayer)]
        selects = [getattr(router, "select", None) for router in routers]
        self.samplers = [select for select in selects if isinstance(select, Sample)]

    def task(self, batch: Batch) -> Tensor:
        return task_loss(self.model, batch)

    def masks(self, batch: Batch):
        """A function of a layer's name: its real tokens, or None where every token is real."""
        real = batch.get("real")
        return lambda layer: real

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        for select in self.samplers:  # they cool down
            select.step = self.step
        done = self.step / self.steps
        ramps = {"constant": 1.0, "linear": done, "linear_warmup": min(1.0, 2 * done)}
        coefficients = {k: ramps[self.ramp] * c for k, c in self.coefficients.items()}
        device = self.model.device.type
        traced = sc.trace(self.model) if coefficients else nullcontext({})
        with torch.autocast(device, torch.bfloat16, self.autocast), traced as routings:
            task = self.task(batch)
            kept = {n: r for n, r in routings.items() if self.counted is None or n in self.counted}
            added, parts = auxiliary_loss(kept, coefficients, self.masks(batch))
        return task if added is None else task + added, {"task": task, **parts}


@torch.no_grad()
def held_out(model: nn.Module, batches: Iterable[Batch], meet=None) -> tuple[float, int]:
    """Summed loss and tokens of some batches; `meet(routings)` is shown what was routed."""
    routed = meet is not None and any(isinstance(m, MoELayer) for m in model.modules())
    total, count = 0.0, 0
    with sc.trace(model) if routed else nullcontext({}) as routings:
        for batch in batches:
            total += task_loss(model, batch, "sum").item()
            count += (batch["targets"] != IGNORED).sum().item()
            if routed:
                meet(routings)
    return total, count
