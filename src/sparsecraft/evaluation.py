"""Held-out loss, rank classification, and lm-eval tasks, for dense and converted models alike.

Auxiliary losses never enter: they belong to training.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft import checkpoint, hub
from sparsecraft import data as data_module
from sparsecraft.analysis.routing import first_choices_E, load_entropy, mutual_information
from sparsecraft.certificate import evaluation_mode
from sparsecraft.errors import DataError, SparsecraftError
from sparsecraft.origin import Origin
from sparsecraft.routing import Routing, trace
from sparsecraft.sentences import Prompts

# Tokens in one forward pass: the logits of a large vocabulary in float32 are the largest tensor.
BATCH_TOKENS = 4096
DEFAULT_MAX_LENGTH = 1024


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
        `loss`: file -> loss in nats per label token, tokens, rows, dropped (and accuracy for
        classifiers); `choice`: file -> accuracies, median over templates; `tasks`: lm-eval's
        results; `routing`: load entropy over all slots and, for several files, the mutual
        information of a token's first expert and its file, mean over layers.

    Raises:
        DataError: rows that are malformed or that the model has no class or position for.
        SparsecraftError: a model whose task has no such measure, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise SparsecraftError(f"limit is {limit}; it must be at least 1, or None for all rows.")
    if isinstance(model, (str, Path)):
        tokenizer = tokenizer or hub.load_tokenizer(model)
        model = checkpoint.load(model)
    if tokenizer is None and (origin := Origin.of(model)):
        tokenizer = hub.load_tokenizer(origin.folder)
    results: dict[str, Any] = {}
    if data is not None or choices:
        task, max_length = _task(model), _max_length(model, max_length)
    with evaluation_mode(model), torch.no_grad():
        if data is not None:
            sources = _sources(data, tokenizer, max_length, limit, task, Prompts.of(model))
            results["loss"], results["routing"] = _losses(model, sources)
        if choices:
            results["choice"] = {
                str(path): _choice(model, tokenizer, path, max_length, limit, task)
                for path in _listed(choices)
            }
        if tasks:
            results["tasks"] = _lm_eval(model, tokenizer, tasks, limit)
    return results


def _listed(paths: Any) -> list:
    return [paths] if isinstance(paths, (str, Path)) else list(paths)


def _task(model: nn.Module) -> str:
    """What `data.prepare` calls the model's task."""
    task = hub.task_of(model)
    if task not in data_module.TASK_OF_MODEL:
        raise SparsecraftError(
            f"{type(model).__name__} is an {task} model, for which there is no held-out loss here; "
            "use a ...ForCausalLM, ...ForConditionalGeneration or ...ForSequenceClassification."
        )
    return data_module.TASK_OF_MODEL[task]


