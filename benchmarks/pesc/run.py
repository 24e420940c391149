"""One training run of pesc_quality.py: build a method's model, train it, measure it.

Shapes: B packs of a batch, S = 512 tokens of a pack, T = B*S tokens, E experts.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from quality_data import Packs, document_mask, training_steps
from quality_scores import accuracies, add_counts, routing_facts, select
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import sparsecraft as sc
from sparsecraft.data.encoding import IGNORED
from sparsecraft.moe.losses import auxiliary_loss

DOMAINS = ("general", "math", "code")
BATCH = 24
WARMUP = 0.03


@dataclass(frozen=True)
class Method:
    """What is compared; `recipe` None is full fine-tuning of the dense model."""

    recipe: Callable | None
    options: Mapping

    @property
    def full(self) -> bool:
        """All weights train: fp32 weights under bf16 autocast, and smaller learning rates."""
        return self.recipe in (None, sc.recipes.upcycling)


def _camelidae(num_experts: int, **options) -> Method:
    same = {"num_experts": num_experts, "top_k": 2, "adapter_dim": 64, "dropout": 0.0}
    return Method(sc.recipes.camelidae, same | options)


METHODS = {
    "camelidae8": _camelidae(8),
    "adapter512": Method(sc.recipes.adapter, {"adapter_dim": 512, "dropout": 0.0}),
    "adapter128": Method(sc.recipes.adapter, {"adapter_dim": 128, "dropout": 0.0}),
    "camel": Method(sc.recipes.camel, {"dropout": 0.0}),
    "camelidae4": _camelidae(4),
    "camelidae16": _camelidae(16),
    "camelidae8_nobalance": _camelidae(8, balance="none"),
    "full": Method(None, {}),
    "upcycling4": Method(sc.recipes.upcycling, {"num_experts": 4, "top_k": 2}),
    "camelidae4_nobalance": _camelidae(4, balance="none"),
    "camelidae16_nobalance": _camelidae(16, balance="none"),
}


@dataclass(frozen=True)
class Run:
    method: str
    schedule: str
    lr: float
    seed: int

    @property
    def key(self) -> tuple:
        return self.method, self.schedule, f"{self.lr:.3g}", self.seed


def lr_factor(schedule: str, step: int, steps: int) -> float:
    """Warm-up, then constant or linear to zero."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return 1.0 if schedule == "constant" else (steps - step) / (steps - warm)


def adamw(parameters: list, lr: Tensor) -> torch.optim.AdamW:
    """AdamW whose learning rates are tensors, so that a captured step reads them."""
    on_cuda = lr.device.type == "cuda"
    options = {"betas": (0.9, 0.999), "weight_decay": 0.0, "fused": True, "capturable": on_cuda}
    return torch.optim.AdamW(parameters, lr=lr, **options)


# ------------------------------------------------------------------ model
def dense_model(source: str, device: str) -> LlamaForCausalLM:
    """float32 weights that have been rounded to bf16 once, so that every method starts alike."""
    shapes = {"random": (576, 1536, 30, 9, 3), "tiny": (64, 128, 2, 4, 2)}
    if source in shapes:
        torch.manual_seed(0)
        names = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        )
        config = LlamaConfig(
            vocab_size=49152,
            tie_word_embeddings=True,
            pad_token_id=2,
            **dict(zip(names, shapes[source], strict=True)),
        )
        model = LlamaForCausalLM(config)
    else:
        model = sc.hub.load_dense(source, dtype=torch.float32)
    return model.to(torch.bfloat16).float().to(device)


def build(dense: LlamaForCausalLM, method: Method, seed: int) -> tuple[LlamaForCausalLM, dict]:
    """A converted copy in training mode; frozen weights in bf16 unless all of them train."""
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


def coefficients(method: Method) -> dict[str, float]:
    return {} if method.recipe is None else method.recipe(**method.options).stages[0].losses


