"""One training run of cohere_quality.py, on the sessions of quality_run.py.

Shapes: B packs of a batch, S = 512 tokens of a pack, E experts, D documents.
"""

from __future__ import annotations

import math
import statistics
from contextlib import nullcontext

import torch
from cohere_arms import ARMS, Run, uniform
from cohere_tests import PARTS, Batches, CoherePacks, choice_scores, losses
from quality_run import Session, adamw
from torch import Tensor
from torch.nn import functional as F

import sparsecraft as sc
from sparsecraft.data.encoding import IGNORED
from sparsecraft.evaluation.routing import first_choices_E, load_entropy, mutual_information
from sparsecraft.moe.context import sentence_width
from sparsecraft.surgery.trainable import matches

BATCH = 16


class Adafactor:
    """transformers' Adafactor(scale_parameter=True, relative_step=False), without its host waits.

    Parameters of one shape are updated together. The first dimension counts them.
    """

    def __init__(self, parameters: list[Tensor], lr: Tensor):
        self.lr, self.state = lr, {}
        shapes: dict[torch.Size, list[Tensor]] = {}
        for parameter in parameters:
            shapes.setdefault(parameter.shape, []).append(parameter)
        for shape, own in shapes.items():
            zeros = own[0].new_zeros
            row, col = zeros(len(own), *shape[:-1]), zeros(len(own), *shape[:-2], shape[-1])
            self.state[tuple(own)] = {"step": zeros(()), "row": row, "col": col}

    @torch.no_grad()
    def step(self) -> None:
        for own, state in self.state.items():
            grad, step = torch.stack([p.grad for p in own]), state["step"].add_(1)
            new = step**-0.8  # 1 - beta_2
            square, row, col = grad**2 + 1e-30, state["row"], state["col"]
            row.add_((square.mean(-1) - row) * new)
            col.add_((square.mean(-2) - col) * new)
            factor = (row / row.mean(-1, keepdim=True)).rsqrt()
            update = grad * factor.unsqueeze(-1) * col.rsqrt().unsqueeze(-2)
            update /= _rms(update).clamp(min=1.0)
            update *= _rms(torch.stack(own)).clamp(min=1e-3) * self.lr
            torch._foreach_sub_(list(own), list(update.unbind(0)))

    def zero_grad(self, set_to_none: bool = True) -> None:
        for own in self.state:
            for parameter in own:
                parameter.grad = None


def _rms(stacked: Tensor) -> Tensor:
    over = tuple(range(1, stacked.ndim))
    return stacked.square().mean(over, keepdim=True).sqrt()


