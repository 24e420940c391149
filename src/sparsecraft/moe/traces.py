"""Record: what a `trace` block notes of its layers' routers; Trace: what users see of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from sparsecraft.moe.routing import Routing
from sparsecraft.moe.scopes import Blocks

RECORDS = Blocks("traces")


class Record:
    """The latest routing of each layer, overwritten by every forward pass of the block's thread.

    Attributes:
        names: layer -> name.
        routings: name -> routing; None where there was no pass.
        inputs: whether what the layers read is kept beside it.
        closed: whatever still runs in the block's context, such as a task that outlives it.
    """

    def __init__(self, layers: Mapping[str, nn.Module], inputs: bool = False):
        self.inputs = inputs
        self.names = {layer: name for name, layer in layers.items()}
        self.routings: dict[str, Routing | None] = dict.fromkeys(layers)
        self.closed = False

    def is_open(self) -> bool:
        """Whether the block is open for the code that asks."""
        return not self.closed and any(record is self for record in RECORDS.now())

    def note(self, layer: nn.Module, routing: Routing, x: Tensor) -> None:
        """Keep the routing of tokens x (..., D)."""
        rows = len(routing.logits_TE)
        inputs_TD = x.detach().reshape(rows, -1) if self.inputs else None
        kept = replace(routing, shape=x.shape[:-1], inputs_TD=inputs_TD)
        self.routings[self.names[layer]] = kept


def records_of(layer: nn.Module) -> list[Record]:
    """Those that note what a layer does now."""
    return [record for record in RECORDS.now() if not record.closed and layer in record.names]


class Trace(Mapping[str, Routing]):
    """Layer name -> the routing of that layer's latest forward pass."""

    def __init__(self, record: Record):
        self.record = record

    def __getitem__(self, name: str) -> Routing:
        routing = self.record.routings[name]
        if routing is None:
            raise KeyError(name)
        return routing

    def __iter__(self) -> Iterator[str]:
        return (name for name, routing in [*self.record.routings.items()] if routing is not None)

    def __len__(self) -> int:
        return sum(routing is not None for routing in self.record.routings.values())
