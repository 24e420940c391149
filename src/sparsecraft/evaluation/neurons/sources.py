"""What neurons are looked at on: rows of files, or batches of any model's inputs, by domain.

B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from sparsecraft.data.encoding import IGNORED
from sparsecraft.data.rows import load_rows
from sparsecraft.dense.loading import objective_of
from sparsecraft.errors import DataError, SparsecraftError
from sparsecraft.evaluation.held_out import (
    batches_by_length,
    check_limit,
    length_of,
    listed_batches,
)
from sparsecraft.evaluation.logprobs import label_logprobs

Batch = dict[str, Tensor]
Batches = dict[str, Sequence[Batch]]
MASKED = 0.15  # of the tokens of a text, which a masked language model is to find (BERT)


def sources_of(
    model: nn.Module,
    data: Sequence[str | Path] | Mapping[str, Iterable[Batch]],
    tokenizer: Any,
    max_length: int | None,
    limit: int | None,
) -> Batches:
    """Domain -> batches: as `evaluate` takes them of models that it takes, else the texts of the
    rows, of which a masked language model is to find some tokens; or those that are given, whole.

    Raises:
        DataError: rows that are malformed, or none.
        SparsecraftError: the model reads no text, and no batches are given.
    """
    if isinstance(data, Mapping):
        if limit is not None or max_length is not None:
            raise SparsecraftError("limit and max_length are of files; cut the batches instead.")
        return {str(name): _given(name, batches) for name, batches in data.items()}
    if objective_of(model) is not None and tokenizer is not None:
        return listed_batches(model, list(data), tokenizer, max_length, limit)
    if tokenizer is None:
        raise SparsecraftError(
            f"{type(model).__name__} came without a tokenizer; pass tokenizer=..., or batches of "
            "its inputs by domain, data={'cats': [{'pixel_values': ...}], ...}."
        )
    check_limit(limit)
    length = length_of(model, max_length)
    return {str(path): _text_batches(model, path, tokenizer, length, limit) for path in data}


def _given(name: Any, batches: Iterable[Batch]) -> list[Batch]:
    listed = [_masked(dict(batch)) for batch in batches]
    if not listed or not all(batch and _rows(batch) for batch in listed):
        raise DataError(f"The domain {name!r} has no batch, or one without rows.")
    return listed


def _masked(batch: Batch) -> Batch:
    """With what of a text is no padding, where its mask says that."""
    mask_BS = batch.get("attention_mask")
    if "input_ids" in batch and mask_BS is not None and mask_BS.ndim == 2:
        return {**batch, "token_mask": batch.get("token_mask", mask_BS.bool())}
    return batch


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _text_batches(
    model: nn.Module, path: str | Path, tokenizer: Any, length: int, limit: int | None
) -> list[Batch]:
    """Those of the texts of a file; longer ones are cut."""
    rows = load_rows(path, "test")
    texts = [_text(row) for row in rows.select(range(min(limit or len(rows), len(rows))))]
    encoded = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    known = [{"input_ids": ids, "labels": ids} for ids in encoded if ids]
    if not known:
        raise DataError(f"{path} has no row with a text.")
    batches = batches_by_length(known, tokenizer, None, model)
    return [_asked(model, batch, tokenizer) for batch in batches]


def _text(row: dict) -> str:
    messages = row.get("messages")
    return row["text"] if messages is None else "\n\n".join(m["content"] for m in messages)


def _asked(model: nn.Module, batch: Batch, tokenizer: Any) -> Batch:
    """The batch with labels of what a masked language model is to find; without, for others."""
    ids_BS = batch["input_ids"]
    if not is_masked(model) or tokenizer.mask_token_id is None:
        return {key: value for key, value in batch.items() if key != "labels"}
    generator = torch.Generator().manual_seed(0)
    special_BS = torch.isin(ids_BS, torch.tensor(tokenizer.all_special_ids))
    drawn_BS = torch.rand(ids_BS.shape, generator=generator) < MASKED
    hidden_BS = drawn_BS & batch["token_mask"] & ~special_BS
    labels_BS = ids_BS.masked_fill(~hidden_BS, IGNORED)
    given_BS = ids_BS.masked_fill(hidden_BS, tokenizer.mask_token_id)
    return batch | {"input_ids": given_BS, "labels": labels_BS}


def is_masked(model: nn.Module) -> bool:
    """Whether a model is to find tokens that are hidden from it."""
    return type(model).__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()


def run(model: nn.Module, batch: Batch) -> None:
    """Pass a batch through the model."""
    given = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
    if objective_of(model) is None or "labels" not in batch:
        model(**given)
    else:
        label_logprobs(model, batch)


def right_of(model: nn.Module, batch: Batch) -> Tensor:
    """Of every label, whether it is the model's first choice, (N,) bool."""
    given = {key: value for key, value in batch.items() if key != "token_mask"}
    if not is_masked(model):
        return label_logprobs(model, given)[1]
    labels_BS = given.pop("labels").to(model.device)
    best_BS = model(**{key: value.to(model.device) for key, value in given.items()}).logits.argmax(
        -1
    )
    return (best_BS == labels_BS)[labels_BS != IGNORED]


def has_labels(sources: Batches) -> bool:
    """Whether there is something to be right about."""
    return all("labels" in batch for batches in sources.values() for batch in batches)
