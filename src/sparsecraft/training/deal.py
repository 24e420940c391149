"""Training rows assigned to experts, each to the one with the least loss on it (UpIT).

N rows, E experts, B rows of a batch, S tokens of its longest row.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft.checkpoint.jsonfile import json_digest, read_json, write_json
from sparsecraft.data.batches import collate
from sparsecraft.data.encoding import IGNORED
from sparsecraft.errors import SparsecraftError
from sparsecraft.evaluation.logprobs import BATCH_TOKENS
from sparsecraft.moe.batches import Batches, attach, batches_of
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.outputs import evaluation_mode
from sparsecraft.recipe.stages import Deal, Fit, Stage
from sparsecraft.recipe.words import router_words
from sparsecraft.surgery.record import conversion_of

if TYPE_CHECKING:
    import datasets

log = logging.getLogger("sparsecraft")

RECORD = "buckets.json"


def check_deal(model: nn.Module, stages: Sequence[Stage | Fit], task: str) -> None:
    """Refuse models whose experts cannot be assigned rows, before any stage has cost anything.

    Raises:
        SparsecraftError: another task than causal, or layers that cannot all send a token to one
            expert.
    """
    for stage in stages:
        if not stage.deals:
            continue
        if task != "causal":
            raise SparsecraftError(
                f"Stage {stage.name!r} assigns rows by the perplexity of causal language models, "
                f"and this {type(model).__name__} is a {task} model; leave the stage out "
                "(--stages NAME of the others)."
            )
        count_experts(model)


def count_experts(model: nn.Module) -> int:
    """E, the same in every routed layer.

    Raises:
        SparsecraftError: it is not, or a router does not choose among whole experts by token.
    """
    counts = {}
    for layer in routed(model):
        if not layer.router.spec.can_be_directed:
            raise SparsecraftError(
                f"Rows cannot be assigned to the {type(layer.experts).__name__} of this "
                f"{type(model).__name__}: a router by token that chooses among whole experts can "
                f"be directed to one, and this one is: {router_words(layer.router.spec)}."
            )
        counts[layer.experts.num_experts] = True
    if len(counts) != 1:
        raise SparsecraftError(
            f"Rows are assigned to as many experts in every layer; those of this "
            f"{type(model).__name__} have {', '.join(map(str, counts)) or 'no routers'}."
        )
    return next(iter(counts))


def routed(model: nn.Module) -> list[MoELayer]:
    return [layer for layer in conversion_of(model).layers if layer.router is not None]


@contextmanager
def directed(model: nn.Module) -> Iterator[None]:
    """In this block, `expert_ids` (B, S) of a forward pass says which expert each token goes to."""
    layers = routed(model)
    shared = batches_of(model)
    batches, before = shared or Batches(), [layer.batches for layer in layers]
    handles = [] if shared else attach(model, batches)
    for layer in layers:
        layer.batches = batches
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.batches = old
        for handle in handles:
            handle.remove()


def sampled(rows: datasets.Dataset, spec: Deal) -> datasets.Dataset:
    """The rows to assign: the first ones, since `data.prepare` shuffles by the run's seed."""
    wanted = min(max(math.ceil(spec.sample * len(rows)), spec.at_least), spec.at_most)
    return rows.select(range(min(wanted, len(rows))))


def deal(
    model: nn.Module, rows: datasets.Dataset, folder: Path, *, pad_id: int, resume: bool
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """The rows with a column `expert`, the number of each row's bucket at every token.

    Args:
        folder: where the buckets are kept, so that a run that is resumed has them again although
            its experts have moved.

    Returns:
        The rows, and what the report says of them: rows of each bucket, and the mean loss of the
        sample under each expert.
    """
    kept = folder / RECORD
    if resume and kept.is_file():
        found = read_json(kept)
        if found.pop("digest", json_digest(found)) != json_digest(found):
            raise SparsecraftError(
                f"{kept} is not what was written, and without it the experts would train on other "
                f"rows; delete {folder.parent} and start anew."
            )
    else:
        if torch.cuda.is_available() and model.device.type == "cpu":
            model.to("cuda")  # where Trainer is about to put it
        losses_NE = row_losses(model, rows, pad_id=pad_id)
        # A tie goes to the lower number.
        found = {"buckets": losses_NE.argmin(1).tolist(), "losses": losses_NE.mean(0).tolist()}
        write_json(kept, found | {"digest": json_digest(found)})
    numbers = found["buckets"]
    counts = [numbers.count(e) for e in range(count_experts(model))]
    log.info(f"buckets: {len(numbers)} rows assigned to {len(counts)} experts: {counts}")
    if empty := [e for e, count in enumerate(counts) if not count]:
        log.warning(
            f"The buckets of experts {', '.join(map(str, empty))} are empty: no row of "
            f"{len(numbers)} has its least loss under them, and they and their rows of the routers "
            "stay as they are in this stage. Experts that are copies of one model always tie."
        )
    lengths = map(len, rows["input_ids"])
    column = [[e] * length for e, length in zip(numbers, lengths, strict=True)]
    return rows.add_column("expert", column), {"rows": counts, "mean_loss": found["losses"]}


@torch.no_grad()
def row_losses(
    model: nn.Module, rows: datasets.Dataset, *, pad_id: int, tokens: int = BATCH_TOKENS
) -> Tensor:
    """The mean loss of each row's labels under each expert, (N, E) on the CPU: what perplexity is
    the exponential of, with all layers' tokens at that expert.

    Args:
        tokens: of one forward pass, padding included.
    """
    count = count_experts(model)
    losses_NE = torch.empty(len(rows), count, dtype=torch.float32)
    with directed(model), evaluation_mode(model):
        for part in _parts(list(map(len, rows["input_ids"])), tokens):
            batch = collate(list(rows.select(part)), pad_id)
            del batch["token_mask"]
            batch = {key: value.to(model.device) for key, value in batch.items()}
            labels = batch.pop("labels")
            for e in range(count):
                ids = torch.full_like(batch["input_ids"], e)
                logits = model(**batch, expert_ids=ids, use_cache=False).logits
                losses_NE[part, e] = _row_means(logits, labels).cpu()
    if not losses_NE.isfinite().all():
        raise SparsecraftError(
            f"{type(model).__name__} gives losses that are not finite numbers; check its weights, "
            "or load it in float32."
        )
    return losses_NE


def _parts(lengths: list[int], tokens: int) -> Iterator[list[int]]:
    """Rows by length, so that padding is short, in batches of at most `tokens` tokens."""
    part: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if part and (len(part) + 1) * lengths[row] > tokens:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def _row_means(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of each row, (B,) float32; one row's logits in float32 at a time."""
    means = []
    for logits_SV, labels_S in zip(logits[:, :-1], labels[:, 1:], strict=True):
        kept = labels_S != IGNORED
        means.append(F.cross_entropy(logits_SV[kept].float(), labels_S[kept]))
    return torch.stack(means)
