"""Whether the documents of a pack stay apart in a model: asked of the model itself, before a run.

Transformers keeps them apart by positions that restart, in families whose attention reads those.
A state that runs on (Mamba, linear attention, short convolutions), a mask made of the attention
mask alone (OPT, BERT as a decoder) and positions that are counted otherwise do not see where a
document begins, and nothing fails.

Shapes: S tokens of a row, D width.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.data.batches import collate
from sparsecraft.data.encoding import IGNORED
from sparsecraft.data.limits import pad_id
from sparsecraft.errors import first_line
from sparsecraft.moe.context import sentence_width
from sparsecraft.moe.outputs import evaluation_mode
from sparsecraft.training.arguments import by_fsdp, on_cpu

log = logging.getLogger("sparsecraft")

# How far hidden states may move with another document, and be from those of a document alone,
# relative to their size. A masked document adds exactly nothing, so that no more moves than where
# it is in another row of the batch; packed and alone, sums run in another order.
MOVES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-3}
DIFFERS = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
SHORTEST = 8  # tokens of a probe row, so that it holds three documents


def leak(model: nn.Module, tokenizer: Any, max_length: int, rows: int) -> str | None:
    """How documents of a pack see each other in a causal model; None if they do not.

    Random documents go through the model as packed rows and one by one, in evaluation mode, by
    the collator and the arguments of training: what the others say may not move with the first
    document of their row, and must be what they say alone. Four forward passes without gradients.
    Rows have the run's length, so that windows and blocks that a shorter probe would not leave
    are left, and are two where the run's are: some attention keeps documents apart in one only.

    Args:
        max_length: tokens of a packed row in the run.
        rows: packed rows of a forward pass in the run.
    """
    length = max(SHORTEST, max_length)
    # The second row is shorter, so that its padding is one more document.
    sizes = [[length // 2, length // 4, length - length // 2 - length // 4], [length // 4] * 2]
    documents = [_documents(model, tokenizer, row, seed) for seed, row in enumerate(sizes[:rows])]
    changed = [
        [_documents(model, tokenizer, row[:1], seed + 2)[0], *kept[1:]]
        for seed, (row, kept) in enumerate(zip(sizes, documents, strict=False))
    ]
    pad = pad_id(tokenizer, model)
    _to_the_trainers_device(model)
    with evaluation_mode(model), torch.no_grad(), _same_random_numbers(model):
        alone, beside = (_apart(model, given, pad) for given in (documents, changed))
        try:
            packed, moved = (_packed(model, given, pad) for given in (documents, changed))
        except Exception as err:  # families differ in what they refuse, and by which error
            return f"it takes no packed rows ({type(err).__name__}: {first_line(err):.150})"
    # A router that looks at the whole batch moves them in rows of their own as well.
    noise = _furthest(alone, beside)
    dtype = alone[0].dtype
    if not _furthest(packed, moved) <= MOVES[dtype] + 4 * noise:
        return "the documents of a pack see each other"
    if not _distance(alone, packed) <= DIFFERS[dtype] + 4 * noise:
        return "a document of a pack does not stand at the positions that it has alone"
    return None


def _documents(model: nn.Module, tokenizer: Any, sizes: list[int], seed: int) -> list[list[int]]:
    """Random tokens of the vocabulary, without those that mean something to a model."""
    table = model.get_input_embeddings().weight.shape[0]
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    known = range(min(table, len(tokenizer)))
    ids = [token for token in known if token not in special] or list(known)
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randint(len(ids), (size,), generator=generator).tolist() for size in sizes]
    return [[ids[draw] for draw in drawn] for drawn in draws]


def _packed(model: nn.Module, documents: list[list[list[int]]], pad: int) -> list[Tensor]:
    """The hidden states (S, D) of every document but the first of its row, from packed rows."""
    rows = [
        {"input_ids": ids, "labels": [IGNORED] * len(ids), "seq_lengths": [*map(len, row)]}
        for row in documents
        for ids in [[token for document in row for token in document]]
    ]
    hidden_BSD = _hidden(model, collate(rows, pad, packed=True), packed=True)
    pieces = zip(hidden_BSD, rows, strict=True)
    return [
        piece
        for hidden_SD, row in pieces
        for piece in hidden_SD[: len(row["input_ids"])].split(row["seq_lengths"])[1:]
    ]


def _apart(model: nn.Module, documents: list[list[list[int]]], pad: int) -> list[Tensor]:
    """The same from one row for each document."""
    rows = [{"input_ids": ids, "labels": [IGNORED] * len(ids)} for row in documents for ids in row]
    found = iter(_hidden(model, collate(rows, pad), packed=False))
    return [
        hidden_SD[: len(document)]
        for row in documents
        for number, (document, hidden_SD) in enumerate(zip(row, found, strict=False))
        if number
    ]


def _hidden(model: nn.Module, batch: dict[str, Tensor], packed: bool) -> Tensor:
    """What the output matrix reads (B, S, D): kept logits would be many times larger."""
    del batch["token_mask"], batch["labels"]
    if width := sentence_width(model):
        count = 1 if packed else len(batch["input_ids"])
        batch["sentence_embeddings"] = torch.full((count, width), width**-0.5, dtype=torch.float32)
        if packed:
            batch["sentence_ids"] = torch.zeros_like(batch["input_ids"])
    found: list[Tensor] = []
    head = model.get_output_embeddings() or nn.Identity()
    hook = head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    device = model.get_input_embeddings().weight.device
    inputs = {key: value.to(device) for key, value in batch.items()}
    try:
        logits_BSV = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    return found[-1] if found else logits_BSV


def _furthest(some: list[Tensor], others: list[Tensor]) -> float:
    """The largest |difference| of a token's hidden state, relative to the largest of them."""
    pairs = zip(some, others, strict=True)
    size = max(h_SD.float().norm(dim=-1).max().item() for h_SD in some)
    return max((a - b).float().norm(dim=-1).max().item() for a, b in pairs) / size


def _distance(some: list[Tensor], others: list[Tensor]) -> float:
    """|difference| of all hidden states together, relative to their size."""
    a, b = torch.cat(some).float(), torch.cat(others).float()
    return ((a - b).norm() / a.norm()).item()


def _to_the_trainers_device(model: nn.Module) -> None:
    """To the GPU that Trainer would move it to: some attention runs nowhere else."""
    sharded = by_fsdp() or bool(getattr(model, "hf_device_map", None))
    if not on_cpu() and not sharded and not getattr(model, "is_quantized", False):
        model.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))


@contextmanager
def _same_random_numbers(model: nn.Module) -> Iterator[None]:
    """Leave the generators as they were, whatever a family draws in evaluation."""
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        yield
