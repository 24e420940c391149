"""The data of a domain, and what routers read of it.

Shapes: B sequences, S positions, T tokens, D width.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsecraft.data.batches import as_batches, collate
from sparsecraft.data.encoding import row_ids
from sparsecraft.data.limits import Limits, pad_id
from sparsecraft.data.rows import load_rows
from sparsecraft.dense.tokens import is_encoder_decoder
from sparsecraft.errors import DataError
from sparsecraft.surgery.record import tokenizer_of

# Rows of a data set that are taken, tokens of a row, rows of a forward pass; and the tokens of a
# domain after which the model reads no further: the sentence encoder is much smaller.
ROWS, LENGTH, BATCH, TOKENS = 512, 512, 8, 16_384


@dataclass(frozen=True, slots=True)
class Domain:
    """The data of one expert.

    Attributes:
        name: for reports.
        rows: canonical rows; None where batches were given.
        batches: dicts of model inputs; None where rows were.
    """

    name: str
    rows: list[dict] | None = None
    batches: list[dict[str, Any]] | None = None

    @classmethod
    def of(cls, given: Any, limit: int | None = None) -> Domain:
        """A domain itself; or from a file, folder or hub data set, of which `ROWS` rows are taken,
        evenly spaced and shuffled; a list of texts; or an iterable of batches, token ids (B, S) or
        dicts of model inputs.

        Args:
            limit: batches that are taken of an iterable.

        Raises:
            DataError: none of these, or nothing in it.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, (str, Path)):
            rows = load_rows(given)
            name, count = str(given), len(rows)
            if count > ROWS:
                places = [i * count // ROWS for i in range(ROWS)]
                rows = rows.select(random.Random(0).sample(places, ROWS))
                name += f" ({ROWS} of {count} rows)"
            found = cls(name, rows=list(rows))
        elif isinstance(given, (list, tuple)) and all(isinstance(text, str) for text in given):
            found = cls(f"{len(given)} texts", rows=[{"text": text} for text in given])
        else:
            batches = list(islice(as_batches(given), limit))
            found = cls(f"{len(batches)} batches", batches=batches)
        if not (found.rows or found.batches):
            raise DataError(f"A domain holds nothing ({found.name}); give it rows or texts.")
        return found

    @classmethod
    def joined(cls, domains: Sequence[Domain]) -> Domain:
        """One domain of the rows of several, each of which has rows, in turn."""
        turns = zip_longest(*(domain.rows for domain in domains))
        rows = [row for turn in turns for row in turn if row is not None]
        return cls(" and ".join(domain.name for domain in domains), rows=rows)

    def texts(self) -> list[str]:
        """The whole text of every row.

        Raises:
            DataError: there are tokens only.
        """
        if self.rows is None:
            raise DataError(
                "A sentence encoder embeds texts, and a domain is given as batches of tokens; give "
                "texts or a data set, or convert with encoder='self'."
            )
        return [
            row["text"]
            if row.get("messages") is None
            else "\n\n".join(message["content"] for message in row["messages"])
            for row in self.rows
        ]


def domain_batches(
    model: nn.Module, domain: Domain, tokenizer: Any, tokens: int | None = None
) -> Iterator[dict[str, Any]]:
    """The domain as model inputs, chats as the tokenizer's template has them, long rows cut; up to
    about `tokens`. None is `TOKENS` of text, and all batches.

    Raises:
        DataError: a token that the model has no row for, or a row without any.
    """
    count = 0
    if domain.batches is not None:
        batches = as_batches(domain.batches, model=model)
    else:
        batches, tokens = _collated(model, domain, tokenizer), TOKENS if tokens is None else tokens
    for batch in batches:
        yield batch
        count += _real_tokens(batch)
        if tokens is not None and count >= tokens:
            return


def _collated(model: nn.Module, domain: Domain, tokenizer: Any) -> Iterator[dict[str, Any]]:
    tokenizer = tokenizer or tokenizer_of(model)
    if tokenizer is None:
        raise DataError(f"The domain {domain.name} is text; pass the model's tokenizer.")
    length, pad = length_of(model), pad_id(tokenizer, model)
    limits = Limits.of(model)
    decodes = model.can_generate() and not is_encoder_decoder(model)
    for start in range(0, len(domain.rows), BATCH):
        features = []
        for row in domain.rows[start : start + BATCH]:
            ids = row_ids(row, tokenizer, adds_bos_only=decodes)[:length]
            if not ids:
                raise DataError(f"A row of the domain {domain.name} has no token; leave it out.")
            features.append({"input_ids": ids, "labels": ids})
            limits.check(features[-1], tokenizer)
        yield collate(features, pad)


def _real_tokens(batch: dict[str, Any]) -> int:
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        return int(mask.sum())
    first = next(value for value in batch.values() if isinstance(value, Tensor))
    return first.shape[:2].numel()


def mixed_batches(
    model: nn.Module, domains: Sequence[Domain], tokenizer: Any
) -> Iterator[dict[str, Any]]:
    """A batch of each domain in turn, so that the first batches already cover all."""
    turns = [domain_batches(model, domain, tokenizer) for domain in domains]
    while turns:
        for batches in tuple(turns):
            batch = next(batches, None)
            if batch is None:
                turns.remove(batches)
            else:
                yield batch


def length_of(model: nn.Module) -> int:
    return min(LENGTH, getattr(model.config, "max_position_embeddings", None) or LENGTH)
