"""Sessions on packed chats: one method's model, reset and trained again for every run.

Frozen weights are bf16 and what trains is float32. Shapes: B packs of a batch, S tokens of a pack.
"""

from __future__ import annotations

import copy
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

import sparsecraft as sc
from benchmarks.lab.packs import Packs, document_mask, training_steps
from benchmarks.lab.queue import Run
from benchmarks.lab.session import Batch, Schedule, Session, adamw
from sparsecraft.data.encoding import IGNORED

WARM_UP = 0.03


class Method(Protocol):
    """What is compared; `recipe` None is the dense model.

    `full`: all weights train, in float32 under bf16 autocast.
    """

    recipe: Callable | None
    options: Mapping
    full: bool


def build(dense: LlamaForCausalLM, method: Method, seed: int) -> tuple[LlamaForCausalLM, dict]:
    """A converted copy in training mode, and its size; frozen weights in bf16."""
    model = copy.deepcopy(dense)
    facts: dict = {"certificate": None}
    if method.recipe is not None:
        report = sc.convert(model, method.recipe(**method.options), seed=seed)
        facts["certificate"] = report.certificate.max_difference
    counts = sc.count(model)
    facts |= {"trainable": counts.trainable, "total": counts.total, "active": counts.active}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.train(), facts


class PackedSession(Session):
    """One method's model on one device. Rebuilding it for each run would spend the time on
    compilation; a run starts from the tensors that `sc.convert` makes with its seed."""

    methods: Mapping[str, Method]

    def __init__(
        self,
        name: str,
        dense: LlamaForCausalLM,
        packs: Packs,
        mode: str,
        steps: int,
        batch: int,
    ):
        self.name, self.method, self.dense, self.packs = name, self.methods[name], dense, packs
        self.run_steps, self.batch, self.device = steps, batch, dense.device.type
        start, held = time.perf_counter(), self._memory()
        model, self.facts = build(dense, self.method, 0)
        self.seed, self.data, self.untrained = 0, {}, {}
        trained = [p for p in model.parameters() if p.requires_grad]
        self.starts = {0: [p.detach().clone() for p in trained]}
        super().__init__(model, self._optimizer(model, trained), trained, mode)
        self._watch()
        if mode != "eager":
            self.hold({k: v[0] for k, v in self._steps(0).items() if v.ndim})
        copies = sum(t.numel() * t.element_size() for t in self.starts[0])
        self.facts["peak_gib"] = round((self._memory(peak=True) - held - copies) / 2**30, 2)
        self.facts["setup_s"] = round(time.perf_counter() - start, 1)

    def _optimizer(self, model: LlamaForCausalLM, trained: list):
        return adamw([{"params": trained, "peak": 0.0}], fused=True, rate=self._zero())

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self.device)

    @abstractmethod
    def _watch(self) -> None:
        """Once the model stands: what is recorded of it for the session's life."""

    def _memory(self, peak: bool = False) -> int:
        if self.device != "cuda":
            return 0
        if peak:
            return torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    # -------------------------------------------------------------- data
    def make_steps(self, seed: int) -> Batch:
        """Every step's tensors, stacked."""
        return training_steps(self.packs, seed, self.run_steps, self.batch)

    def _steps(self, seed: int) -> Batch:
        """Those of a seed on the device, in the shapes of seed 0, which are captured."""
        if seed not in self.data:
            stacked = self.make_steps(seed)
            if seed:
                self._fit(stacked, self._steps(0))
            self.data[seed] = {k: v.to(self.device) if v.ndim else v for k, v in stacked.items()}
        return self.data[seed]

    def _fit(self, stacked: Batch, first: Batch) -> None:
        for key, fill in (("label_index", 0), ("targets", IGNORED), ("real_index", 0)):
            if key not in first:
                continue
            size, have = first[key].shape[1], stacked[key].shape[1]
            if key == "real_index" and have < size:
                stacked[key] = torch.cat([stacked[key], stacked[key][:, : size - have]], 1)
            elif have < size:
                stacked[key] = F.pad(stacked[key], (0, size - have), value=fill)
            elif key == "real_index":
                stacked[key] = stacked[key][:, :size].contiguous()
            elif have > size:
                raise ValueError(f"seed needs {have} labels in a step and {size} were captured")

    # -------------------------------------------------------------- the model
    def autocast(self):
        if not self.method.full:
            return nullcontext()
        return torch.autocast(self.device, torch.bfloat16, cache_enabled=False)

    def hidden(self, ids: Tensor, positions: Tensor, branch: Tensor | None = None) -> Tensor:
        """The last states of all tokens, (B*S, D)."""
        embedded = self.model.model.embed_tokens(ids)
        if not embedded.requires_grad:  # else the first layer would be compiled apart
            embedded.requires_grad_()
        out = self.model.model(
            inputs_embeds=embedded,
            position_ids=positions,
            attention_mask=document_mask(positions, branch),
            use_cache=False,
        )
        return out.last_hidden_state.flatten(0, 1)

    def task(self, batch: Batch) -> Tensor:
        """Cross entropy of the trained tokens of a batch."""
        with self.autocast():
            hidden = self.hidden(batch["ids"], batch["positions"])
            logits = self.model.lm_head(hidden.index_select(0, batch["label_index"]))
        return F.cross_entropy(logits.float(), batch["targets"], ignore_index=IGNORED)

    # -------------------------------------------------------------- runs
    def reset(self, seed: int) -> None:
        """The start of `seed`, as `sc.convert` makes it."""
        if seed not in self.starts:
            model, _ = build(self.dense, self.method, seed)
            self.starts[seed] = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter, start in zip(self.parameters, self.starts[seed], strict=True):
                parameter.copy_(start)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        self.seed = seed

    def set_peaks(self, run: Run) -> None:
        for group in self.optimizer.param_groups:
            group["peak"] = run.lr

    def train(self, run: Run, steps: int | None = None) -> dict:
        """One run from its start; `steps`: stop after so many, for a trial."""
        self.reset(run.seed)
        self.set_peaks(run)
        stacked = self._steps(run.seed)
        steps = steps or self.run_steps
        keys = [key for key, value in stacked.items() if value.ndim]
        batches = ({key: stacked[key][step] for key in keys} for step in range(steps))
        start = self.clock()
        losses = self.descend(batches, Schedule(run.schedule, WARM_UP), self.run_steps)
        took = self.clock() - start
        losses = losses.tolist()
        tail = losses[-max(1, len(losses) // 20) :]
        return {
            "train_loss_tail": sum(tail) / len(tail),
            "first_losses": losses[:20],
            "train_s": round(took, 2),
            "tokens_per_s": round(int(stacked["real_tokens"]) * steps / self.run_steps / took),
            "steps": steps,
        }

    def clock(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
