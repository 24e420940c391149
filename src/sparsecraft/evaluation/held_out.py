"""evaluate(): loss on held-out data, multiple choice, lm-eval."""

from __future__ import annotations

import logging
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.checkpoint.load import load
from sparsecraft.data.batches import as_batches, collate
from sparsecraft.data.limits import pad_id
from sparsecraft.data.prepare import CONTROL, TASK_OF_MODEL, UNUSED, prepare
from sparsecraft.data.sentences import Prompts
from sparsecraft.dense.live import LiveTensors, taken_for
from sparsecraft.dense.loading import load_tokenizer, objective_of, without_objective
from sparsecraft.dense.memory import enough_memory, free_memory, gigabytes
from sparsecraft.dense.tokens import positions_of
from sparsecraft.errors import DataError, SparsecraftError
from sparsecraft.evaluation.choice import score_choice
from sparsecraft.evaluation.lm_eval import check_tasks, run_lm_eval
from sparsecraft.evaluation.logprobs import BATCH_TOKENS, label_logprobs
from sparsecraft.evaluation.routing import first_choices_E, load_entropy, mutual_information
from sparsecraft.moe.context import layer_masks
from sparsecraft.moe.outputs import evaluation_mode
from sparsecraft.moe.routing import Routing
from sparsecraft.moe.tracing import trace
from sparsecraft.surgery.record import tokenizer_of

log = logging.getLogger("sparsecraft")

DEFAULT_MAX_LENGTH = 1024
NAMED = (UNUSED, CONTROL)  # counts of `prepare` that a file's results repeat