class CohereSession(Session):
    """A session with learning rates apart, sentence embeddings, and evaluation as a CUDA graph."""

    methods = ARMS

    def __init__(
        self,
        name: str,
        dense,
        packs: CoherePacks,
        mode: str,
        steps: int,
        batches: dict[str, Batches],
        batch: int = BATCH,
    ):
        self.tests, self.uniform = batches, False
        super().__init__(name, dense, packs, mode, steps, batch)

    # -------------------------------------------------------------- training
    def _optimizer(self):
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.routers = [p for n, p in named if matches(n, "router")]
        self.facts["router"] = sum(p.numel() for p in self.routers)
        self.router_lr = torch.zeros_like(self.lr)
        if self.method.optimizer == "adafactor":
            return Adafactor(self.parameters, self.lr)
        groups = [{"params": [p for n, p in named if not matches(n, "router")], "lr": self.lr}]
        if self.routers:
            groups.append({"params": self.routers, "lr": self.router_lr})
        return adamw(groups, self.lr)

    def _watch(self) -> None:
        """No routing is recorded in training: its record would be written out at every site."""
        self.by_sentence = sentence_width(self.model) is not None
        first = next(iter(self.tests.values())).tensors
        self.fixed = {key: value[0].clone() for key, value in first.items()}

    def _steps(self, seed: int) -> dict[str, Tensor]:
        if seed not in self.data:
            found = self.packs.steps(seed, self.steps, self.batch, self.by_sentence)
            self.data[seed] = {k: v.to(self.device) if v.ndim else v for k, v in found.items()}
        return self.data[seed]

    def _tell(self, source: dict[str, Tensor]) -> None:
        """Name the sentences of the next forward pass: its hook is on the model around."""
        if self.by_sentence:
            batch = self.model.sparsecraft.layers[0].batch
            batch.held = {
                "sentence_embeddings": source["embedding"],
                "sentence_ids": source["sentence"],
            }
            batch.clear()

    def _step(self) -> None:
        at = self.static
        self._tell(at)
        rows = self.hidden(at["ids"], at["positions"]).index_select(0, at["label_index"])
        logits = self.model.lm_head(rows).float()
        loss = F.cross_entropy(logits, at["targets"], ignore_index=IGNORED)
        loss.backward()
        if self.method.optimizer == "adamw":
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        self.loss = loss.detach()

    def _warm_up(self) -> None:
        super()._warm_up()
        if "graph" not in self.mode:
            return
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            self._score()
        torch.cuda.synchronize()
        self.scoring = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.scoring):
            self.values = self._score()

    def reset(self, seed: int) -> None:
        super().reset(seed)
        if self.uniform:
            with torch.no_grad():
                for parameter in self.routers:
                    parameter.zero_()

    def train(self, run: Run, steps: int | None = None) -> dict:
        self.uniform = uniform(run.method)
        return super().train(run, steps)

    def _set_rates(self, run: Run, factor: float) -> None:
        self.lr.fill_(run.lr * factor)
        self.router_lr.fill_(run.router_lr * factor)

    # -------------------------------------------------------------- evaluation
    def _score(self) -> Tensor:
        """The loss of every label of the batch in `fixed`; gradients stay on, as compiled."""
        at = self.fixed
        self._tell(at)
        rows = self.hidden(at["ids"], at["positions"], at["branch"])
        logits = self.model.lm_head(rows.index_select(0, at["index"])).float().detach()
        return F.cross_entropy(logits, at["target"], ignore_index=IGNORED, reduction="none")

    def totals(self, part: str) -> Tensor:
        """(2, D): every document's summed loss, and its number of labels."""
        own = self.tests[part]
        found = torch.zeros(2, own.documents + 1, dtype=torch.float64, device=self.device)
        for number in range(len(own)):
            for key, value in self.fixed.items():
                value.copy_(own.tensors[key][number])
            if "graph" in self.mode:
                self.scoring.replay()
                values = self.values
            else:
                values = self._score()
            counted = self.fixed["target"] != IGNORED
            found.index_add_(1, self.fixed["owner"], torch.stack([values, counted]).double())
        return found[:, :-1].cpu()

    def evaluate(self) -> tuple[dict, dict[str, list[float]]]:
        """The row's losses, and every document's summed loss, for paired comparisons."""
        totals = {part: self.totals(part) for part in PARTS}
        documents = {
            part: [round(v, 3) for v in totals[part][0].tolist()] for part in ("held_out", "unseen")
        }
        return losses(totals, self.packs.facts["datasets"]), documents

    def choices(self) -> dict:
        return choice_scores(self.packs.facts["choice"], self.totals("choice"))

    def routing_facts(self) -> dict[str, float]:
        """How far the routers are from uniform, and whether experts follow the domain.

        Mean over sites, on one batch of each domain: entropy of the scores' softmax over log E,
        load entropy of the first choice, and its mutual information with the domain, in bits.
        """
        entropies, counts = [], {}
        eager = torch.compiler.set_stance("force_eager") if self.mode != "eager" else nullcontext()
        with eager, torch.no_grad(), sc.trace(self.model) as trace:
            for domain in ("held_out", "math", "code"):
                for key, value in self.fixed.items():
                    value.copy_(self.tests[domain].tensors[key][0])
                self._score()
                real = self.fixed["real"].flatten()
                for site, routing in trace.items():
                    heads = len(routing.logits_TE) // len(real)
                    mask = real.repeat_interleave(heads)
                    probs_TE = routing.logits_TE[mask].softmax(-1)
                    entropy = torch.special.entr(probs_TE).sum(-1).mean()
                    entropies.append(entropy / math.log(routing.num_experts))
                    counts.setdefault(site, []).append(first_choices_E(routing, mask))
        return {
            "entropy": float(torch.stack(entropies).mean()),
            "load_entropy": statistics.mean(load_entropy(sum(c)) for c in counts.values()),
            "mi_bits": statistics.mean(mutual_information(torch.stack(c)) for c in counts.values()),
        }
