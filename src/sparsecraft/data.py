"""Canonical rows -> tokenised datasets -> batches; mixing and packing.

B = rows of a batch, S = tokens of its longest row. Rows that a filter drops are always counted.
Reading files is `rows.py`, one row's tokens `encoding.py`, the demo corpus `corpus.py`; their
public functions are re-exported here.
"""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecraft.corpus import demo
from sparsecraft.encoding import (
    IGNORED,
    encode,
    encode_label,
    encode_pair,
    pad_id,
    prompt_ids,
    render,
)
from sparsecraft.errors import DataError, did_you_mean
from sparsecraft.rows import collect, load_choices, load_rows

if TYPE_CHECKING:
    import datasets
    import torch

    from sparsecraft.sentences import Prompts

__all__ = [
    "as_batches",
    "collate",
    "demo",
    "encode",
    "encode_label",
    "encode_pair",
    "load_choices",
    "load_rows",
    "mix",
    "pack",
    "pad_id",
    "prepare",
    "prompt_ids",
    "render",
]

log = logging.getLogger("sparsecraft")

MAX_REPEATS = 100  # of the rows read: a mixed epoch beyond it comes from a mistaken weight

# What becomes of rows that do not train as they are: keys of the counts.
TOO_LONG, TRUNCATED, NO_TARGET = "too_long", "truncated", "no_trainable_token"


TASKS = {"causal": encode, "seq2seq": encode_pair, "label": encode_label}

# What `hub.task_of` says of a model that can train or have a held-out loss -> one of TASKS.
TASK_OF_MODEL = {"causal": "causal", "seq2seq": "seq2seq", "classification": "label"}


# ------------------------------------------------------------------ datasets
def prepare(
    sources: str | Path | Sequence[str | Path],
    tokenizer,
    *,
    max_length: int = 1024,
    weights: Sequence[float] | None = None,
    packing: bool = False,
    seed: int = 0,
    task: str = "causal",
    overlong: str = "drop",
    split: str = "train",
    prompts: Prompts | None = None,
) -> tuple[datasets.Dataset, dict[str, int]]:
    """Files -> (shuffled dataset of token ids and labels, counts of rows).

    `task` is "causal" (`encode`), "seq2seq" (`encode_pair`) or "label" (`encode_label`);
    `max_length` in tokens. Text longer than that is split into pieces that share one token, so
    that every token is a target once. `weights` are `mix`'s, `packing` is `pack`. `prompts` takes
    in the prompt of every row, for routers that decide by sentence; the column `sentence` then
    holds its number at every token.

    Counts: `rows` read; `too_long` and `no_trainable_token` dropped; `truncated` cut (with
    `overlong="truncate"`; never text); `examples` kept, pieces counted; `repeated` by the weights;
    `packs` (packing only); `tokens` and `trained_tokens` of the dataset. Raises DataError for a
    source that keeps no row.
    """
    sources = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if task not in TASKS:
        raise DataError(f"No task {task!r}.{did_you_mean(task, TASKS)}")
    if overlong not in ("drop", "truncate"):
        raise DataError(f'overlong is {overlong!r}; it is "drop" or "truncate".')
    if not sources or max_length < 2 or (packing and task != "causal"):
        raise DataError(
            f"{len(sources)} sources, max_length {max_length}, packing {packing}, task {task!r}: "
            "needed are a source, max_length of at least 2, and task causal for packing."
        )
    counts: Counter[str] = Counter(dict.fromkeys(("rows", TOO_LONG, TRUNCATED, NO_TARGET), 0))
    parts = []
    for source in sources:
        rows, own = load_rows(source, split), Counter()
        limits = (max_length, overlong)
        examples = _examples(rows, source, tokenizer, limits, task, own, prompts)
        parts.append(collect(examples, _features(task)))
        own.update(rows=len(rows), examples=len(parts[-1]))
        if not len(parts[-1]):
            raise DataError(
                f"{source}: no training rows remain of {len(rows)}: {own[TOO_LONG]} are longer "
                f"than max_length {max_length}, {own[NO_TARGET]} have no trainable token."
            )
        counts.update(own)
    mixed = mix(parts, weights, seed)
    counts["repeated"] = len(mixed) - counts["examples"]
    counts.update(count_tokens(mixed, labelled=task != "label"))
    if packing:
        mixed = pack(mixed, max_length, seed)
        counts["packs"] = len(mixed)
    log.info("data: %s", ", ".join(f"{value} {key}" for key, value in counts.items() if value))
    return mixed, dict(counts)


def count_tokens(rows: datasets.Dataset, labelled: bool = True) -> dict[str, int]:
    """Tokens, and those of them that are targets."""
    found = {"tokens": sum(map(len, rows["input_ids"]))}
    if labelled:
        found["trained_tokens"] = sum(len(row) - row.count(IGNORED) for row in rows["labels"])
    return found


