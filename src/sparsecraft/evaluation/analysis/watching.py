"""The decisions of every router in a model: of our layers, and of the mixtures that transformers
has itself (Mixtral, Qwen-MoE, OLMoE, Granite, gpt-oss and their kin)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.routers.gate import Gate
from sparsecraft.moe.routing import Routing
from sparsecraft.moe.tracing import trace

ROUTER = "router_logits"  # what transformers' models call what their routers give


@dataclass(frozen=True, slots=True)
class Watched:
    """A layer with a router.

    Attributes:
        router: what scores tokens.
        experts: the bank of experts, whose parameters are stacked where `stacked` says so.
        stacked: whether they are (E, ...).
        splits: whether its experts are the parts of one network.
        ours: whether it is a layer of ours.
    """

    router: nn.Module
    experts: nn.Module
    stacked: bool
    splits: bool
    ours: bool


def routed_layers(model: nn.Module) -> dict[str, Watched]:
    """Name -> layer, in the model's order."""
    ours = {
        name: Watched(layer.router, layer.experts, True, isinstance(layer.router, Gate), True)
        for name, layer in model.named_modules()
        if isinstance(layer, MoELayer) and layer.router is not None
    }
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    found = ours | _mixtures(model)
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def _mixtures(model: nn.Module) -> dict[str, Watched]:
    """Those of transformers: a block that holds a router of the class that its model records, and a
    bank that takes indices and weights."""
    kinds: set[type] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            recorded = (getattr(module, "_can_record_outputs", None) or {}).get(ROUTER, ())
            listed = recorded if isinstance(recorded, list | tuple) else (recorded,)
            kinds |= {getattr(each, "target_class", each) for each in listed}
    found = {}
    for name, router in model.named_modules():
        if type(router) not in kinds:
            continue
        block = name.rpartition(".")[0]
        experts = getattr(model.get_submodule(block), "experts", None)
        takes = inspect.signature(experts.forward).parameters if experts else ()
        if isinstance(experts, nn.Module) and len(takes) == 3:  # tokens, indices, weights
            count = getattr(experts, "num_experts", 0)
            sizes = [len(p) for p in experts.parameters()]
            stacked = bool(sizes) and all(size == count for size in sizes)
            found[block] = Watched(router, experts, stacked, False, False)
    return found


@contextmanager
def decisions(model: nn.Module) -> Iterator[Mapping[str, Routing]]:
    """Layer name -> its routing in the latest forward pass, while the block runs."""
    found: dict[str, Routing] = {}
    logits: dict[str, Tensor] = {}
    handles = []
    for name, layer in _mixtures(model).items():

        def scored(router: nn.Module, args: tuple, output, name: str = name) -> None:
            logits[name] = output[0] if isinstance(output, tuple) else output

        def chosen(experts: nn.Module, args: tuple, name: str = name) -> None:
            _, indices_TK, weights_TK = args
            logits_TE = logits[name].detach().float().reshape(len(indices_TK), -1)
            found[name] = Routing(weights_TK.detach().float(), indices_TK, logits_TE)

        handles.append(layer.router.register_forward_hook(scored))
        handles.append(layer.experts.register_forward_pre_hook(chosen))
    try:
        with trace(model) as ours:
            yield _Both(ours, found)
    finally:
        for handle in handles:
            handle.remove()


class _Both(Mapping[str, Routing]):
    """What two mappings hold."""

    def __init__(self, *parts: Mapping[str, Routing]):
        self.parts = parts

    def __getitem__(self, name: str) -> Routing:
        for part in self.parts:
            if name in part:
                return part[name]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for part in self.parts for name in part)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)


def scores_of(layer: Watched, routing: Routing) -> Tensor | None:
    """Each token's probabilities of the experts (T, E): the softmax of their scores. None for the
    parts of a split network, whose scores are no alternatives."""
    if layer.splits:
        return None
    return torch.softmax(routing.logits_TE.float(), -1)
