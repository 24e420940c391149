"""What of its split networks a model runs on data: one pass that counts, padding left out.

Shapes: T tokens, D width, E experts, N tokens of a group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.data.batches import as_batches, collate
from sparsecraft.data.limits import pad_id
from sparsecraft.data.prepare import TASK_OF_MODEL, prepare
from sparsecraft.dense.loading import objective_of
from sparsecraft.dense.tokens import positions_of
from sparsecraft.errors import DataError
from sparsecraft.evaluation.held_out import DEFAULT_MAX_LENGTH, evaluate
from sparsecraft.evaluation.logprobs import BATCH_TOKENS
from sparsecraft.moe import cost
from sparsecraft.moe.context import layer_masks
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.outputs import evaluation_mode
from sparsecraft.moe.routing import Routing
from sparsecraft.moe.traces import Trace
from sparsecraft.moe.tracing import trace
from sparsecraft.surgery.budget import split_layers

Batch = dict[str, Any]
# Layer, and what it reads: its real tokens (T, D).
Visit = Callable[[MoELayer, Tensor], None]


@dataclass(slots=True)
class Observed:
    """One pass over data.

    Attributes:
        loads: layer -> for each expert the share of the real tokens that ran it, (E,).
        unions: N -> mean share of a layer's experts that any of N tokens ran.
        loss: in nats per label; None where the model or the data has none.
        accuracy: of a classifier.
    """

    loads: dict[str, Tensor] = field(default_factory=dict)
    unions: dict[int, float] = field(default_factory=dict)
    loss: float | None = None
    accuracy: float | None = None

    @property
    def shares(self) -> dict[str, float]:
        """Layer -> mean share of its experts that a token ran."""
        return {name: load_E.mean().item() for name, load_E in self.loads.items()}

    @property
    def share(self) -> float:
        """Mean over layers."""
        return sum(self.shares.values()) / len(self.loads)

    @property
    def load_cv(self) -> float:
        """Standard deviation of the experts' loads over their mean; mean over layers."""
        found = [
            (load_E.std(correction=0) / load_E.mean().clamp_min(1e-12)).item()
            for load_E in self.loads.values()
        ]
        return sum(found) / len(found)


def observe(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    groups: Sequence[int] = (),
    visit: Visit | None = None,
) -> Observed:
    """Run a model on batches as its budget says and count which experts run.

    Args:
        batches: dicts of model inputs, as `Source.batches` gives them.
        groups: for each number N, count also what N random tokens of a batch run together.
        visit: called for every layer and batch with the real tokens that the layer reads.
    """
    layers, current = split_layers(model), []
    counts: dict[str, Tensor] = {}
    tokens: dict[str, int] = defaultdict(int)
    unions: dict[int, list[Tensor]] = {size: [] for size in groups}
    generator = torch.Generator().manual_seed(0)

    def real(name: str, rows: Tensor) -> Tensor:
        """Of rows (..., N) of a layer's tokens the real ones', (T, N)."""
        mask_T = current[0](name, rows.shape[:-1])
        rows = rows.reshape(-1, rows.shape[-1])
        return rows if mask_T is None else rows[mask_T.to(rows.device)]

    def count(name: str, routing: Routing) -> None:
        chosen_TE = (routing.indices_TK < routing.num_experts).reshape(*routing.shape, -1)
        chosen_TE = real(name, chosen_TE)
        counts[name] = counts.get(name, 0) + chosen_TE.sum(0)
        tokens[name] += len(chosen_TE)
        order_T = torch.randperm(len(chosen_TE), generator=generator).to(chosen_TE.device)
        for size, found in unions.items():
            whole = len(order_T) // size * size
            if whole:
                grouped_GNE = chosen_TE[order_T[:whole]].unflatten(0, (-1, size))
                found.append(grouped_GNE.any(1).float().mean(-1))

    def seen() -> Iterator[Batch]:
        for batch in batches:
            current[:] = [layer_masks(model, batch, None)]
            yield dict(batch)

    with ExitStack() as stack:
        traced = stack.enter_context(trace(model))
        stack.enter_context(_hooked(layers, traced, count, visit, real))
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.no_grad())
        loss, accuracy = _run(model, seen(), batches)
    loads = {name: counts[name].double().cpu() / tokens[name] for name in layers}
    together = {size: torch.cat(found).mean().item() for size, found in unions.items() if found}
    return Observed(loads, together, loss, accuracy)


