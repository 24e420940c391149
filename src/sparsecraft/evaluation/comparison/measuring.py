"""One model: loaded, measured on rows, and freed.

Shapes: R rows of a file.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsecraft.checkpoint.load import load_any
from sparsecraft.dense.tokens import is_encoder_decoder
from sparsecraft.errors import DataError
from sparsecraft.evaluation.documents import by_document
from sparsecraft.evaluation.held_out import check_classes, length_of, sources_of
from sparsecraft.evaluation.machine import machine
from sparsecraft.evaluation.progress import Progress
from sparsecraft.moe import cost
from sparsecraft.moe.outputs import evaluation_mode

log = logging.getLogger("sparsecraft")

Batches = list[dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Rows:
    """What is measured on.

    Attributes:
        files: of rows.
        task: of all models, as `data.prepare` calls it.
        max_length: longer rows are dropped.
        limit: rows of each file at most.
    """

    files: Sequence[str]
    task: str
    max_length: int
    limit: int | None

    def of(self, model: nn.Module, tokenizer: Any) -> dict[str, tuple[Batches, dict[str, int]]]:
        """File -> its batches for a model, and counts of rows."""
        length = length_of(model, self.max_length)
        return sources_of(list(self.files), tokenizer, length, self.limit, self.task, model)


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known of one model.

    Attributes:
        figures: of the report.
        counted: file -> (3, R), nats, labels and right first choices of every row.
        counts: file -> counts of rows, as `prepare` gives them.
        digests: file -> digest of its rows' token ids and labels.
    """

    figures: dict[str, Any]
    counted: dict[str, np.ndarray]
    counts: dict[str, dict[str, int]]
    digests: dict[str, str]


def measure(name: str, base: str | None, rows: Rows, first: Measured | None) -> Measured | None:
    """Load a model, measure it, and let it go.

    Args:
        base: as in `load_any`.
        first: of another model.

    Returns:
        None where the rows are not those of `first`.
    """
    model, tokenizer = load_any(name, base)
    sources = rows.of(model, tokenizer)
    digests = {file: digest(batches) for file, (batches, _) in sources.items()}
    if first is not None and digests != first.digests:
        return None
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    with evaluation_mode(model):
        counted, speed = _run(model, {file: batches for file, (batches, _) in sources.items()})
    peak = torch.cuda.max_memory_allocated(model.device) if on_gpu else None
    experts = cost.experts_of(model)
    figures = {
        "name": name,
        "class": type(model).__name__,
        **cost.count(model).to_dict(),
        "bytes": cost.bytes_of(model),
        "peak_bytes": peak,
        "tokens_per_second": speed,
        "experts": sorted({count for count, _ in experts}),
        "experts_per_token": sorted({round(float(slots), 2) for _, slots in experts}),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "machine": machine(model),
    }
    return Measured(figures, counted, {f: counts for f, (_, counts) in sources.items()}, digests)


def _run(
    model: nn.Module, listed: dict[str, Batches]
) -> tuple[dict[str, np.ndarray], float | None]:
    """File -> (3, R); and real tokens per second of all passes but the first, which warms up."""
    tokens = [_tokens(model, batch) for batches in listed.values() for batch in batches]
    progress, done, found, seconds = Progress("tokens"), accumulate(tokens), {}, []
    for file, batches in listed.items():
        parts = []
        for batch in batches:
            check_classes(file, batch["labels"], model)
            begun = time.perf_counter()
            parts.append(by_document(model, batch))  # numbers on the CPU: the device is done
            seconds.append(time.perf_counter() - begun)
            progress(next(done), sum(tokens))
        found[file] = np.concatenate(parts, 1)
        if not found[file].size:
            raise DataError(f"{file} has no label to predict.")
    return found, sum(tokens[1:]) / sum(seconds[1:]) if len(seconds) > 1 else None


def _tokens(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Those that a model reads, padding left out; of a decoder beside an encoder, the labels."""
    of_decoder = (batch["labels"] != -100).sum() if is_encoder_decoder(model) else 0
    return int(batch["token_mask"].sum() + of_decoder)


def digest(batches: Batches) -> str:
    """Of the token ids and labels of every row, in their order."""
    found = hashlib.sha256()
    for batch in batches:
        for ids, mask, labels in zip(
            batch["input_ids"], batch["token_mask"], batch["labels"], strict=True
        ):
            found.update(repr((ids[mask].tolist(), labels[labels != -100].tolist())).encode())
    return found.hexdigest()
