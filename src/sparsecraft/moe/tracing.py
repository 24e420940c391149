"""trace(): what every router decided in the latest forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from sparsecraft.moe.routing import Routing


class Trace(Mapping[str, Routing]):
    """Layer name -> the routing of that layer's latest forward pass."""

    def __init__(self, layers: dict[str, nn.Module]):
        self._layers = layers
        self._final: dict[str, Routing] | None = None
        self._before = {name: layer.routing for name, layer in layers.items()}

    def _routings(self) -> dict[str, Routing]:
        if self._final is not None:
            return self._final
        return {n: layer.routing for n, layer in self._layers.items() if layer.routing is not None}

    def __getitem__(self, name: str) -> Routing:
        return self._routings()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._routings())

    def __len__(self) -> int:
        return len(self._routings())

    def close(self) -> None:
        """Freeze the record; others of the same layers go on, and have what they had if no pass
        came since."""
        self._final = self._routings()
        for name, layer in self._layers.items():
            layer.tracing -= 1
            if not layer.tracing:
                layer.routing = None
            elif layer.routing is None:
                layer.routing = self._before[name]


@contextmanager
def trace(model: nn.Module) -> Iterator[Trace]:
    """Record the `Routing` of every routed layer of `model` while the block runs.

    Each layer keeps its latest routing only (it is overwritten, never appended to), so that
    recomputation under activation checkpointing cannot count a token twice. The record is a
    plain attribute of the layer: a ContextVar would break `torch.compile` graphs.

    Example:
        with sc.trace(model) as routing:
            model(input_ids)
        routing["model.layers.0.mlp"].load_E()
    """
    from sparsecraft.moe.layer import MoELayer

    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MoELayer) and module.router is not None
    }
    record = Trace(layers)
    for layer in layers.values():
        layer.tracing, layer.routing = layer.tracing + 1, None
    try:
        yield record
    finally:
        record.close()
