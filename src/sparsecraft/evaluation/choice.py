"""Multiple choice by the log-probabilities of the answers."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import nn

from sparsecraft.data.batches import collate
from sparsecraft.data.encoding import encode, encode_pair
from sparsecraft.data.limits import Limits, pad_id
from sparsecraft.data.rows import load_choices
from sparsecraft.data.sentences import Prompts
from sparsecraft.errors import DataError, SparsecraftError
from sparsecraft.evaluation.logprobs import BATCH_TOKENS, label_logprobs


def score_choice(
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
    rows = load_choices(path)[:limit]
    encode_one = encode_pair if task == "seq2seq" else encode
    examples, dropped, prompts, limits = [], set(), Prompts.of(model), Limits.of(model)
    for number, row in enumerate(rows):
        for choice_number, choice in enumerate(row["choices"]):
            messages = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": choice},
            ]
            try:
                example = encode_one({"messages": messages}, tokenizer, max_length)
                if example is not None:
                    limits.check(example, tokenizer)
            except DataError as err:
                raise DataError(f"{path}, row {number + 1}: {err}.") from None
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
        batch = collate(part, pad_id(tokenizer, model), prompts=prompts)
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
