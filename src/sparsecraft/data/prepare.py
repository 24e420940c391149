"""Files or rows -> training rows of token ids, mixed by weight, and what was left out."""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsecraft.data.encoding import IGNORED, encode, encode_label, encode_pair
from sparsecraft.data.rows import collect, load_rows
from sparsecraft.errors import DataError, did_you_mean

if TYPE_CHECKING:
    import datasets

    from sparsecraft.data.sentences import Prompts

log = logging.getLogger("sparsecraft")

MAX_REPEATS = 100  # of the rows read: a mixed epoch beyond it comes from a mistaken weight

# What becomes of rows that do not train as they are: keys of the counts.
TOO_LONG, TRUNCATED, NO_TARGET = "too_long", "truncated", "no_trainable_token"


TASKS = {"causal": encode, "seq2seq": encode_pair, "label": encode_label}

# What `dense.loading.task_of` says of a model that can train or have a held-out loss -> TASKS.
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
    if not sources or max_length < 2 or (packing and task != "causal"):
        raise DataError(
            f"{len(sources)} sources, max_length {max_length}, packing {packing}, task {task!r}: "
            "needed are a source, max_length of at least 2, and task causal for packing."
        )
    _check_words(task, overlong)
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


def _check_words(task: str, overlong: str) -> None:
    if task not in TASKS:
        raise DataError(f"No task {task!r}.{did_you_mean(task, TASKS)}")
    if overlong not in ("drop", "truncate"):
        raise DataError(f'overlong is {overlong!r}; it is "drop" or "truncate".')


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