@contextmanager
def _hooked(
    layers: dict[str, MoELayer],
    traced: Trace,
    count: Callable[[str, Routing], None],
    visit: Visit | None,
    real: Callable[[str, Tensor], Tensor],
) -> Iterator[None]:
    """Listen to the layers in the passes that `traced` sees, and not in those of other threads."""

    def before(name: str, layer: MoELayer, args: tuple) -> None:
        if traced.record.is_open():
            visit(layer, real(name, args[0]))

    def after(name: str, layer: MoELayer, args: tuple, y: Tensor) -> None:
        if traced.record.is_open():
            count(name, traced[name])

    handles = []
    for name, layer in layers.items():
        # Of the layer: one that is not traced need not call its router as a module.
        handles.append(layer.register_forward_hook(partial(after, name)))
        if visit is not None:
            handles.append(layer.register_forward_pre_hook(partial(before, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(
    model: nn.Module, seen: Iterable[Batch], batches: Sequence[Batch]
) -> tuple[float | None, float | None]:
    """Loss and accuracy where there are such, by `evaluate`; else the forward passes alone."""
    task = objective_of(model)
    if task == "causal" or (task and all("labels" in batch for batch in batches)):
        found = evaluate(model, seen)["loss"]["data"]
        return found["loss"], found.get("accuracy")
    for batch in seen:
        model(**{k: v.to(model.device) for k, v in batch.items() if k not in NOT_READ})
    return None, None


NOT_READ = ("labels", "token_mask")


class Source:
    """Rows of files, or batches that were given, to take parts of.

    Args:
        given: files, folders or hub datasets; or an iterable of dicts of model inputs, or of
            (B, S) token ids.
        split: of a hub dataset.

    Raises:
        DataError: files without a tokenizer, or for a model that no kind of rows is known for.
    """

    def __init__(
        self, model: nn.Module, given: Any, tokenizer: Any, max_length: int | None, split: str
    ):
        listed = [given] if isinstance(given, (str, Path)) else given
        files = isinstance(listed, (list, tuple)) and listed
        self.pad_id = None
        if not (files and all(isinstance(item, (str, Path)) for item in listed)):
            self.items = list(as_batches(given, model=model))
            if objective_of(model) == "seq2seq" and any("labels" not in b for b in self.items):
                raise DataError(
                    "A batch has no labels, which mark the real tokens of a decoder beside an "
                    "encoder; give every batch its labels."
                )
            return
        task = TASK_OF_MODEL.get(objective_of(model))
        if task is None:
            raise DataError(
                f"Rows of files have no form that {type(model).__name__} learns from; pass an "
                "iterable of dicts of model inputs."
            )
        if tokenizer is None:
            raise DataError("The model came without a tokenizer; pass tokenizer=...")
        positions = positions_of(model) or DEFAULT_MAX_LENGTH
        length = max_length or min(DEFAULT_MAX_LENGTH, positions)
        if length > positions and positions_of(model):
            raise DataError(f"max_length is {length} and the model has {positions} positions.")
        # Shuffled with a fixed seed: any part of the rows is a sample of all files.
        options = {"max_length": length, "task": task, "split": split, "model": model}
        self.items, _ = prepare(listed, tokenizer, **options)
        self.pad_id = pad_id(tokenizer, model)

    def __len__(self) -> int:
        return len(self.items)

    def batches(
        self, max_tokens: int | None = None, start: int = 0, end: int | None = None
    ) -> list[Batch]:
        """Batches of the rows from `start` to `end`, until `max_tokens` real tokens are there."""
        taken, tokens = [], 0
        for number in range(start, len(self) if end is None else end):
            if max_tokens is not None and tokens >= max_tokens:
                break
            taken.append(self.items[number])
            tokens += token_count(taken[-1])
        if self.pad_id is None:
            return taken
        # By length, so that padding is short; the logits are the largest tensor.
        taken.sort(key=lambda row: len(row["input_ids"]))
        longest = len(taken[-1]["input_ids"]) if taken else 1
        size = max(1, BATCH_TOKENS // longest)
        found = [collate(taken[at : at + size], self.pad_id) for at in range(0, len(taken), size)]
        for batch in found:
            del batch["token_mask"]  # the attention mask says the same
        return found


def token_count(item: Batch) -> int:
    """Real tokens of a row or a batch; inputs of a batch without tokens."""
    if isinstance(item.get("input_ids"), list):
        return len(item["input_ids"])
    mask = item.get("attention_mask")
    if mask is not None:
        return int(mask.sum())
    return item["input_ids"].numel() if "input_ids" in item else len(next(iter(item.values())))


def ffn_flops(model: nn.Module, shares: dict[str, float]) -> float:
    """FLOPs of the split networks for one token, routers included, over those of the dense ones.

    Args:
        shares: layer -> share of its experts that run.
    """
    layers = split_layers(model)
    dense = sum(cost.split_flops(layer, 1) for layer in layers.values())
    return sum(_flops(layer, shares[name]) for name, layer in layers.items()) / dense


def model_flops(model: nn.Module, ffn: float) -> float:
    """FLOPs of the whole model for one token over those of the dense one, as `cost.count` counts.

    Args:
        ffn: what `ffn_flops` found.
    """
    layers = split_layers(model).values()
    asked = [layer.router for layer in layers if layer.router.runs != "every"]
    # As `cost.count` has them: a similarity router's centers are no parameters.
    routers = sum(p.numel() for r in asked for p in (*r.parameters(), *r.buffers()))
    idle = sum(round((1 - cost.active_share(la)) * la.experts.products) for la in layers)
    dense = cost.count(model).flops_per_token + 2 * (idle - routers)
    return 1 - (1 - ffn) * sum(cost.split_flops(layer, 1) for layer in layers) / dense


def _flops(layer: MoELayer, share: float) -> float:
    # Not `split_flops` at 1: that is the dense network, which asks no router.
    return 2 * layer.router.products + share * cost.split_flops(layer, 1)
