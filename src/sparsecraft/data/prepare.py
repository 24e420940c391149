"""Files or rows -> training rows of token ids, mixed by weight, and what was left out."""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecraft.data.chat import has_control, unprinted
from sparsecraft.data.encoding import IGNORED, encode, encode_label, encode_pair
from sparsecraft.data.limits import Limits
from sparsecraft.data.rows import Unused, collect, read_rows
from sparsecraft.errors import DataError, did_you_mean

if TYPE_CHECKING:
    import datasets

    from sparsecraft.data.files import Place
    from sparsecraft.data.sentences import Prompts

log = logging.getLogger("sparsecraft")

MAX_REPEATS = 100  # of the rows read: a mixed epoch beyond it comes from a mistaken weight

# What becomes of rows that do not train as they are: keys of the counts. Then of what they hold.
TOO_LONG, TRUNCATED, NO_TARGET = "too_long", "truncated", "no_trainable_token"
CONTROL, UNUSED = "text_with_control_tokens", "unused_fields"


TASKS = {"causal": encode, "seq2seq": encode_pair, "label": encode_label}

# What `dense.loading.objective_of` says of a model that can train or have a held-out loss -> TASKS.
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
    model: Any = None,
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Files -> (shuffled dataset of token ids and labels, counts of rows).

    `task` is "causal" (`encode`), "seq2seq" (`encode_pair`) or "label" (`encode_label`);
    `max_length` in tokens. Text longer than that is split into pieces that share one token, so
    that every token is a target once. `weights` are `mix`'s, `packing` is `pack`. `prompts` takes
    in the prompt of every row, for routers that decide by sentence; the column `sentence` then
    holds its number at every token. Tokens and labels that the `model` has no row or class for are
    refused.

    Counts: `rows` read; `too_long` and `no_trainable_token` dropped; `truncated` cut (with
    `overlong="truncate"`; never text); `examples` kept, pieces counted; `repeated` by the weights;
    `packs` (packing only); `tokens` and `trained_tokens` of the dataset. Where there are such:
    `unused_fields`, file -> field -> rows that hold it, and `text_with_control_tokens`, rows of
    text in which a special token is written out, which is read as one. Raises DataError, with file
    and line, for a row that cannot be used as it is, and for a source that keeps no row.
    """
    sources = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if not sources or max_length < 2 or (packing and task != "causal"):
        raise DataError(
            f"{len(sources)} sources, max_length {max_length}, packing {packing}, task {task!r}: "
            "needed are a source, max_length of at least 2, and task causal for packing."
        )
    _check_words(task, overlong)
    counts: Counter[str] = Counter(dict.fromkeys(("rows", TOO_LONG, TRUNCATED, NO_TARGET), 0))
    parts, unused = [], Unused()
    encoder = _Encoder(tokenizer, task, max_length, overlong, prompts, Limits.of(model), unused)
    for source in sources:
        own: Counter[str] = Counter()
        parts.append(encoder.part(source, split, own))
        counts.update(own)
    mixed = mix(parts, weights, seed)
    counts["repeated"] = len(mixed) - counts["examples"]
    counts.update(count_tokens(mixed, labelled=task != "label"))
    if packing:
        mixed = pack(mixed, max_length, seed)
        counts["packs"] = len(mixed)
    log.info("data: %s", ", ".join(f"{value} {key}" for key, value in counts.items() if value))
    fields = unused.counts()
    return mixed, dict(counts) | ({UNUSED: fields} if fields else {})


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


@dataclass(frozen=True, slots=True)
class _Encoder:
    """Rows of one task -> examples within limits."""

    tokenizer: Any
    task: str
    max_length: int
    overlong: str
    prompts: Prompts | None
    limits: Limits
    unused: Unused

    def part(self, source: str | Path, split: str, counts: Counter[str]) -> datasets.Dataset:
        """The examples of one source; `counts` says what became of its rows."""
        examples = self.examples(read_rows(source, split, self.unused), counts)
        found = collect(examples, _features(self.task))
        counts["examples"] = len(found)
        if not len(found):
            raise DataError(
                f"{source}: no training rows remain of {counts['rows']}: {counts[TOO_LONG]} are "
                f"longer than max_length {self.max_length}, {counts[NO_TARGET]} have no trainable "
                "token."
            )
        return found

    def examples(
        self, placed: Iterable[tuple[Place, dict]], counts: Counter[str]
    ) -> Iterator[dict]:
        """Encoded rows; `counts` says why others are dropped."""
        for place, row in placed:
            counts["rows"] += 1
            try:
                yield from self._of_row(place, row, counts)
            except DataError as err:
                raise DataError(f"{place}: {err}.") from None

    def _of_row(self, place: Place, row: dict, counts: Counter[str]) -> list[dict]:
        encode_one = TASKS[self.task]
        example = encode_one(row, self.tokenizer)
        length = max((len(v) for v in (example or {}).values() if isinstance(v, list)), default=0)
        chat = row.get("messages") is not None
        pieces = self.task == "causal" and not chat
        if example is not None:
            self.limits.check(example, self.tokenizer)
        if length > self.max_length and not pieces:
            counts[TOO_LONG if self.overlong == "drop" else TRUNCATED] += 1
            if self.overlong == "drop":
                return []
            example = encode_one(row, self.tokenizer, self.max_length, self.overlong)
        if example is None:
            counts[NO_TARGET] += 1
            return []
        if chat:
            self.unused.add(place, unprinted(row, self.tokenizer))
        else:
            counts[CONTROL] += has_control(row["text"], self.tokenizer)
        if self.prompts is not None:
            example = self.prompts.mark(example, row)
        return self._pieces(example, length) if pieces else [example]

    def _pieces(self, example: dict, length: int) -> list[dict]:
        """A long text in pieces; one begins with the last token of that before: no target is
        lost."""
        if length <= self.max_length:
            return [example]
        cut = [
            {key: ids[start : start + self.max_length] for key, ids in example.items()}
            for start in range(0, length - 1, self.max_length - 1)
        ]
        return [piece | {"labels": [IGNORED, *piece["labels"][1:]]} for piece in cut]


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
