"""Faster ways through a layer, where router, experts and dense module share products.

Each equals the place's own function in `sparsecraft.moe.places`, forward and backward. Only here
does anything ask which kinds of parts stand together.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from sparsecraft.kernels.projections import ScaledLinear, is_plain, joins, project, scales_in_chunks
from sparsecraft.moe.experts.lora import LoRAExperts
from sparsecraft.moe.experts.split import SplitExperts
from sparsecraft.moe.experts.vector import VectorExperts
from sparsecraft.moe.places import flat
from sparsecraft.moe.routers.router import Router


def faster(layer, x: Tensor) -> Callable | None:
    """What the layer can do instead of its place's own function on x; None if nothing."""
    match layer.place, layer.experts:
        case "beside", LoRAExperts() if not layer.mixes_slots and merges(layer):
            return lora_beside
        case "after", VectorExperts() if isinstance(layer.base, nn.Linear):
            return vector_after
        case (("replace" | "imitate"), SplitExperts()) if sparse(layer):
            return parts_in_use
    return None


def merges(layer) -> bool:
    """Whether LoRAs are added as one update, onto the dense module's output."""
    single = layer.router is None and layer.modality is None
    return single or layer.experts.runs_merged


def sparse(layer) -> bool:
    """Whether only the parts in use run, and nobody asks which they were."""
    runs = layer.place == "replace" or layer.imitates
    return runs and layer.router is not None and not (layer.runs_whole or layer.tracing)


def lora_beside(layer, x: Tensor, *args, **kwargs) -> Tensor:
    """The rows of all A and the router's scores in one product, the update in one more."""
    bank, base = layer.experts, layer.base
    x, z_TN, scores_TE = _read_together(layer, x, _rows(bank))
    y = base(x, *args, **kwargs)
    if layer.router is not None and layer.router.spec.gates_base:
        y = y * layer.router.gate_base(x)
    # Nobody else holds what a plain Linear has just computed: the update can be added to it.
    own = not layer.rows and is_plain(base, nn.Linear)

    def add(part: Tensor) -> Tensor:
        routing = layer.route(x, part, scores_TE)
        weights_TE = None if routing is None else routing.weights_TE()
        added = bank.added(flat(part), flat(x), weights_TE, z_TN, in_place=own)
        return added.reshape(part.shape)

    return layer.on_rows(y, add)


def vector_after(layer, x: Tensor, *args, **kwargs) -> Tensor:
    """The router's scores beside the Linear's own product, or both and the vectors as one."""
    bank = layer.experts
    x, _, scores_TE = _read_together(layer, x, None)
    if _scales(layer, x):
        routing = layer.route(x, None, scores_TE)
        weights_SE = routing.weights_TE()
        return ScaledLinear.apply(
            x, layer.base.weight, layer.base.bias, weights_SE, bank.vectors, routing.sums_to_one
        )
    y = layer.base(x, *args, **kwargs)
    return layer.on_rows(y, lambda part: layer.mix(part, layer.route(x, part, scores_TE)))


def parts_in_use(layer, x: Tensor, *args, **kwargs) -> Tensor:
    """The parts of a split network that the router weighs, without a record of the decision."""
    y_TO = layer.experts.routed(flat(x), layer.router.weigh)
    return y_TO.reshape(*x.shape[:-1], y_TO.shape[-1])


def _rows(bank: LoRAExperts) -> Tensor | None:
    """The matrix (N, I) whose product with each token is all that the bank reads of it, if so."""
    if (bank.dropout and bank.training) or not bank.runs_merged:
        return None
    return bank.lora_A.flatten(0, 1)


def _read_together(
    layer, x: Tensor, rows_NI: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x for the base, and what experts and router read of it, where one product gives both."""
    plain = type(layer.router) is Router
    scores_EI = layer.router.scores_of_input() if plain else None
    if not isinstance(layer.base, nn.Linear) or not joins(x, rows_NI, scores_EI):
        return x, None, None
    return project(x, rows_NI, scores_EI, own_gradient=is_plain(layer.base, nn.Linear))


def _scales(layer, x: Tensor) -> bool:
    """Whether the base and the vectors after it run as one."""
    bank, router = layer.experts, layer.router
    whole = not (layer.rows or layer.modality) and type(router) is Router
    if not whole or not bank.runs_merged or type(bank) is not VectorExperts:
        return False
    return router.spec.reads == "input" and scales_in_chunks(x, layer.base, bank.vectors)