def positions_of(model: nn.Module) -> int | None:
    """The longest sequence the model was made for; None where nothing bounds it."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not positions or positions < 1:
        return None
    for name, module in model.named_modules():
        # RoBERTa's family counts positions from the padding's own onwards.
        offset = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and offset is not None:
            positions = min(positions, module.num_embeddings - offset - 1)
    return positions


def _max_length(model: nn.Module, asked: int | None) -> int:
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


def _sources(
    data: Any,
    tokenizer: Any,
    max_length: int,
    limit: int | None,
    task: str,
    prompts: Prompts | None,
) -> dict[str, tuple[Iterable[dict[str, Tensor]], dict[str, int]]]:
    """Name -> batches with labels and token_mask, and counts of rows."""
    listed = _listed(data) if isinstance(data, (str, Path, list, tuple)) else []
    if not listed or not all(isinstance(item, (str, Path)) for item in listed):
        return {"data": ((_labelled(b, task) for b in data_module.as_batches(data)), {})}
    if tokenizer is None:
        raise DataError("The model came without a tokenizer; pass tokenizer=...")
    sources = {}
    for path in listed:
        rows, counts = data_module.prepare(
            path, tokenizer, max_length=max_length, task=task, split="test", prompts=prompts
        )
        rows = rows.select(range(min(limit or len(rows), len(rows))))
        sources[str(path)] = (list(_batches(list(rows), tokenizer, prompts)), counts)
    return sources


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


def _batches(
    rows: list[dict], tokenizer: Any, prompts: Prompts | None
) -> Iterator[dict[str, Tensor]]:
    """Rows by length, so that padding is short, in batches of at most BATCH_TOKENS."""
    batch: list[dict] = []
    collate = partial(data_module.collate, pad_id=data_module.pad_id(tokenizer), prompts=prompts)
    for row in sorted(rows, key=lambda row: len(row["input_ids"])):
        if batch and (len(batch) + 1) * len(row["input_ids"]) > BATCH_TOKENS:
            yield collate(batch)
            batch = []
        batch.append(row)
    if batch:
        yield collate(batch)


def _losses(model: nn.Module, sources: dict) -> tuple[dict[str, Any], dict[str, float]]:
    losses, loads = {}, defaultdict(list)
    for name, (batches, counts) in sources.items():
        total, tokens, correct, rows = 0.0, 0, 0, 0
        load: dict[str, Tensor] = {}
        for batch in batches:
            mask = batch.pop("token_mask", None)
            _check_classes(name, batch["labels"], model)
            with trace(model) as traced:
                logprobs_N, right_N = label_logprobs(model, batch)
            total -= logprobs_N.sum().item()
            tokens += logprobs_N.numel()
            correct += right_N.sum().item()
            rows += len(batch["labels"])
            for layer, routing in traced.items():
                load[layer] = load.get(layer, 0) + _load_2E(routing, mask)
        if not tokens:
            raise DataError(f"{name} has no label to predict.")
        losses[name] = {"loss": total / tokens, "tokens": tokens, "rows": rows}
        if counts:
            losses[name]["dropped"] = counts["too_long"] + counts["no_trainable_token"]
        if batch["labels"].ndim == 1:
            losses[name]["accuracy"] = correct / tokens
        for layer, load_2E in load.items():
            loads[layer].append(load_2E)
    return losses, _routing_summary(loads)


def _check_classes(name: str, labels: Tensor, model: nn.Module) -> None:
    """Raise DataError for a class that the classifier does not have."""
    if labels.ndim > 1:
        return
    classes = model.config.num_labels
    for label in (labels.min().item(), labels.max().item()):
        if not 0 <= label < classes:
            raise DataError(
                f"{name} has the label {label} and the model has num_labels={classes}; labels must "
                f"lie between 0 and {classes - 1}."
            )


def _load_2E(routing: Routing, mask: Tensor | None) -> Tensor:
    """For each expert: its share of all slots, times tokens; and the tokens that chose it first."""
    routed = len(routing.logits_TE)
    if mask is None or mask.numel() != routed:
        mask_T, tokens = None, routed
    else:
        mask_T = mask.reshape(-1).to(routing.logits_TE.device)
        tokens = mask_T.sum().item()
    slots_E = routing.load_E(mask_T).double().cpu() * tokens
    return torch.stack([slots_E, first_choices_E(routing, mask_T)])


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


def label_logprobs(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probability of every label, and whether it is the model's first choice.

    Labels of -100 are skipped; causal models predict label i + 1 from position i.
    """
    batch = {key: value.to(model.device) for key, value in batch.items()}
    labels = batch.pop("labels")
    decoder = getattr(model.config, "is_encoder_decoder", False)
    if decoder:
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    # A cache would hide the document borders of packed batches from the attention mask.
    options = {"use_cache": False} if labels.ndim == 2 else {}
    logits = model(**batch, **options).logits
    if labels.ndim == 2 and not decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    kept = labels != -100
    logits_NV, labels_N = logits[kept].float(), labels[kept]
    logprobs_N = -F.cross_entropy(logits_NV, labels_N, reduction="none")
    if not logprobs_N.isfinite().all():
        raise SparsecraftError(
            f"{type(model).__name__} gives probabilities that are not finite numbers; check its "
            "weights, or load it in float32."
        )
    return logprobs_N, logits_NV.argmax(-1) == labels_N


