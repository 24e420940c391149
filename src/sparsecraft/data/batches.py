"""Encoded rows -> padded batches of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecraft.data.encoding import IGNORED
from sparsecraft.data.limits import Limits, pad_id
from sparsecraft.data.prepare import prepare
from sparsecraft.errors import DataError

if TYPE_CHECKING:
    import torch

    from sparsecraft.data.sentences import Prompts


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
    block-diagonal mask; the padding is one more document, or where every row is a document goes on
    with it, so that there is no mask: attention without one is several times faster. Transformers
    does so only where no cache is made: call the model with `use_cache=False` (Trainer does) or
    documents see each other.
    Labels of whole numbers (task "label") give labels (B,). `prompts`: those that `prepare` filled;
    `sentence_embeddings` (B, D) come from them or, packed, (N, D) with `sentence_ids` (B, S).
    Rows with a column `expert`, one for each token, give `expert_ids` (B, S).
    """
    import torch

    rows = [torch.tensor(feature["input_ids"]).long() for feature in features]
    mask_BS = _pad([torch.ones_like(row, dtype=torch.bool) for row in rows], False)
    batch = {"input_ids": _pad(rows, pad_id), "token_mask": mask_BS}
    labels = [torch.tensor(feature["labels"]).long() for feature in features]
    batch["labels"] = _pad(labels, IGNORED) if labels[0].ndim else torch.stack(labels)
    if prompts is not None:
        batch |= _sentences(features, prompts, packed)
    if "expert" in features[0]:  # padding goes to any; no loss counts it
        batch["expert_ids"] = _pad([torch.tensor(row["expert"]) for row in features], 0)
    if not packed:
        return batch | {"attention_mask": mask_BS.long()}
    width, positions = mask_BS.shape[1], []
    whole = all(len(feature["seq_lengths"]) == 1 for feature in features)
    for feature, row in zip(features, rows, strict=True):
        lengths = [width] if whole else [*feature["seq_lengths"], width - len(row)]
        positions.append(torch.cat([torch.arange(length) for length in lengths]))
    return batch | {"position_ids": torch.stack(positions)}


def halves(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """A batch of B rows as one of the first B // 2 and one of the others."""
    rows = len(batch["labels"])
    parts = (slice(rows // 2), slice(rows // 2, rows))
    # Of a packed batch each sentence belongs to the tokens that name it.
    whole = ("sentence_embeddings",) if "sentence_ids" in batch else ()
    return [{k: v if k in whole else v[part] for k, v in batch.items()} for part in parts]


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
    model: Any = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Dicts of model inputs from what `convert(..., data=...)` takes.

    A dataset path (or name, or several; needs `tokenizer`), an iterable of token-id tensors (B, S),
    or an iterable of dicts of model inputs, passed on as they are. Raises DataError for the rest,
    and for tokens that the `model` has no row for.
    """
    import torch

    paths = (
        isinstance(data, (list, tuple)) and data and all(isinstance(d, (str, Path)) for d in data)
    )
    if isinstance(data, (str, Path)) or paths:
        if tokenizer is None:
            names = ", ".join(map(str, data)) if paths else str(data)
            raise DataError(f"data is {names}: a tokenizer is needed to read it.")
        options = {"max_length": max_length, "seed": seed, "task": task, "model": model}
        rows, _ = prepare(data, tokenizer, **options)
        for start in range(0, len(rows), batch_size):
            part = rows.select(range(start, min(start + batch_size, len(rows))))
            batch = collate(list(part), pad_id(tokenizer, model))
            del batch["token_mask"]  # the models' forward does not know it
            yield batch
        return
    if not isinstance(data, Iterable):
        raise DataError(f"data is {type(data).__name__}: a path or an iterable of batches.")
    tokens = Limits.of(model).tokens
    for number, batch in enumerate([data] if isinstance(data, torch.Tensor) else data, 1):
        if isinstance(batch, torch.Tensor) and batch.ndim == 2 and not batch.is_floating_point():
            found = {"input_ids": batch}
        elif isinstance(batch, dict) or hasattr(batch, "keys"):  # BatchEncoding is no dict
            found = dict(batch)
        else:
            shape = getattr(batch, "shape", "")
            raise DataError(
                f"batch {number} of data is {type(batch).__name__} {shape}: needed are token-id "
                "tensors (B, S) or dicts of model inputs."
            )
        for key in ("input_ids", "decoder_input_ids"):
            _check_tokens(number, found.get(key), tokens)
        yield found


def _check_tokens(number: int, ids: Any, tokens: int | None) -> None:
    """Refuse ids that a model has no row for; on a GPU they would kill the process."""
    if tokens is None or getattr(ids, "numel", lambda: 0)() == 0:
        return
    low, high = ids.min().item(), ids.max().item()
    if low < 0 or high >= tokens:
        raise DataError(
            f"batch {number} of data holds the token {low if low < 0 else high}, and the model's "
            f"embedding has rows 0 to {tokens - 1}."
        )
