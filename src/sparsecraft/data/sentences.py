"""Frozen sentence embeddings, by which a router may decide: of texts, prompts and data sets.

Shapes: N texts, S tokens of the longest, D width of the encoder.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.dense import hub
from sparsecraft.dense.jsonfile import read_object
from sparsecraft.dense.loading import load_tokenizer, task_of
from sparsecraft.errors import DataError, HubError, SparsecraftError
from sparsecraft.moe.context import sentences_of

BATCH_SIZE = 64


def embed(
    texts: Sequence[str],
    encoder: str = "minilm",
    *,
    batch_size: int = BATCH_SIZE,
    device: str | torch.device | None = None,
) -> Tensor:
    """The sentence embedding of every text, (N, D) float32 on the CPU.

    The mean of the last hidden states of a text's tokens, scaled to length one, as on the card
    of all-MiniLM-L6-v2. What exceeds the encoder's length is cut, as its card says (MiniLM:
    256 tokens). The encoder stays in memory for later calls.

    Args:
        encoder: a text encoder: the packaged `minilm`, a hub id or a folder.
        batch_size: texts in one forward pass; equal texts are computed once.
        device: None is the GPU if there is one.

    Raises:
        HubError: no such encoder, or weights or a tokenizer that cannot be read.
        SparsecraftError: no text encoder, or something else than a sequence of texts.
        DataError: a text without a token.
    """
    texts = texts if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise SparsecraftError(f"embed takes a list of texts, not {texts!r:.60}.")
    if batch_size < 1:
        raise SparsecraftError(f"batch_size is {batch_size}; it must be at least 1.")
    model, tokenizer, length = _encoder_of(encoder)
    model.to(_device() if device is None else device)
    # By length, so that padding is short.
    distinct = sorted(dict.fromkeys(texts), key=lambda text: (len(text), text))
    parts = [torch.empty(0, model.config.hidden_size, dtype=torch.float32)]
    for start in range(0, len(distinct), batch_size):
        part = distinct[start : start + batch_size]
        parts.append(_embed(part, model, tokenizer, length))
    place = {text: row for row, text in enumerate(distinct)}
    return torch.cat(parts)[[place[text] for text in texts]]


@torch.no_grad()
def _embed(texts: list[str], model: nn.Module, tokenizer: Any, length: int) -> Tensor:
    """One batch, (N, D)."""
    batch = tokenizer(
        texts, padding=True, truncation=True, max_length=length, return_tensors="pt"
    ).to(model.device)
    real_BS1 = batch["attention_mask"][..., None]
    if not real_BS1.any(1).all():
        raise DataError("One of the texts to embed has no token; leave empty texts out.")
    with torch.autocast(model.device.type, enabled=False):
        hidden_BSD = model(**batch).last_hidden_state
    mean_BD = (hidden_BSD * real_BS1).sum(1) / real_BS1.sum(1)
    return nn.functional.normalize(mean_BD, dim=-1).cpu()


def _device() -> str:
    """The GPU of this process, as torchrun numbers it, else the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


_LOADING = threading.Lock()


def _encoder_of(encoder: str | os.PathLike) -> tuple[nn.Module, Any, int]:
    """See `_encoder`; threads that ask at once do not read it twice."""
    with _LOADING:
        return _encoder(os.fspath(encoder))


@functools.lru_cache(maxsize=2)
def _encoder(name: str) -> tuple[nn.Module, Any, int]:
    """Encoder, tokenizer, and the most tokens that it takes; read once in a process."""
    folder = hub.resolve(name)
    task = task_of(folder)
    if task != "encoder":
        raise SparsecraftError(
            f"{name!r} is no text encoder but a model for {task}; embeddings need one such as "
            "'minilm'."
        )
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise SparsecraftError(
            f"The encoder {name!r} has no tokenizer; copy the tokenizer's files into {folder}."
        )
    model = hub.load_dense(str(folder), dtype=torch.float32).base_model.requires_grad_(False)
    lengths = (
        tokenizer.model_max_length,
        getattr(model.config, "max_position_embeddings", None),
        _sentence_length(folder),
    )
    return model, tokenizer, min(length for length in lengths if length)


def _sentence_length(folder: Path) -> int | None:
    """What sentence-transformers cuts texts to, if the folder says so."""
    file = folder / "sentence_bert_config.json"
    if not file.exists():
        return None
    found = read_object(file, HubError).get("max_seq_length")
    if found is not None and not (type(found) is int and found > 0):
        raise HubError(
            f"{file} has max_seq_length={found!r:.40}; it must be a whole number from 1."
        )
    return found


def prompt_text(row: dict) -> str:
    """The text of a canonical row that a router may decide by: what comes before the first answer.

    The turns before the first of the assistant, or the text of a row of text and label. It never
    holds a token that the model has to predict.

    Raises:
        DataError: the row has no prompt.
    """
    if row.get("messages") is not None:
        turns = [message["content"] for message in row["messages"]]
        roles = [message["role"] for message in row["messages"]]
        first = roles.index("assistant") if "assistant" in roles else len(roles)
        text = "\n\n".join(turns[:first])
    else:
        text = row["text"] if row.get("label") is not None else ""
    if not text.strip():
        raise DataError(
            "a router that decides by sentence needs a prompt, and this row has none before what "
            "the model is to predict; give rows of prompt and completion"
        )
    return text


class Prompts:
    """The distinct prompts of a data set, numbered, and their embeddings by number."""

    def __init__(self, encoder: str, width: int):
        self.encoder, self.width = encoder, width
        self._numbers: dict[str, int] = {}
        self._rows: dict[int, Tensor] = {}

    @classmethod
    def of(cls, model: nn.Module) -> Prompts | None:
        """For what the routers of `model` read; None if none of them decides by sentence."""
        sentences = sentences_of(model)
        return None if sentences is None else cls(sentences.encoder, sentences.dim)

    def mark(self, example: dict[str, Any], row: dict) -> dict[str, Any]:
        """The example of a canonical row, with the number of its prompt at every token.

        Every token bears it because packing joins columns of equal lengths.
        """
        number = self._numbers.setdefault(prompt_text(row), len(self._numbers))
        return example | {"sentence": [number] * len(example["input_ids"])}

    def embeddings(self, numbers: Iterable[int] | None = None) -> Tensor:
        """Those of the prompts with these numbers (None: of all), each computed once; (N, D).

        Raises:
            SparsecraftError: the encoder is wider or narrower than the routers expect.
        """
        texts = list(self._numbers)
        numbers = list(range(len(texts)) if numbers is None else numbers)
        missing = [n for n in dict.fromkeys(numbers) if n not in self._rows]
        if missing:
            found = for_routers([texts[n] for n in missing], self.encoder, self.width)
            self._rows |= zip(missing, found, strict=True)
        return torch.stack([self._rows[n] for n in numbers])


def for_routers(texts: list[str], encoder: str, width: int) -> Tensor:
    found = _encoder_of(encoder)[0].config.hidden_size
    if found != width:
        raise SparsecraftError(
            f"The routers read sentence embeddings of width {width} and the encoder {encoder!r} "
            f"gives {found}; convert with sentence_dim={found}."
        )
    return embed(texts, encoder)
