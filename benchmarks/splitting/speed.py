"""Tokens per second of generation with split models against the dense ones, on one machine.

Greedy, one sequence: `generate` as `sparsecraft generate` calls it, and on a GPU also one decoding
step as a CUDA graph over a static cache. Prompts are beginnings of validation texts; every model
makes the same number of tokens, whatever it says.
"""

from __future__ import annotations

import copy
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import sparsecraft as sc
from benchmarks.lab.clocks import sync
from benchmarks.splitting.arms import ARMS, TRAININGS
from benchmarks.splitting.curves import Meter, evaluate
from sparsecraft.errors import SparsecraftError
from sparsecraft.recipe.overrides import override
from sparsecraft.surgery.budget import restore, set_budget, split_layers, state_of

BUDGETS = (0.25, 0.5)
NEW = {"cpu": 32, "cuda": 64}  # tokens of each prompt
REPEATS = 3


def keep(folder: Path, name: str, model: nn.Module) -> None:
    """Save a model of `run` for `speed`: tensors, and how it runs."""
    state = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    how = None if name == "dense" else state_of(model)
    torch.save((state, how), folder / f"keep-{name}.pt")


def kept(folder: Path, name: str, dense: nn.Module) -> nn.Module:
    """The model of that name, on the device of `dense`."""
    state, how = torch.load(folder / f"keep-{name}.pt", map_location=dense.device)
    model = copy.deepcopy(dense)
    if name != "dense":
        arm, training = name.split(":")
        in_place = ARMS[arm].in_place
        recipe = TRAININGS[training].recipe if in_place else ARMS[arm].recipe
        # The saved tensors bring the partition.
        sc.convert(model, override(recipe(), {"experts.partition": "contiguous"}), certify=False)
    model.load_state_dict(state)
    if how:
        restore(model, how)
    return model.eval()


@torch.no_grad()
def by_generate(model: nn.Module, prompt_1S: Tensor, count: int) -> Tensor:
    """`generation.answer`'s call, kept from stopping early."""
    out = model.generate(
        prompt_1S, attention_mask=torch.ones_like(prompt_1S), do_sample=False,
        max_new_tokens=count, min_new_tokens=count, pad_token_id=2,
    )  # fmt: skip
    return out[0, prompt_1S.shape[1] :]


class Placed:
    """Keys and values in place, where `place_S` says: no number of them is kept on the host, so
    that a replayed graph writes to the next place."""

    is_compileable = False

    def __init__(self, config, length: int, like: Tensor):
        shape = (1, config.num_key_value_heads, length, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.pairs = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in layers]
        self.place_S: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs):
        for held, new in zip(self.pairs[layer], (keys, values), strict=True):
            held.index_copy_(2, self.place_S, new)
        return self.pairs[layer]

    def get_seq_length(self, *args) -> int:
        return 0


