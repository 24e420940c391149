"""What a converted model costs: parameters, active parameters, FLOPs and bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import nn

from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.names import dense_name
from sparsecraft.moe.routers.gate import Gate


@dataclass(frozen=True, slots=True)
class Cost:
    """Parameter counts; each tied tensor counts once.

    Attributes:
        total: all parameters.
        new: those that the dense model does not have, in its order or, split, in another.
        trainable: those that require gradients.
        active: those that one token meets; K of E experts per routed layer, and all of experts
            that are mixed before they meet it (LoRAs, vectors), whatever their weights.
        flops_per_token: multiply-adds times two of all matrices that one token meets in a
            forward pass, without attention scores and without the embedding lookup.
    """

    total: int
    new: int
    trainable: int
    active: int
    flops_per_token: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def count(model: nn.Module) -> Cost:
    """Count the parameters of a dense or converted model."""
    parameters = dict(model.named_parameters())
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    idle, repeated = sum(map(_idle, layers)), sum(map(_repeated, layers))
    precomputed = sum(layer.router.scorer.precomputed for layer in layers if layer.router)
    total = sum(_numel(p) for p in parameters.values())
    embedding = model.get_input_embeddings()
    tied = getattr(model.config, "tie_word_embeddings", False)
    looked_up = 0 if embedding is None or tied else sum(p.numel() for p in embedding.parameters())
    return Cost(
        total=total,
        new=sum(_numel(p) for name, p in parameters.items() if dense_name(model, name) is None)
        - sum(_size(layer.experts) for layer in layers if layer.experts.of_dense),
        trainable=sum(_numel(p) for p in parameters.values() if p.requires_grad),
        active=total - idle,
        flops_per_token=2 * (total - idle - looked_up + repeated - precomputed),
    )


def _idle(layer: MoELayer) -> int:
    """Parameters of one layer that a token leaves untouched: of its experts, of a router that is
    not asked, and of a base that its imitation runs instead of."""
    bank, router, base = layer.experts, layer.router, layer.base
    idle = _size(bank) - (bank.active(slots_of(layer)) if layer.runs_experts else 0)
    if router is not None and not layer.asks_router:
        idle += _size(router)
    if base is not None and not layer.runs_base:
        idle += sum(_numel(p) for p in base.parameters())
    return idle


def slots_of(layer: MoELayer) -> float:
    """How many experts of the layer a token meets, on the average."""
    count, router = layer.experts.num_experts, layer.router
    if isinstance(router, Gate):
        return active_share(layer) * count
    return count if router is None or router.spec.slots is None else router.spec.slots


def active_share(layer: MoELayer) -> float:
    """Share of the experts of a split network that a token runs: as its budget says, and all where
    nothing was measured."""
    gate = layer.router
    return 1.0 if gate is None or gate.runs != "sparse" or gate.share is None else gate.share


def split_flops(layer: MoELayer, share: float | None = None) -> int:
    """Multiply-adds times two of a split network for one token, its router included:
    2 (router + share * (G + 1) F D), G = 2 with a gate; the whole network where share is 1.

    Args:
        share: of the experts that run; None takes the budget's.
    """
    share = active_share(layer) if share is None else share
    router = 0 if share == 1 or layer.router is None else layer.router.products
    return round(2 * (router + share * layer.experts.products))


def _repeated(layer: MoELayer) -> int:
    """What a token meets beyond the parameters, once each: experts that it meets again in every
    slot, a router that is asked again for every head, and a similarity router's centers, which are
    no parameters."""
    bank, router = layer.experts, layer.router
    gated = isinstance(router, Gate) and router.runs == "sparse"
    centers = sum(b.numel() for b in router.buffers()) if gated else 0
    again = 0 if router is None else router.repeated(bank.out_features)
    return centers + again + bank.repeated(slots_of(layer))


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _numel(parameter: nn.Parameter) -> int:
    """Values, not storage: a 4-bit weight keeps two in each byte."""
    return 2 * parameter.numel() if parameter.dtype == torch.uint8 else parameter.numel()


def bytes_of(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
