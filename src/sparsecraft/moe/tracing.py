"""trace(): what every router decided in the latest forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.traces import RECORDS, Record, Trace


@contextmanager
def trace(model: nn.Module, *, inputs: bool = False) -> Iterator[Trace]:
    """Record the `Routing` of every routed layer of `model` while the block runs.

    Of each layer the latest routing is kept only (it is overwritten, never appended to), so that
    recomputation under activation checkpointing cannot count a token twice. Forward passes of other
    threads and asyncio tasks are not seen; a thread that is started inside is, if it runs by
    `contextvars.copy_context().run`, as `asyncio.to_thread` lets it. Blocks may nest and overlap.

    Args:
        inputs: keep what every layer read, too, as losses of samples need it: (tokens, width) for
            each layer, while the block runs.

    Example:
        with sc.trace(model) as routing:
            model(input_ids)
        routing["model.layers.0.mlp"].load_E()
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MoELayer) and module.router is not None
    }
    record = Record(layers, inputs)
    try:
        with RECORDS.opened(record):
            yield Trace(record)
    finally:
        record.closed = True