@enough_memory(
    "Evaluation",
    "lower --max-length (max_length=...), beyond which rows are dropped, load the model in "
    "bfloat16, or evaluate where there is more",
)
def evaluate(
    model: nn.Module | str | Path,
    data: Any = None,
    *,
    choices: str | Path | Sequence[str | Path] = (),
    tasks: Sequence[str] = (),
    tokenizer: Any = None,
    max_length: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Measure a model.

    Args:
        model: any transformers model, converted or dense, or a checkpoint folder.
        data: files to take the held-out loss on, each by itself; or an iterable of dicts of model
            inputs or, for causal models, of (B, S) token ids.
        choices: files of rows `prompt`, `choices`, `answer`, `template`, for rank classification.
        tasks: names of lm-eval tasks (needs `sparsecraft[eval]`).
        max_length: longer rows are dropped, and counted under `dropped`; None is 1024, or the
            model's number of positions if that is less.
        limit: rows of each file at most; None is all.

    Returns:
        `loss`: file -> loss in nats per label token, tokens, rows, dropped (a classifier: accuracy;
        `unused_fields` of rows); `choice`: file -> accuracies, median over templates; `tasks`:
        lm-eval's results; `routing`: load entropy over all slots and, for several files, the mutual
        information of a token's first expert and its file, mean over layers.

    Raises:
        DataError: rows that are malformed or that the model has no class or position for.
        SparsecraftError: a model whose task has no such measure, or a limit below 1.
    """
    check_limit(limit)
    if isinstance(model, (str, Path)):
        check_tasks(tasks)
        tokenizer = tokenizer or load_tokenizer(model)
        model = load(model)
    tokenizer = tokenizer or tokenizer_of(model)
    results: dict[str, Any] = {}
    if data is not None or choices:
        task, max_length = task_of(model), length_of(model, max_length)
    with evaluation_mode(model), torch.no_grad():
        if data is not None:
            sources = sources_of(data, tokenizer, max_length, limit, task, model)
            results["loss"], results["routing"] = _losses(model, sources)
        if choices:
            results["choice"] = {
                str(path): score_choice(model, tokenizer, path, max_length, limit, task)
                for path in _listed(choices)
            }
        if tasks:
            results["tasks"] = run_lm_eval(model, tokenizer, tasks, limit)
    return results


def check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise SparsecraftError(f"limit is {limit}; it must be at least 1, or None for all rows.")


def _listed(paths: Any) -> list:
    return [paths] if isinstance(paths, (str, Path)) else list(paths)


def task_of(model: nn.Module) -> str:
    """What `data.prepare` calls the model's task."""
    task = objective_of(model)
    if task is None:
        raise SparsecraftError(
            f"{without_objective(model, 'sc.evaluate')} Of others, take the loss that the model "
            "itself gives."
        )
    return TASK_OF_MODEL[task]


def length_of(model: nn.Module, asked: int | None) -> int:
    positions = positions_of(model)
    if asked is None:
        return min(DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)
    if asked < 2:
        raise DataError(f"max_length is {asked}; it must be at least 2.")
    if positions and asked > positions:
        raise DataError(
            f"max_length is {asked} and {type(model).__name__} has {positions} positions; "
            f"ask for at most {positions}."
        )
    return asked


def sources_of(
    data: Any,
    tokenizer: Any,
    max_length: int,
    limit: int | None,
    task: str,
    model: nn.Module,
) -> dict[str, tuple[Iterable[dict[str, Tensor]], dict[str, int]]]:
    """Name -> batches with labels and token_mask, and counts of rows."""
    check_limit(limit)
    listed = _listed(data) if isinstance(data, (str, Path, list, tuple)) else []
    if not listed or not all(isinstance(item, (str, Path)) for item in listed):
        return {"data": ((_labelled(b, task) for b in as_batches(data, model=model)), {})}
    if tokenizer is None:
        raise DataError("The model came without a tokenizer; pass tokenizer=...")
    sources, prompts = {}, Prompts.of(model)
    options = {"max_length": max_length, "task": task, "prompts": prompts, "model": model}
    for path in listed:
        rows, counts = prepare(path, tokenizer, split="test", **options)
        rows = rows.select(range(min(limit or len(rows), len(rows))))
        sources[str(path)] = (
            list(batches_by_length(list(rows), tokenizer, prompts, model)),
            counts,
        )
    return sources


def listed_batches(
    model: nn.Module, data: Any, tokenizer: Any, max_length: int | None, limit: int | None
) -> dict[str, list[dict[str, Tensor]]]:
    """Name -> the batches of `sources_of`.

    Raises:
        DataError: a file has none.
    """
    length = length_of(model, max_length)
    found = sources_of(data, tokenizer, length, limit, task_of(model), model)
    listed = {name: list(batches) for name, (batches, _) in found.items()}
    for name, batches in listed.items():
        if not batches:
            raise DataError(f"{name} has no row that is short enough; raise max_length.")
    return listed


def some_batches(listed: dict[str, list], number: int) -> dict[str, list]:
    """About this number of each source, evenly spaced."""
    return {name: all_[:: max(1, len(all_) // number)] for name, all_ in listed.items()}


def _labelled(batch: dict[str, Tensor], task: str) -> dict[str, Tensor]:
    """A batch of model inputs with labels: its own, or a causal model's token ids."""
    labels = batch.get("labels")
    if labels is None:
        if task != "causal":
            raise DataError("A batch has no labels; only causal models predict their own inputs.")
        labels = batch["input_ids"].clone()
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels}


def batches_by_length(
    rows: list[dict], tokenizer: Any, prompts: Prompts | None, model: nn.Module
) -> Iterator[dict[str, Tensor]]:
    """Rows by length, so that padding is short, in batches of at most BATCH_TOKENS."""
    batch: list[dict] = []
    collated = partial(collate, pad_id=pad_id(tokenizer, model), prompts=prompts)
    for row in sorted(rows, key=lambda row: len(row["input_ids"])):
        if batch and (len(batch) + 1) * len(row["input_ids"]) > BATCH_TOKENS:
            yield collated(batch)
            batch = []
        batch.append(row)
    if batch:
        yield collated(batch)


def _losses(model: nn.Module, sources: dict) -> tuple[dict[str, Any], dict[str, float]]:
    losses, loads = {}, defaultdict(list)
    listed = [batches for batches, _ in sources.values() if isinstance(batches, list)]
    _say_memory(model, [batch for batches in listed for batch in batches])
    for name, (batches, counts) in sources.items():
        total, tokens, correct, rows = 0.0, 0, 0, 0
        slots: dict[str, Tensor] = {}
        for batch in batches:
            mask = batch.pop("token_mask", None)
            check_classes(name, batch["labels"], model)
            with trace(model) as traced:
                logprobs_N, right_N = label_logprobs(model, batch)
            total -= logprobs_N.sum().item()
            tokens += logprobs_N.numel()
            correct += right_N.sum().item()
            rows += len(batch["labels"])
            masks = layer_masks(model, batch, mask, traced)
            for layer, routing in traced.items():
                slots[layer] = slots.get(layer, 0) + _load_2E(routing, masks(layer))
        if not tokens:
            raise DataError(f"{name} has no label to predict.")
        losses[name] = {"loss": total / tokens, "tokens": tokens, "rows": rows}
        if counts:
            losses[name]["dropped"] = counts["too_long"] + counts["no_trainable_token"]
        losses[name] |= {key: counts[key] for key in NAMED if key in counts}
        if batch["labels"].ndim == 1:
            losses[name]["accuracy"] = correct / tokens
        for layer, load_2E in slots.items():
            loads[layer].append(load_2E)
    return losses, _routing_summary(loads)


def _say_memory(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    """Log what the largest batch takes beside the model, by a pass of its first row."""
    if not batches:
        return
    largest = max(batches, key=lambda batch: batch["input_ids"].numel() + batch["labels"].numel())
    rows, length = largest["input_ids"].shape
    row = {key: value[:1] for key, value in largest.items() if key != "token_mask"}
    with LiveTensors() as live:
        label_logprobs(model, row)
    memory, free = round(rows * live.most * taken_for(model.device)), free_memory(model.device)
    log.info(
        f"Evaluation by batches of up to {rows} x {length} tokens needs about {gigabytes(memory)} "
        f"of memory ({gigabytes(free)} free)."
    )


def check_classes(name: str, labels: Tensor, model: nn.Module) -> None:
    """Raise DataError for what is no class of the classifier."""
    if objective_of(model) != "classification":
        return
    if labels.ndim != 1 or labels.is_floating_point():
        kind = str(labels.dtype).removeprefix("torch.")
        raise DataError(
            f"{name} has labels {list(labels.shape)} of type {kind}; {type(model).__name__} gives "
            "each row one of several classes, so that they must be one whole number for each row."
        )
    classes = model.config.num_labels
    for label in (labels.min().item(), labels.max().item()):
        if not 0 <= label < classes:
            raise DataError(
                f"{name} has the label {label} and the model has num_labels={classes}; labels must "
                f"lie between 0 and {classes - 1}."
            )


def _load_2E(routing: Routing, mask_T: Tensor | None) -> Tensor:
    """For each expert: its share of all slots (or weights), times the rows that were routed; and
    those that chose it first."""
    counted_T = routing.counted(mask_T)
    rows = len(routing.logits_TE) if counted_T is None else counted_T.sum().item()
    amounts_E = routing.load_E(mask_T).double().cpu() * rows
    return torch.stack([amounts_E, first_choices_E(routing, mask_T)])


def _routing_summary(loads: dict[str, list[Tensor]]) -> dict[str, float]:
    """Of each layer's `_load_2E`, one for each of D files."""
    if not loads:
        return {}
    loads_D2E = [torch.stack(load) for load in loads.values()]
    entropies = [load_entropy(load_D2E[:, 0].sum(0)) for load_D2E in loads_D2E]
    summary = {"load_entropy": statistics.mean(entropies), "load_entropy_min": min(entropies)}
    if len(loads_D2E[0]) > 1:
        information = [mutual_information(load_D2E[:, 1]) for load_D2E in loads_D2E]
        summary["mutual_information_bits"] = statistics.mean(information)
    return summary
