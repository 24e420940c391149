"""What an expert does for the loss: what is lost where it gives nothing.

Shapes: D domains, E experts, R documents.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from torch import Tensor, nn

from sparsecraft.evaluation.analysis.watching import routed_layers
from sparsecraft.evaluation.documents import by_document
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
            rows.append(by_document(model, batch)[:2])
            step()
        found.append(np.concatenate(rows, 1))
    return found
