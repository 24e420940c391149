"""One training of an arm, its evaluation, and the worker that takes runs from the queue.

Shapes: B packs of a batch, S = 512 tokens of a pack, E experts, D documents.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
import sys
import time
import traceback
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

import sparsecraft as sc
from benchmarks.cohere.arms import ARMS, Run, best_run, host, next_run, score, uniform
from benchmarks.cohere.measures import (
    PARTS,
    Batches,
    CoherePacks,
    all_batches,
    choice_scores,
    losses,
)
from benchmarks.lab import clocks
from benchmarks.lab.models import dense_model, forget
from benchmarks.lab.packed import PackedSession
from benchmarks.lab.queue import Queue, Rows
from benchmarks.lab.session import Batch, adamw
from sparsecraft.data.encoding import IGNORED
from sparsecraft.evaluation.routing import first_choices_E, load_entropy, mutual_information
from sparsecraft.moe.context import sentence_width
from sparsecraft.surgery.trainable import matches


class Adafactor:
    """transformers' Adafactor(scale_parameter=True, relative_step=False), without its host waits.

    Parameters of one shape are updated together. The first dimension counts them.
    """

    def __init__(self, parameters: list[Tensor], lr: Tensor):
        self.param_groups = [{"params": parameters, "lr": lr, "peak": 0.0}]
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


class CohereSession(PackedSession):
    """A session with learning rates apart, sentence embeddings, and evaluation as a CUDA graph.

    Args:
        batches: what it is measured on; none for a session that only trains.
    """

    methods = ARMS

    def __init__(self, *arguments, batches: dict[str, Batches]):
        self.tests, self.uniform = batches, False
        super().__init__(*arguments)
        self.clips = self.method.optimizer == "adamw"
        if "graph" in self.mode:
            self._capture_score()

    def _optimizer(self, model, trained: list):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.routers = [p for n, p in named if matches(n, "router")]
        self.facts["router"] = sum(p.numel() for p in self.routers)
        if self.method.optimizer == "adafactor":
            return Adafactor(trained, self._zero())
        experts = [p for n, p in named if not matches(n, "router")]
        groups = [{"params": own, "peak": 0.0} for own in (experts, self.routers) if own]
        return adamw(groups, fused=True, rate=self._zero())

    def _watch(self) -> None:
        """No routing is recorded in training: its record would be written out at every site."""
        self.by_sentence = sentence_width(self.model) is not None
        first = next(iter(self.tests.values())).tensors if self.tests else {}
        self.fixed = {key: value[0].clone() for key, value in first.items()}

    def make_steps(self, seed: int) -> Batch:
        return self.packs.steps(seed, self.run_steps, self.batch, self.by_sentence)

    def _tell(self, source: Batch) -> None:
        """Name the sentences of the next forward pass: its hook is on the model around."""
        if self.by_sentence:
            batch = self.model.sparsecraft.layers[0].batch
            batch.held = {
                "sentence_embeddings": source["embedding"],
                "sentence_ids": source["sentence"],
            }
            batch.clear()

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        self._tell(batch)
        task = self.task(batch)
        return task, {"task": task}

    def _capture_score(self) -> None:
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

    def set_peaks(self, run: Run) -> None:
        super().set_peaks(run)
        if self.routers and len(self.optimizer.param_groups) > 1:
            self.optimizer.param_groups[1]["peak"] = run.router_lr

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


# ------------------------------------------------------------------ workers
class Worker:
    """One device: the data, the dense model, and the session of the arm that runs."""

    def __init__(self, args, gpu: int | None):
        self.args, self.gpu, self.session, self.costs = args, gpu, None, {}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.packs = CoherePacks(args.data, args.rows)
        self.tests = all_batches(self.packs, args.batch, device)
        self.dense = dense_model(args.model, device, rounded=True)
        self.about = clocks.about(device)

    def prepare(self, name: str) -> None:
        """The session of an arm; without the compiler where that fails, and the row says so."""
        modes = [self.args.mode] + (["eager_graph"] if self.args.mode == "graph" else [])
        for mode in modes:
            try:
                return self._build(name, mode)
            except Exception:
                print(f"gpu{self.gpu} {name} {mode} FAILED", flush=True)
                traceback.print_exc(limit=-6)
                failure = traceback.format_exc(limit=-2)
        raise RuntimeError(failure)

    def _build(self, name: str, mode: str) -> None:
        self.session = None
        forget()
        args = self.args
        self.session = CohereSession(
            name, self.dense, self.packs, mode, args.steps, args.batch, batches=self.tests
        )
        if not ARMS[name].recipe(**ARMS[name].options).exact_at_start:
            self.session.reset(0)
            self.session.facts["start"] = self.session.evaluate()[0]["valid"]

    def run(self, run: Run, earlier: list[dict]) -> tuple[dict, dict]:
        """The row of one run, and the losses of its documents."""
        session, row = self.session, {}
        if ARMS[run.method].recipe is None:
            session.uniform = False
            session.reset(run.seed)
        else:
            row = session.train(run)
            del row["first_losses"]
        found, documents = session.evaluate()
        row |= found | session.facts | {"mode": session.mode}
        if session.uniform:
            row["trainable"] -= row["router"]
        best = best_run(earlier, run.method)
        if run.seed or best is None or score(row) < score(best) or not ARMS[run.method].search:
            row["choice"] = session.choices()
        if run.seed and session.routers and not session.uniform:
            row["routing"] = session.routing_facts()
        return row, documents


def work(args, gpu: int | None) -> None:
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    logging.basicConfig(level=logging.WARNING)
    worker = Worker(args, gpu)
    queue, last = Queue(args.results, next_run), None
    documents_file = Rows(args.results.with_suffix(".documents"))
    print(f"{time.time() - args.begun:6.0f}s gpu{gpu} ready", flush=True)
    while True:
        run = queue.take(last)
        start = time.time()
        if run is None:
            return
        new = host(run.method) != last
        if start + worker.costs.get(last, 15) + (args.setup if new else 0) > args.deadline:
            return
        row = dict(run.__dict__)
        try:
            if new:
                last = host(run.method)
                worker.prepare(last)
            found, documents = worker.run(run, queue.rows.read())
        except Exception:
            queue.put(row | {"failed": traceback.format_exc(limit=-4)})
            traceback.print_exc(limit=-6)
            last, worker.session = None, None
            continue
        if not new:
            worker.costs[last] = time.time() - start
        row |= worker.about | found | {"wall_s": round(time.time() - start, 1)}
        queue.put(row)
        documents_file.put(run.__dict__ | documents)
        valid = {k: round(v, 4) for k, v in row["valid"].items()}
        print(f"{time.time() - args.begun:6.0f}s gpu{gpu} {run.key} {valid} train "
              f"{row.get('train_s')}s {row.get('tokens_per_s')} tok/s setup {row['setup_s']} "
              f"wall {row['wall_s']} {row['mode']}", flush=True)  # fmt: skip


def smoke(args) -> None:
    """A few steps of some arms in one mode, evaluation and choices included; no results file."""
    worker = Worker(args, 0 if torch.cuda.is_available() else None)
    failed = []
    for name in args.methods or [name for name, arm in ARMS.items() if arm.recipe]:
        arm, start = ARMS[name], time.time()
        try:
            if worker.session is None or worker.session.name != host(name):
                worker.prepare(host(name))
            run = Run(name, "linear", arm.rate, 1, arm.router or 0.0)
            row, documents = worker.run(run, [])
        except Exception:
            print(name, "FAILED", traceback.format_exc(limit=-6), flush=True)
            failed.append(name)
            continue
        keys = ("mode", "trainable", "router", "train_s", "tokens_per_s", "setup_s", "peak_gib")
        print(name, {k: row.get(k) for k in keys}, row["valid"], row.get("start"),
              row["choice"]["sum"], row.get("routing"), {k: len(v) for k, v in documents.items()},
              f"{time.time() - start:.1f}s", flush=True)  # fmt: skip
    print("failed:", failed)
    sys.exit(1 if failed else 0)