def _choice(
    model: nn.Module,
    tokenizer: Any,
    path: str | Path,
    max_length: int,
    limit: int | None,
    task: str,
) -> dict[str, float]:
    """Rank classification: the choice with the largest log-likelihood after the prompt wins."""
    if task == "label":
        raise SparsecraftError(
            f"{type(model).__name__} is a classifier and gives choices no likelihood; pass rows of "
            "text and label as data instead."
        )
    if tokenizer is None:
        raise DataError("Rank classification needs a tokenizer; pass tokenizer=...")
    rows = data_module.load_choices(path)[:limit]
    encode = data_module.encode_pair if task == "seq2seq" else data_module.encode
    examples, dropped, prompts = [], set(), Prompts.of(model)
    for number, row in enumerate(rows):
        for choice_number, choice in enumerate(row["choices"]):
            messages = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": choice},
            ]
            example = encode({"messages": messages}, tokenizer, max_length)
            if example is None:
                dropped.add(number)
                continue
            if prompts is not None:
                example = prompts.mark(example, {"messages": messages})
            examples.append({**example, "row": number, "choice": choice_number})
    scores: dict[int, dict[int, tuple[float, int]]] = defaultdict(dict)
    examples = [e for e in examples if e["row"] not in dropped]
    examples.sort(key=lambda e: len(e["input_ids"]))
    step = max(1, BATCH_TOKENS // max((len(e["input_ids"]) for e in examples), default=1))
    for start in range(0, len(examples), step):
        part = examples[start : start + step]
        batch = data_module.collate(part, data_module.pad_id(tokenizer), prompts=prompts)
        del batch["token_mask"]
        logprobs_N, _ = label_logprobs(model, batch)
        first = 0 if task == "seq2seq" else 1
        lengths = (batch["labels"][:, first:] != -100).sum(-1).tolist()
        for example, own in zip(part, logprobs_N.cpu().split(lengths), strict=True):
            scores[example["row"]][example["choice"]] = (own.sum().item(), len(own))
    return _accuracies(rows, scores, len(dropped))


def _accuracies(rows: list[dict], scores: dict, dropped: int) -> dict[str, float]:
    """Accuracy by summed and by per-token log-likelihood: per template, then their median."""
    by_sum, by_mean, by_label = defaultdict(list), defaultdict(list), defaultdict(list)
    for number, own in scores.items():
        row = rows[number]
        answer, template = row["answer"], str(row.get("template", ""))
        best = max(own, key=lambda c: own[c][0])
        by_sum[template].append(best == answer)
        by_mean[template].append(max(own, key=lambda c: own[c][0] / own[c][1]) == answer)
        by_label[row["choices"][answer]].append(best == answer)
    if not scores:
        raise DataError("No row of the choice file fits into max_length.")
    result = {
        "accuracy": statistics.median(map(statistics.mean, by_sum.values())),
        "accuracy_per_token": statistics.median(map(statistics.mean, by_mean.values())),
        "templates": len(by_sum),
        "rows": len(scores),
        "dropped": dropped,
    }
    if len(by_label) < len(scores) / 4:  # the same labels over and over: classes
        result["balanced_accuracy"] = statistics.mean(map(statistics.mean, by_label.values()))
    return result


def _lm_eval(model: nn.Module, tokenizer: Any, tasks: Sequence[str], limit: int | None) -> dict:
    if Prompts.of(model) is not None:
        raise SparsecraftError(
            "lm-eval's tasks give no sentence to the model's routers, which decide by one; pass "
            "choice files instead."
        )
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise SparsecraftError(
            "lm-eval tasks need lm-eval: pip install 'sparsecraft[eval]'."
        ) from None
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer)
    results = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit)["results"]
    return {  # a metric that does not apply is NaN there, which JSON does not have
        task: {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in m.items()
        }
        for task, m in results.items()
    }
