"""What the networks of a dense model read, captured to disk from data."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from sparsecraft.errors import DataError
from sparsecraft.moe.layer import MoELayer
from sparsecraft.surgery.budget import run, split_layers

log = logging.getLogger("sparsecraft")

Masks = Callable[[str, torch.Size], Tensor | None]


def capture(
    model: nn.Module,
    layers: dict[str, MoELayer],
    batches: Iterable[dict[str, Any]],
    tokens: int,
    masks: Callable[[nn.Module, dict[str, Any]], Masks],
    folder: Path,
    teachers: bool = False,
) -> dict[str, Tensor]:
    """Layer name -> what it reads, (T, D): up to `tokens` real tokens, in the order of the data.

    Args:
        teachers: of the dense Linears, whether or not something imitates them already.
    """
    stores: dict[str, Tensor] = {}
    filled: dict[str, int] = defaultdict(int)
    mask: list[Masks] = []

    def keep(name: str, x: Tensor) -> None:
        x_TD, real_T = x.reshape(-1, x.shape[-1]), mask[0](name, x.shape[:-1])
        if real_T is not None:
            x_TD = x_TD[real_T.to(x_TD.device, torch.bool)]
        if name not in stores:
            count = len(layers)
            stores[name] = _store((tokens, x_TD.shape[-1]), x_TD, count, folder / f"{len(stores)}")
        start = filled[name]
        x_TD = x_TD[: tokens - start]
        stores[name][start : start + len(x_TD)] = x_TD.to(stores[name].device)
        filled[name] += len(x_TD)

    def hook(name: str) -> Callable:
        return lambda module, args: keep(name, args[0])

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        with _whole(model, teachers):
            for batch in batches:
                mask[:] = [masks(model, batch)]
                model(**_inputs(model, batch))
                if all(filled[name] >= tokens for name in layers):
                    break
    finally:
        for handle in hooks:
            handle.remove()
    if missing := [name for name in layers if not filled[name]]:
        raise DataError(f"The data gave no token to {missing[0]!r}; the routers have none to fit.")
    return {name: stores[name][: filled[name]] for name in layers}


@contextmanager
def _whole(model: nn.Module, teachers: bool) -> Iterator[None]:
    """Every expert on, no dropout, no gradients; as it was afterwards.

    Args:
        teachers: Linears run instead of what imitates them.
    """
    training = model.training
    layers = split_layers(model).values()
    before = [(layer, layer.router.runs, layer.imitates) for layer in layers]
    model.eval()
    run(model, "every")
    for layer in layers:
        layer.experts.imitates = layer.imitates and not teachers
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        for layer, runs, imitates in before:
            layer.router.runs, layer.experts.imitates = runs, imitates


def _inputs(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    known = {key: value for key, value in batch.items() if key != "token_mask"}
    return {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in known.items()}


def _store(shape: tuple[int, int], like: Tensor, count: int, path: Path) -> Tensor:
    """Room for one layer's inputs: beside the model, in main memory, or in a file."""
    size = shape[0] * shape[1] * like.element_size() * count
    if like.is_cuda and size < torch.cuda.mem_get_info(like.device)[0] // 2:
        return like.new_empty(shape)
    if size < psutil.virtual_memory().available // 2:
        return torch.empty(shape, dtype=like.dtype)
    log.info(f"The inputs of {count} networks take {size / 1e9:.1f} GB, on disk for the while.")
    numel = shape[0] * shape[1]
    return torch.from_file(str(path), shared=True, size=numel, dtype=like.dtype).view(shape)
