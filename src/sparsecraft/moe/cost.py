"""What a converted model costs: parameters, active parameters, FLOPs and bytes."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import asdict, dataclass

import torch
from torch import nn

from sparsecraft.dense.mixtures import mixtures, tensors
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.names import dense_name
from sparsecraft.moe.routers.gate import Gate

# In the names of parameters that are no module's `weight`, what tables of rows are called.
TABLES = ("position", "token", "relative", "embed", "probe")


@dataclass(frozen=True, slots=True)
class Cost:
    """Parameter counts; each tied tensor counts once.

    Attributes:
        total: all parameters.
        new: those that the dense model does not have, in its order or, split, in another.
        trainable: those that require gradients.
        active: those that one token meets; K of E experts per routed layer, ours and the dense
            model's own, and all of experts that are mixed before they meet it (LoRAs, vectors),
            whatever their weights.
        flops_per_token: multiply-adds times two of all matrices that one token meets in a
            forward pass: without attention scores, norms, biases, and tables such as embeddings
            and positions, of which it looks a row up.
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
    shares = _own_shares(model, [layer.experts for layer in layers])
    own = sum(_numel(p) - _share(p, shares) for p in parameters.values())
    active = total - idle - own
    added = sum(_share(p, shares) for p in _unmultiplied(model, layers, shares).values())
    biases = sum(la.experts.biases(slots_of(la)) for la in layers if la.runs_experts)
    return Cost(
        total=total,
        new=sum(_numel(p) for name, p in parameters.items() if dense_name(model, name) is None)
        - sum(_size(layer.experts) for layer in layers if layer.experts.of_dense),
        trainable=sum(_numel(p) for p in parameters.values() if p.requires_grad),
        active=active,
        flops_per_token=2 * (active - added - biases + repeated - precomputed),
    )


def _own_shares(model: nn.Module, ours: list[nn.Module]) -> dict[int, tuple[int, int]]:
    """id of a parameter -> (K, E), for the experts of mixtures that the dense model has itself."""
    skipped = {id(parameter) for bank in ours for parameter in bank.parameters()}
    return {
        id(parameter): (mixture.top_k, mixture.num_experts)
        for mixture in mixtures(model)
        for parameter in tensors(model, mixture)
        if id(parameter) not in skipped
    }


def _share(parameter: nn.Parameter, shares: dict[int, tuple[int, int]]) -> int:
    """How many of its values a token meets, on the average."""
    k, count = shares.get(id(parameter), (1, 1))
    return _numel(parameter) * k // count


def _unmultiplied(
    model: nn.Module, layers: list[MoELayer], experts: Container[int]
) -> dict[int, nn.Parameter]:
    """The parameters that no matrix product reads, by their ids: norms, biases, and tables of
    which a token looks one row up, unless the rows are experts. Our experts, our routers and what
    does not run are left out."""
    apart = [part for la in layers for part in (la.experts, la.router) if part is not None]
    apart += [la.base for la in layers if la.base is not None and not la.runs_base]
    skipped = {id(p) for part in apart for p in part.parameters()}
    found, products = {}, set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            table = isinstance(module, nn.Embedding) or any(word in name for word in TABLES)
            table = table and id(parameter) not in experts
            if parameter.ndim < 2 or table or name.endswith("bias"):
                found[id(parameter)] = parameter
            else:
                products.add(id(parameter))  # such as a head that shares the embedding
    return {key: p for key, p in found.items() if key not in products | skipped}


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


def experts_of(model: nn.Module) -> list[tuple[int, float]]:
    """(E, K) of every layer with a router, ours and the dense model's own: its experts, and how
    many of them a token meets, on the average."""
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    skipped = {id(p) for layer in layers for p in layer.experts.parameters()}
    own = {
        mixture.owner: (mixture.num_experts, mixture.top_k)
        for mixture in mixtures(model)
        if not any(id(parameter) in skipped for parameter in tensors(model, mixture))
    }
    ours = [(la.experts.num_experts, slots_of(la)) for la in layers if la.router is not None]
    return [*ours, *own.values()]


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