def forget() -> None:
    """Free the last method's model and its compiled code."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Session:
    """One method's model on one device, reset and trained again for every run.

    Modes: `eager`; `compile`, each decoder layer under torch.compile; `graph`, that and the whole
    step as one CUDA graph; `eager_graph`, the graph without the compiler. Rebuilding for each run
    would spend the time on compilation.
    """

    methods: Mapping = METHODS

    def __init__(
        self,
        name: str,
        dense: LlamaForCausalLM,
        packs: Packs,
        mode: str,
        steps: int,
        batch: int = BATCH,
    ):
        self.name, self.method, self.dense, self.packs = name, self.methods[name], dense, packs
        self.mode, self.steps, self.batch = mode, steps, batch
        self.device = dense.device.type
        start = time.perf_counter()
        held = self._memory()
        self.model, self.facts = self._build(0)
        self.seed = 0
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.starts = {0: [p.detach().clone() for p in self.parameters]}
        self.data: dict[int, dict[str, Tensor]] = {}
        self.untrained: dict[int, dict] = {}
        self.lr = torch.zeros((), device=self.device)
        self.optimizer = self._optimizer()
        self._watch()
        if mode in ("compile", "graph"):
            for layer in self.model.model.layers:
                layer.compile()
        self.static = {k: v[0].clone() for k, v in self._steps(0).items() if v.ndim}
        copies = sum(t.numel() * t.element_size() for t in self.starts[0])
        self._warm_up()
        self.facts["peak_gib"] = round((self._memory(peak=True) - held - copies) / 2**30, 2)
        self.facts["setup_s"] = round(time.perf_counter() - start, 1)

    def _build(self, seed: int) -> tuple[LlamaForCausalLM, dict]:
        return build(self.dense, self.method, seed)

    def _optimizer(self):
        return adamw(self.parameters, self.lr)

    def _watch(self) -> None:
        """Record every layer's routing, for the session's life."""
        self.losses = coefficients(self.method)
        self._trace = sc.trace(self.model)
        self.routing = self._trace.__enter__()

    def _memory(self, peak: bool = False) -> int:
        if self.device != "cuda":
            return 0
        if peak:
            return torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _steps(self, seed: int) -> dict[str, Tensor]:
        if seed not in self.data:
            stacked = training_steps(self.packs, seed, self.steps, self.batch)
            self.data[seed] = {k: v.to(self.device) if v.ndim else v for k, v in stacked.items()}
            self._fit(self.data[seed])
        return self.data[seed]

    def _fit(self, stacked: dict[str, Tensor]) -> None:
        """Give another seed's indices the shapes that were captured."""
        if not getattr(self, "static", None):
            return
        for key, fill in (("label_index", 0), ("targets", IGNORED), ("real_index", 0)):
            size, have = self.static[key].numel(), stacked[key].shape[1]
            if key == "real_index" and have < size:
                stacked[key] = torch.cat([stacked[key], stacked[key][:, : size - have]], 1)
            elif have < size:
                stacked[key] = F.pad(stacked[key], (0, size - have), value=fill)
            elif key == "real_index":
                stacked[key] = stacked[key][:, :size].contiguous()
            elif have > size:
                raise ValueError(f"seed needs {have} labels in a step and {size} were captured")

    def _warm_up(self) -> None:
        """Compile and capture with a learning rate of zero, then forget the optimizer's state."""
        stream = torch.cuda.Stream() if self.device == "cuda" else None
        self.lr.zero_()
        with torch.cuda.stream(stream) if stream else nullcontext():
            for _ in range(3):
                self._step()
                self.optimizer.zero_grad(set_to_none=True)
        if stream:
            torch.cuda.synchronize()
        if "graph" in self.mode:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step()

    def _autocast(self):
        if not self.method.full:
            return nullcontext()
        return torch.autocast(self.device, torch.bfloat16, cache_enabled=False)

    def hidden(self, ids: Tensor, positions: Tensor, branch: Tensor | None = None) -> Tensor:
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

    def _step(self) -> None:
        at = self.static
        with self._autocast():
            rows = self.hidden(at["ids"], at["positions"]).indexselect(0, at["label_index"])
            logits = self.model.lm_head(rows)
        loss = F.cross_entropy(logits.float(), at["targets"], ignore_index=IGNORED)
        kept = {n: select(r, at["real_index"]) for n, r in self.routing.items()}
        auxiliary, _ = auxiliary_loss(kept, self.losses)
        (loss if auxiliary is None else loss + auxiliary).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        self.loss = loss.detach()

    def reset(self, seed: int) -> None:
        """The start of `seed`, as `sc.convert` makes it."""
        if seed not in self.starts:
            model, _ = self._build(seed)
            self.starts[seed] = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter, start in zip(self.parameters, self.starts[seed], strict=True):
                parameter.copy_(start)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        self.seed = seed

    def train(self, run: Run, steps: int | None = None) -> dict:
        self.reset(run.seed)
        stacked = self._steps(run.seed)
        losses, start = [], self._clock()
        steps = steps or self.steps
        for step in range(steps):
            for key, value in self.static.items():
                value.copy_(stacked[key][step])
            self._set_rates(run, lr_factor(run.schedule, step, self.steps))
            if "graph" in self.mode:
                self.graph.replay()
            else:
                self._step()
                self.optimizer.zero_grad(set_to_none=True)
            losses.append(self.loss.clone())
        took = self._clock() - start
        losses = torch.stack(losses).float().tolist()
        tail = losses[-max(1, len(losses) // 20) :]
        return {
            "train_loss_tail": sum(tail) / len(tail),
            "first_losses": losses[:20],
            "train_s": round(took, 2),
            "tokens_per_s": round(int(stacked["real_tokens"]) * steps / self.steps / took),
            "steps": steps,
        }

    def _set_rates(self, run: Run, factor: float) -> None:
        self.lr.fill_(run.lr * factor)

    def _clock(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    # -------------------------------------------------------------- evaluation
    def batches(self, part: str):
        """Batches of one shape; the last is filled with rows that count nowhere."""
        arrays, labels = self.packs.parts[part], self.packs.labels(part)
        rows = len(labels)
        extra = -rows % self.batch
        pad = {k: np.pad(v, ((0, extra), (0, 0))) for k, v in arrays.items()}
        labels = np.pad(labels, ((0, extra), (0, 0)), constant_values=IGNORED)
        pad["positions"][rows:] = np.arange(labels.shape[1])
        for first in range(0, rows + extra, self.batch):
            at = slice(first, first + self.batch)
            label = labels[at].reshape(-1)
            index = np.flatnonzero(label != IGNORED)
            batch = {k: torch.from_numpy(v[at].astype(np.int64)) for k, v in pad.items()}
            batch |= {"index": torch.from_numpy(index), "target": torch.from_numpy(label[index])}
            yield {key: value.to(self.device) for key, value in batch.items()}

    def nll(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of every trained token. Gradients stay on: it is the training step's graph."""
        with self._autocast():
            rows = self.hidden(batch["ids"], batch["positions"])[batch["index"]]
            logits = self.model.lm_head(rows)
        return F.cross_entropy(logits.float(), batch["target"], reduction="none").detach()

    def evaluate(self, parts: tuple[str, ...] = (*DOMAINS, "gsm8k")) -> dict:
        valid, top, load = {}, {}, {}
        for part in parts:
            total, count = 0.0, 0
            for batch in self.batches(part):
                values = self.nll(batch).double()
                total, count = total + values.sum(), count + values.numel()
                if part in DOMAINS:
                    add_counts(self.routing, batch["real"].flatten().bool(), part, top, load)
            valid[part] = float(total / count)
        out = {"valid": valid}
        if "math" in valid:
            out["mc"] = (valid["math"] + valid["code"]) / 2
        return out | ({"routing": routing_facts(top, load, DOMAINS)} if top else {})

    def before(self, seed: int) -> dict:
        """The evaluation of the untrained start of `seed`; the model is at that start."""
        if seed not in self.untrained:
            self.untrained[seed] = self.evaluate()
        return self.untrained[seed]

    def choices(self) -> dict[str, dict[str, float]]:
        """Accuracy by summed and by mean log-probability, the median over a task's templates."""
        questions = self.packs.facts["choice"]
        number = questions[-1]["documents"][1]
        total = torch.zeros(2, number, dtype=torch.float64, device=self.device)
        for batch in self.batches("choice"):
            owner = batch["owner"].flatten()[batch["index"]]
            values = self.nll(batch).double()
            total.index_add_(1, owner, torch.stack([-values, torch.ones_like(values)]))
        scores = {"sum": total[0].tolist(), "mean": (total[0] / total[1]).tolist()}
        return {name: accuracies(questions, values) for name, values in scores.items()}
