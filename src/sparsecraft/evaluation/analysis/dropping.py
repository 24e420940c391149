"""What an expert does for the loss: what is lost where it gives nothing.

Shapes: D domains, E experts, R documents.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from sparsecraft.evaluation.analysis.watching import routed_layers
from sparsecraft.evaluation.logprobs import label_logprobs
from sparsecraft.moe.routing import Routing


@contextmanager
def without_expert(model: nn.Module, expert: int) -> Iterator[None]:
    """Every layer's expert of this number gives nothing while the block runs: its slots stay empty,
    the weights of a token's other experts are as they were, and routers choose as before."""

    def of_ours(router: nn.Module, args: tuple, routing: Routing) -> Routing:
        kept_TK = routing.weights_TK.masked_fill(routing.indices_TK == expert, 0)
        return dataclasses.replace(routing, weights_TK=kept_TK, sums_to_one=False, every=False)

    def of_theirs(experts: nn.Module, args: tuple) -> tuple:
        x_TD, indices_TK, weights_TK = args
        return x_TD, indices_TK, weights_TK.masked_fill(indices_TK == expert, 0)

    handles = []
    for layer in routed_layers(model).values():
        if layer.ours:
            handles.append(layer.router.register_forward_hook(of_ours))
        else:
            handles.append(layer.experts.register_forward_pre_hook(of_theirs))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def losses_without(
    model: nn.Module,
    sources: Mapping[str, Sequence[dict[str, Tensor]]],
    experts: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[list[dict[str, float]]]:
    """For each expert and domain what the loss gains where it gives nothing, in nats per label:
    `change`, and its `error` (the standard error over documents).

    Args:
        progress: is called with how many batches are done, and of how many.
    """
    each = sum(map(len, sources.values()))
    done, total = itertools.count(1), each * (experts + 1)

    def step() -> None:
        progress(next(done), total)

    whole = _by_document(model, sources, step)
    found = []
    for expert in range(experts):
        with without_expert(model, expert):
            changed = _by_document(model, sources, step)
        found.append([_change(*pair) for pair in zip(whole, changed, strict=True)])
    return found


def _change(whole_2R: np.ndarray, changed_2R: np.ndarray) -> dict[str, float]:
    """Of one domain; the ratio of two sums over documents, and its error by linearization."""
    labels_R = whole_2R[1]
    gain_R = changed_2R[0] - whole_2R[0]
    change, count = gain_R.sum() / labels_R.sum(), len(labels_R)
    left_R = gain_R - change * labels_R
    spread = np.sqrt((left_R**2).sum() * count / max(count - 1, 1)) / labels_R.sum()
    return {"change": float(change), "error": float(spread)}


@torch.no_grad()
def _by_document(
    model: nn.Module,
    sources: Mapping[str, Sequence[dict[str, Tensor]]],
    step: Callable[[], None],
) -> list[np.ndarray]:
    """Of each domain the nats and the labels of every document, (2, R)."""
    found = []
    for batches in sources.values():
        rows = []
        for batch in batches:
            given = {key: value for key, value in batch.items() if key != "token_mask"}
            logprobs_N, _ = label_logprobs(model, given)
            labels = given["labels"]
            if labels.ndim == 2 and not model.config.is_encoder_decoder:
                labels = labels[:, 1:]
            kept = labels != -100
            row_N = kept.nonzero()[:, 0]
            nats_R = torch.zeros(len(labels), dtype=torch.float64)
            nats_R.index_add_(0, row_N, -logprobs_N.double().cpu())
            labels_R = torch.bincount(row_N, minlength=len(labels)).double()
            live_R = labels_R > 0
            rows.append(torch.stack([nats_R, labels_R])[:, live_R].numpy())
            step()
        found.append(np.concatenate(rows, 1))
    return found