def _features(task: str) -> dict:
    from datasets import List, Value

    ids = {"input_ids": List(Value("int32")), "sentence": List(Value("int32"))}
    if task == "causal":
        return ids | {"labels": List(Value("int32"))}
    labels = List(Value("int32")) if task == "seq2seq" else Value("int64")
    return ids | {"attention_mask": List(Value("int8")), "labels": labels}


def _examples(rows, source, tokenizer, limits, task, counts, prompts=None) -> Iterator[dict]:
    """Encoded rows within `limits` (max_length, overlong); `counts` says why others are dropped."""
    max_length, overlong = limits
    for number, row in enumerate(rows, 1):
        try:
            example = TASKS[task](row, tokenizer)
            length = max(
                (len(v) for v in (example or {}).values() if isinstance(v, list)), default=0
            )
            pieces = task == "causal" and row.get("messages") is None
            if length > max_length and not pieces:
                counts[TOO_LONG if overlong == "drop" else TRUNCATED] += 1
                example = TASKS[task](row, tokenizer, max_length, overlong)
                if example is None and overlong == "drop":
                    continue
            if example is not None and prompts is not None:
                example = prompts.mark(example, row)
        except DataError as err:
            raise DataError(f"{source}, row {number}: {err}.") from None
        if example is None:
            counts[NO_TARGET] += 1
        elif length <= max_length or not pieces:
            yield example
        else:
            for start in range(0, length - 1, max_length - 1):
                # A piece begins with the last token of the one before: no target is lost.
                piece = {key: ids[start : start + max_length] for key, ids in example.items()}
                yield piece | {"labels": [IGNORED, *piece["labels"][1:]]}


def mix(
    parts: Sequence[datasets.Dataset], weights: Sequence[float] | None = None, seed: int = 0
) -> datasets.Dataset:
    """One shuffled dataset of several, deterministic for a `seed`.

    `weights` are relative rates of rows: with [2, 1, 1] half of the rows come from the first. The
    epoch is the shortest that holds those rates and still every row of every source; a source that
    is too small for its share is sampled again, each of its rows equally often up to one. Without
    weights: every row once. (`datasets.interleave_datasets` draws, so its rates are approximate,
    and with "first_exhausted" it drops rows.) Raises DataError for bad weights and for such as
    make the epoch more than 100 times the rows of the sources.
    """
    from datasets import concatenate_datasets

    if weights is not None:
        if len(weights) != len(parts) or not all(0 < weight < math.inf for weight in weights):
            raise DataError(
                f"weights {list(weights)} for {len(parts)} sources: one number above 0, and "
                "finite, per source."
            )
        rng = random.Random(seed)
        rows_per_weight = max(
            len(part) / weight for part, weight in zip(parts, weights, strict=True)
        )
        read, wanted = sum(map(len, parts)), sum(weight * rows_per_weight for weight in weights)
        if wanted > MAX_REPEATS * read:
            raise DataError(
                f"weights {list(weights)} make an epoch of {wanted:.3g} rows out of the {read} "
                f"read, more than {MAX_REPEATS} times as many; choose weights closer to the "
                f"sources' sizes ({', '.join(str(len(part)) for part in parts)})."
            )
        parts = [
            part.select(_resample(len(part), round(weight * rows_per_weight), rng))
            for part, weight in zip(parts, weights, strict=True)
        ]
    return concatenate_datasets(list(parts)).shuffle(seed=seed)


def _resample(size: int, wanted: int, rng: random.Random) -> list[int]:
    times, rest = divmod(max(wanted, size), size)
    return list(range(size)) * times + rng.sample(range(size), rest)


def pack(dataset: datasets.Dataset, max_length: int, seed: int = 0) -> datasets.Dataset:
    """Whole documents packed into rows of at most `max_length` tokens, best fit first.

    TRL's packing, which works on 1,000 shuffled rows at a time and adds `seq_lengths`. It cuts a
    document that is longer than `max_length` without a word, so such a one raises DataError here.
    """
    import trl

    longest = max(map(len, dataset["input_ids"]), default=0)
    if not 0 < longest <= max_length:
        raise DataError(
            f"Packing into {max_length} tokens: the longest of {len(dataset)} documents has "
            f"{longest}; encode with this max_length first."
        )
    names = [n for n in ("input_ids", "labels", "sentence", "expert") if n in dataset.column_names]
    columns = dataset.select_columns(names).shuffle(seed=seed)
    return trl.pack_dataset(columns, max_length, strategy="bfd")