class Graph:
    """Greedy decoding over a static cache; a step is one CUDA graph where there is a GPU."""

    def __init__(self, model: nn.Module, length: int):
        self.model, self.length = model, length
        device = model.device
        self.cache = Placed(model.config, length, model.lm_head.weight)
        self.token_11 = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.place_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.places_S = torch.arange(length, device=device)
        self.graph = None

    def _forward(self, ids_1S: Tensor, place_S: Tensor) -> Tensor:
        mask = (self.places_S[None, :] <= place_S[:, None])[None, None]
        self.cache.place_S = place_S
        out = self.model(
            input_ids=ids_1S,
            position_ids=place_S[None],
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def _step(self) -> None:
        # In place: a replayed graph reads and writes the same memory.
        self.token_11.copy_(self._forward(self.token_11, self.place_1))
        self.place_1.add_(1)

    def capture(self) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()

    @torch.no_grad()
    def __call__(self, prompt_1S: Tensor, count: int) -> Tensor:
        if self.graph is None and prompt_1S.is_cuda:
            self._start(prompt_1S)
            self.capture()
        found = [self._start(prompt_1S)]
        for _ in range(count - 1):
            if self.graph is None:
                self._step()
            else:
                self.graph.replay()
            found.append(self.token_11.clone())
        return torch.cat(found)[:, 0]

    def _start(self, prompt_1S: Tensor) -> Tensor:
        width = prompt_1S.shape[1]
        self.token_11.copy_(self._forward(prompt_1S, self.places_S[:width]))
        self.place_1.fill_(width)
        return self.token_11.clone()


def clock(run: Callable, prompts: list[Tensor], count: int) -> tuple[list[float], Tensor]:
    """Seconds of every repeat over all prompts, and the tokens of the first one."""
    first = run(prompts[0], count)
    times = []
    for _ in range(REPEATS):
        sync(prompts[0].device.type)
        start = time.perf_counter()
        for prompt in prompts:
            run(prompt, count)
        sync(prompts[0].device.type)
        times.append(time.perf_counter() - start)
    return times, first


@torch.no_grad()
def share_while_generating(model: nn.Module, prompts: list[Tensor], count: int) -> float:
    """Mean share of the experts that ran for new tokens. Not timed: the record takes time."""
    meter = Meter(model)
    hooks = []
    with sc.trace(model) as routings:

        def note(module, inputs, output) -> None:
            if len(next(iter(routings.values())).indices_TK) == 1:
                meter.add(routings)

        hooks.append(model.model.register_forward_hook(note))
        for prompt in prompts:
            by_generate(model, prompt, count)
    hooks[0].remove()
    shares = meter.shares()
    return round(sum(shares.values()) / len(shares), 4)


def settings(model: nn.Module) -> list[float | None]:
    """The budgets that a model can take, its own rule among them."""
    layers = split_layers(model)
    if not layers:
        return [1.0]
    found: list[float | None] = []
    by_count = next(iter(layers.values())).router.spec.k is not None
    for share in (*([] if by_count else [None]), *BUDGETS):
        try:
            set_budget(model, share)
            found.append(share)
        except SparsecraftError as error:
            print(f"budget {share}: {error}", flush=True)
    return found


def measure(worker) -> None:
    """Rows of kind `speed`: every kept model and the dense ones, on the GPU and on the CPU."""
    folder = worker.args.cache
    names = sorted(p.name[5:-3] for p in folder.glob("keep-*.pt"))
    quality: dict[tuple, dict] = {}
    models = {"dense": worker.dense} | {n: kept(folder, n, worker.dense) for n in names}
    for name, model in models.items():
        for share in settings(model):
            if ":" in name:
                set_budget(model, share)
            quality[name, share] = evaluate(model, worker.texts, routed=":" in name)
    kinds = {"cuda": torch.bfloat16, "cpu": torch.float32}
    for device in worker.args.devices or (["cuda", "cpu"] if worker.device == "cuda" else ["cpu"]):
        dtype = kinds[device]
        if device == "cpu":
            torch.set_num_threads(worker.args.threads)
        prompts = [torch.from_numpy(p)[None].to(device) for p in worker.texts.prompts]
        prompts = prompts if device == "cuda" else prompts[:2]
        ways = ("generate", "graph") if device == "cuda" else ("generate",)
        # The dense model first and last: what differs between the two is noise.
        for name in [*models, "dense"]:
            model = copy.deepcopy(models[name]).to(device=device, dtype=dtype).eval()
            for share in settings(model):
                if worker.spent > worker.args.seconds:
                    return
                row = {"kind": "speed", "model": name, "budget": share, "device": device,
                       "dtype": str(dtype).removeprefix("torch."), **worker.about,
                       "threads": torch.get_num_threads()}  # fmt: skip
                row |= {"quality": quality[name, share]}
                _one(worker, row, model, prompts, NEW[device], ways)


def _one(worker, row: dict, model: nn.Module, prompts: list, count: int, ways) -> None:
    split = ":" in row["model"]
    if split:
        set_budget(model, row["budget"])
        if row["budget"] != 1:
            row["share"] = share_while_generating(model, prompts[:2], count)
    for way in ways:
        try:
            run = (
                (lambda p, n: by_generate(model, p, n))
                if way == "generate"
                else Graph(model, prompts[0].shape[1] + count + 8)
            )
            own = prompts if way == "graph" or row["device"] == "cpu" else prompts[:1]
            times, first = clock(run, own, count)
        except Exception:
            traceback.print_exc(limit=-6)
            row[f"{way}_failed"] = traceback.format_exc(limit=-3)
            continue
        rates = sorted(count * len(own) / seconds for seconds in times)
        row[way] = {"tokens_per_s": round(statistics.median(rates), 2),
                    "slowest": round(rates[0], 2), "fastest": round(rates[-1], 2),
                    "first": first[:16].tolist()}  # fmt: skip
    worker.rows.put(row)
    shown = {way: row.get(way, {}).get("tokens_per_s") for way in ways}
    worker.say(row["model"], row["device"], f"budget {row['budget']}", shown,
               f"share {row.get('share')}", f"loss {row['quality']['loss']}")  # fmt: skip
