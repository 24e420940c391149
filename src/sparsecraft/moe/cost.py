"""What a converted model costs: parameters, active parameters, FLOPs and bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import nn

from sparsecraft.moe.experts.split import SplitExperts
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.names import dense_name
from sparsecraft.moe.routers.domain import DomainScorer


@dataclass(frozen=True, slots=True)
class Cost:
    """Parameter counts; each tied tensor counts once.

    Attributes:
        total: all parameters.
        new: those that the dense model does not have, in its order or, dealt out, in another.
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
    idle = sum(_idle(module) for module in model.modules() if isinstance(module, MoELayer))
    repeated = sum(_repeated(module) for module in model.modules() if isinstance(module, MoELayer))
    total = sum(_numel(p) for p in parameters.values())
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    tied = getattr(model.config, "tie_word_embeddings", False)
    looked_up = 0 if embedding is None or tied else sum(p.numel() for p in embedding.parameters())
    return Cost(
        total=total,
        new=sum(_numel(p) for name, p in parameters.items() if dense_name(model, name) is None)
        - sum(_dealt_out(module) for module in model.modules() if isinstance(module, MoELayer)),
        trainable=sum(_numel(p) for p in parameters.values() if p.requires_grad),
        active=total - idle,
        flops_per_token=2 * (total - idle - looked_up + repeated - _precomputed(model)),
    )


def _dealt_out(layer: MoELayer) -> int:
    """Parameters of a split network, which are the dense one's."""
    if layer.place != "replace" or not isinstance(layer.experts, SplitExperts):
        return 0
    return sum(p.numel() for p in layer.experts.parameters())


def _idle(layer: MoELayer) -> int:
    """Expert parameters of one layer that a token leaves untouched."""
    if isinstance(layer.experts, SplitExperts):
        return _idle_parts(layer)
    if layer.router is None or layer.router.spec.top_k is None or layer.experts.merges:
        return 0
    bank = sum(p.numel() for p in layer.experts.parameters())
    return bank * (layer.experts.num_experts - layer.router.spec.top_k) // layer.experts.num_experts


def _idle_parts(layer: MoELayer) -> int:
    """Of a split network: experts that do not run, and of a Linear and its imitation the other."""
    router = 0 if layer.router is None else sum(p.numel() for p in layer.router.parameters())
    if layer.place == "imitate" and not layer.imitates:
        return router + sum(p.numel() for p in layer.experts.parameters())
    asked = layer.router is not None and layer.router.runs != "every"
    router = 0 if asked else router
    base = 0 if layer.base is None else sum(_numel(p) for p in layer.base.parameters())
    return router + base + round((1 - active_share(layer)) * layer.experts.products)


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
    """What a token meets beyond the parameters: LoRAs inside a network, in every further slot, and
    a similarity router's centers, which are no parameters."""
    if isinstance(layer.experts, SplitExperts) and layer.router and layer.router.runs == "sparse":
        return sum(b.numel() for b in layer.router.buffers())
    if layer.place != "inside" or layer.router is None:
        return 0
    slots = layer.router.spec.top_k or layer.experts.num_experts
    return (slots - 1) * sum(p.numel() for p in layer.experts.parameters())


def _precomputed(model: nn.Module) -> int:
    """Parameters that give the rows of routers once for all tokens, less those rows."""
    scorers = [module for module in model.modules() if isinstance(module, DomainScorer)]
    return sum(
        sum(p.numel() for p in scorer.parameters()) - len(scorer.domains) * scorer.width
        for scorer in scorers
    )


def _numel(parameter: nn.Parameter) -> int:
    """Values, not storage: a 4-bit weight keeps two in each byte."""
    return 2 * parameter.numel() if parameter.dtype == torch.uint8 else parameter.numel()


def bytes_of(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
