"""One training: AdamW under a schedule, eager, compiled, or as one CUDA graph.

A study subclasses `Session` and writes `loss`; data, groups and schedule are arguments. It knows
nothing about recipes, results or where data comes from.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsecraft.surgery.trainable import matches

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Schedule:
    """A warm-up over a share of the steps, then `constant`, or `linear` or a `cosine` to zero.

    Attributes:
        from_zero: the warm-up begins at zero, as transformers' does, instead of one step later.
    """

    shape: str
    warm_up: float
    from_zero: bool = False

    def factor(self, step: int, steps: int) -> float:
        """What the learning rates are multiplied by at a step, counted from 0."""
        share = self.warm_up * steps
        warm = math.ceil(share) if self.from_zero else max(1, round(share))
        if step < warm:
            return (step + (not self.from_zero)) / warm
        if self.shape == "cosine":
            done = (step - warm) / max(1, steps - warm)
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1.0 if self.shape == "constant" else (steps - step) / (steps - warm)


def groups_of(model: nn.Module, rates: tuple[float, float], decay: float = 0.0) -> list[dict]:
    """Groups of all that trains: routers and the rest, matrices (which decay) and the rest.

    Args:
        rates: the peak learning rates of all weights and of routers.
    """
    groups: dict[tuple, list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((matches(name, "router"), parameter.ndim > 1), []).append(parameter)
    return [
        {"params": own, "peak": rates[router], "weight_decay": decay if matrix else 0.0}
        for (router, matrix), own in groups.items()
    ]


def adamw(groups: list[dict], *, fused: bool | None, rate: Tensor | float = 0.0):
    """AdamW over `groups`; a tensor as `rate` gives each group one, which a CUDA graph reads."""
    held = isinstance(rate, Tensor)
    capturable = held and rate.device.type == "cuda"
    groups = [group | {"lr": rate.clone() if held else rate} for group in groups]
    options = {"betas": (0.9, 0.999), "weight_decay": 0.0, "fused": fused}
    return torch.optim.AdamW(groups, lr=groups[0]["lr"], capturable=capturable, **options)


class Session(ABC):
    """A model in training.

    Modes: `eager`; `compile`, each decoder layer under torch.compile; `graph`, that and the whole
    step as one CUDA graph over the batch in `static`; `eager_graph`, the graph without the
    compiler.

    Args:
        optimizer: its groups have a `peak`, the largest learning rate, beside `lr`.
        parameters: what gradient clipping counts, in this order; by default the groups'.

    Attributes:
        step, steps: which step of how many is taken.
        parts: the losses of the last step by name, `task` among them.
    """

    clips = True  # gradients to length one

    def __init__(
        self, model: nn.Module, optimizer, parameters: list | None = None, mode: str = "eager"
    ):
        self.model, self.optimizer, self.mode = model, optimizer, mode
        self.parameters = parameters or [p for g in optimizer.param_groups for p in g["params"]]
        self.step, self.steps, self.parts = 0, 1, {}
        self.static: Batch = {}
        self.graph = None

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """What a step minimizes, and its parts, `task` among them."""

    def _step(self, batch: Batch) -> None:
        total, parts = self.loss(batch)
        total.backward()
        if self.clips:
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        self.parts = {"total": total.detach()} | {k: v.detach() for k, v in parts.items()}

    def take(self, batch: Batch) -> None:
        """One step of training."""
        for key, value in self.static.items():
            value.copy_(batch[key])
        if self.graph is not None:
            self.graph.replay()
            return
        self._step(self.static or batch)
        self.optimizer.zero_grad(set_to_none=True)

    def hold(self, batch: Batch) -> None:
        """Take every later batch in the memory of this one; compile and capture the step, with
        learning rates of zero. The optimizer's state is then to be cleared."""
        self.static = {key: value.clone() for key, value in batch.items()}
        if self.mode in ("compile", "graph"):
            for layer in self.model.model.layers:
                layer.compile()
        stream = torch.cuda.Stream() if self.model.device.type == "cuda" else None
        self.set_rates(0.0)
        with torch.cuda.stream(stream) if stream else nullcontext():
            for _ in range(3):
                self._step(self.static)
                self.optimizer.zero_grad(set_to_none=True)
        if stream:
            torch.cuda.synchronize()
        if "graph" in self.mode:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step(self.static)

    def set_rates(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            rate = group["peak"] * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def descend(
        self, batches: Iterable[Batch], schedule: Schedule, steps: int, name: str = "task"
    ) -> Tensor:
        """Train on `batches`, which may end before the schedule's `steps`; one of the losses at
        every step."""
        losses, self.steps = [], steps
        for self.step, batch in enumerate(batches):
            self.set_rates(schedule.factor(self.step, steps))
            self.take(batch)
            losses.append(self.parts[name].clone())
        return torch.stack(losses).float()
