"""The data of a domain, and what routers read of it.

Shapes: B sequences, S positions, T tokens, D width.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft import hub
from sparsecraft.certificate import evaluation_mode
from sparsecraft.data import as_batches, collate, pad_id
from sparsecraft.encoding import row_ids
from sparsecraft.errors import DataError
from sparsecraft.origin import Origin
from sparsecraft.planning import PlannedEdit, reads
from sparsecraft.rows import load_rows

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


def read_inputs(
    model: nn.Module,
    items: Sequence[PlannedEdit],
    batches: Iterable[dict[str, Any]],
    take: Callable[[list[Tensor]], None],
) -> None:
    """Give `take`, for every batch, what the router of each item reads of its real tokens, (T, D),
    and the last hidden states of the real tokens."""
    seen: dict[int, Tensor] = {}
    whose = [reads(model, item.site.path) for item in items]

    def keep(n: int) -> Callable:
        return lambda module, args, kwargs: seen.update(
            {n: args[0] if args else kwargs["hidden_states"]}
        )

    handles = [
        model.get_submodule(item.site.path).register_forward_pre_hook(keep(n), with_kwargs=True)
        for n, item in enumerate(items)
    ]
    try:
        with evaluation_mode(model), torch.no_grad():
            for batch in batches:
                inputs, masks = _inputs(model, batch)
                output = model.base_model(**inputs)
                last = getattr(output, "encoder_last_hidden_state", None)
                last = output.last_hidden_state if last is None else last
                read = [_real(seen[n], masks.get(whose[n])) for n in range(len(items))]
                take([*read, _real(last, masks["input"])])
    finally:
        for handle in handles:
            handle.remove()


def _inputs(
    model: nn.Module, batch: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
    """The batch as the model takes it, and of whose tokens which are real."""
    inputs = {
        key: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for key, value in batch.items()
        if isinstance(value, Tensor) and key not in ("labels", "token_mask")
    }
    masks = {"input": inputs.get("attention_mask")}
    if getattr(model.config, "is_encoder_decoder", False):
        masks["decoder"] = inputs.get("decoder_attention_mask")
        if "decoder_input_ids" not in inputs:  # the decoder reads the same text
            inputs["decoder_input_ids"], masks["decoder"] = inputs["input_ids"], masks["input"]
    return inputs, masks


def _real(x: Tensor, mask_BS: Tensor | None) -> Tensor:
    x_TD = x.reshape(-1, x.shape[-1])
    return x_TD if mask_BS is None else x_TD[mask_BS.reshape(-1).to(x.device, torch.bool)]


def domain_batches(
    model: nn.Module, domain: Domain, tokenizer: Any, tokens: int | None = None
) -> Iterator[dict[str, Any]]:
    """The domain as model inputs, chats as the tokenizer's template has them, long rows cut; up to
    about `tokens`. None is `TOKENS` of text, and all batches."""
    batches, count = domain.batches, 0
    if batches is None:
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
    length, pad = length_of(model), pad_id(tokenizer)
    decodes = model.can_generate() and not model.config.is_encoder_decoder
    for start in range(0, len(domain.rows), BATCH):
        features = []
        for row in domain.rows[start : start + BATCH]:
            ids = row_ids(row, tokenizer, adds_bos_only=decodes)[:length]
            if not ids:
                raise DataError(f"A row of the domain {domain.name} has no token; leave it out.")
            features.append({"input_ids": ids, "labels": ids})
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
    """A batch of each domain in turn, so that the first ones already tell of all."""
    turns = [domain_batches(model, domain, tokenizer) for domain in domains]
    while turns:
        for batches in tuple(turns):
            batch = next(batches, None)
            if batch is None:
                turns.remove(batches)
            else:
                yield batch


def tokenizer_of(model: nn.Module) -> Any:
    origin = Origin.of(model)
    return origin and hub.load_tokenizer(origin.folder)


def length_of(model: nn.Module) -> int:
    return min(LENGTH, getattr(model.config, "max_position_embeddings", None) or LENGTH)