# ------------------------------------------------------------------ batches
def collate(
    features: Sequence[dict],
    pad_id: int,
    packed: bool = False,
    prompts: Prompts | None = None,
) -> dict[str, torch.Tensor]:
    """Batch of `prepare`'s rows: input_ids (B, S) padded with `pad_id`, labels padded with -100.

    `token_mask` (B, S), bool, is True on real tokens: for balance losses and statistics; take it
    out before the model is called. Unpacked: `attention_mask` (B, S). Packed: no attention_mask but
    `position_ids` (B, S) that restart at 0 with every document, from which transformers builds the
    block-diagonal mask; the padding is one more document. Transformers does so only where no cache
    is made: call the model with `use_cache=False` (Trainer does) or documents see each other.
    Labels of whole numbers (task "label") give labels (B,). `prompts`: those that `prepare` filled;
    `sentence_embeddings` (B, D) come from them or, packed, (N, D) with `sentence_ids` (B, S).
    Rows with a column `expert`, one for each token, give `expert_ids` (B, S).
    """
    import torch

    rows = [torch.as_tensor(feature["input_ids"]).long() for feature in features]
    mask_BS = _pad([torch.ones_like(row, dtype=torch.bool) for row in rows], False)
    batch = {"input_ids": _pad(rows, pad_id), "token_mask": mask_BS}
    labels = [torch.as_tensor(feature["labels"]).long() for feature in features]
    batch["labels"] = _pad(labels, IGNORED) if labels[0].ndim else torch.stack(labels)
    if prompts is not None:
        batch |= _sentences(features, prompts, packed)
    if "expert" in features[0]:  # padding goes to any; no loss counts it
        batch["expert_ids"] = _pad([torch.as_tensor(row["expert"]) for row in features], 0)
    if not packed:
        return batch | {"attention_mask": mask_BS.long()}
    width = mask_BS.shape[1]
    positions = []
    for feature, row in zip(features, rows, strict=True):
        lengths = [*feature["seq_lengths"], width - len(row)]
        positions.append(torch.cat([torch.arange(length) for length in lengths]))
    return batch | {"position_ids": torch.stack(positions)}


def _sentences(features: Sequence[dict], prompts: Prompts, packed: bool) -> dict:
    """The embeddings of a batch's N prompts (N, D), one for each row unless packed."""
    import torch

    if not packed:
        return {"sentence_embeddings": prompts.embeddings(row["sentence"][0] for row in features)}
    rows = [torch.as_tensor(feature["sentence"]) for feature in features]
    # Padding belongs to no document: it gets a sentence that is there.
    numbers_N, ids_BS = _pad(rows, int(rows[0][0])).unique(return_inverse=True)
    embeddings_ND = prompts.embeddings(numbers_N.tolist())
    return {"sentence_embeddings": embeddings_ND, "sentence_ids": ids_BS}


def _pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    import torch

    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def as_batches(
    data: Any,
    tokenizer=None,
    *,
    max_length: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    task: str = "causal",
) -> Iterator[dict[str, torch.Tensor]]:
    """Dicts of model inputs from what `convert(..., data=...)` takes.

    A dataset path (or name, or several; needs `tokenizer`), an iterable of token-id tensors (B, S),
    or an iterable of dicts of model inputs, handed on as they are. Raises DataError for the rest.
    """
    import torch

    paths = (
        isinstance(data, (list, tuple)) and data and all(isinstance(d, (str, Path)) for d in data)
    )
    if isinstance(data, (str, Path)) or paths:
        if tokenizer is None:
            names = ", ".join(map(str, data)) if paths else str(data)
            raise DataError(f"data is {names}: a tokenizer is needed to read it.")
        rows, _ = prepare(data, tokenizer, max_length=max_length, seed=seed, task=task)
        for start in range(0, len(rows), batch_size):
            part = rows.select(range(start, min(start + batch_size, len(rows))))
            batch = collate(list(part), pad_id(tokenizer))
            del batch["token_mask"]  # the models' forward does not know it
            yield batch
        return
    if not isinstance(data, Iterable):
        raise DataError(f"data is {type(data).__name__}: a path or an iterable of batches.")
    for number, batch in enumerate([data] if isinstance(data, torch.Tensor) else data, 1):
        if isinstance(batch, torch.Tensor) and batch.ndim == 2 and not batch.is_floating_point():
            yield {"input_ids": batch}
        elif isinstance(batch, dict) or hasattr(batch, "keys"):  # BatchEncoding is no dict
            yield dict(batch)
        else:
            shape = getattr(batch, "shape", "")
            raise DataError(
                f"batch {number} of data is {type(batch).__name__} {shape}: needed are token-id "
                "tensors (B, S) or dicts of model inputs."
            )
