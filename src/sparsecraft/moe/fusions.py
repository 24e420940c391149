"""Faster ways through a layer, where router, experts and dense module share products.

Each is a free function that equals its place's own in `sparsecraft.moe.places`, forward and
backward, and is tested so. Only here does anything ask which kinds of parts stand together.

Shapes: T tokens, I input features, O output features, E experts, N rows of all A of LoRAs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsecraft.kernels.projections import (
    ScaledLinear,
    is_plain,
    is_watched,
    joins,
    project,
    scales_in_chunks,
)
from sparsecraft.moe import operators
from sparsecraft.moe.experts.ffn import FFNExperts
from sparsecraft.moe.experts.lora import LoRAExperts
from sparsecraft.moe.experts.split import SplitExperts
from sparsecraft.moe.experts.vector import VectorExperts
from sparsecraft.moe.joined import JoinedLoRAs, JoinedVectors
from sparsecraft.moe.places import flat
from sparsecraft.moe.routers.router import Router
from sparsecraft.moe.traces import records_of
from sparsecraft.recipe.selections import Soft

if TYPE_CHECKING:
    from sparsecraft.moe.layer import MoELayer


def faster(layer: MoELayer, x: Tensor) -> Callable | None:
    """What the layer does instead of its place's own function; None if nothing.

    It runs at every call of every layer: one match, no tensor, nothing that stops a compiler.
    """
    bank = layer.experts
    through = layer.router is not None and layer.router.spec.through
    if bank.dispatch == "loop" or through or is_watched(bank):
        return None
    if layer.joined is not None and _runs_joined(layer):
        return joined
    match layer.place, bank:
        case "beside", LoRAExperts() if merges(layer):
            alone = layer.router is None and layer.modality is None and not layer.rows
            return single_lora if alone and not torch.is_grad_enabled() else lora_beside
        case "after", VectorExperts() if isinstance(layer.base, nn.Linear):
            return vector_after
        case (("replace" | "imitate"), SplitExperts()) if unrecorded(layer):
            return operators.run if operators.stands_alone(layer) else parts_in_use
        case "replace", FFNExperts() if operators.stands_alone(layer) and unrecorded(layer):
            # The compiler has a better form for a single token alone: `kernels.few`.
            return operators.run if x.numel() > x.shape[-1] else None
    return None


def joined(layer: MoELayer, x: Tensor, *args, **kwargs) -> Tensor:
    """The place's own function by stacked tensors, which are stacked anew once they are others."""
    stack = layer.joined
    if stack.made_of != stack.stands_for(layer):
        stack = layer.joined = join(layer)
    return stack(layer, x, *args, **kwargs)


def _runs_joined(layer: MoELayer) -> bool:
    """Whether nothing asks for more than the layer's output, and no compiler, which would take the
    stacked tensors for good."""
    if torch.is_grad_enabled() or layer.training or torch.compiler.is_compiling():
        return False
    router = layer.router
    return not (records_of(layer) or is_watched(router) or is_watched(router.scorer))


def join(layer: MoELayer) -> nn.Module | None:
    """The layer's tensors stacked for inference; None where it has no such form."""
    bank = layer.experts
    if not (bank.runs_merged and _soft_by_token(layer)):
        return None
    router_EI = layer.router.scores_of_input()
    match layer.place, bank:
        case "beside", LoRAExperts():
            made = JoinedLoRAs(bank.lora_A, bank.lora_B * bank.scale, router_EI)
        case "after", VectorExperts():
            made = JoinedVectors(bank.vectors, router_EI)
        case _:
            return None
    made.made_of = made.stands_for(layer)
    return made


def _soft_by_token(layer: MoELayer) -> bool:
    """Whether each token's weights are the softmax of one product with the layer's input."""
    router = layer.router
    if type(router) is not Router or layer.rows is not None or layer.modality is not None:
        return False
    spec = router.spec
    plain = spec.standardize is None and spec.temperature == 1 and not spec.gates_base
    soft = isinstance(spec.select, Soft) and spec.reads == "input"
    return plain and soft and router.scores_of_input() is not None


def merges(layer: MoELayer) -> bool:
    """Whether LoRAs are added as one update, onto the dense module's output."""
    router = layer.router
    if router is None:
        return layer.modality is None or layer.experts.runs_merged
    reads_tokens = router.spec.reads != "experts" and not router.spec.mixes_tokens
    return reads_tokens and layer.experts.runs_merged


def unrecorded(layer: MoELayer) -> bool:
    """Whether the parts in use run by themselves, and nothing asks which they were."""
    return layer.asks_router and not records_of(layer) and not is_watched(layer.router)


def lora_beside(layer: MoELayer, x: Tensor, *args, **kwargs) -> Tensor:
    """`places.beside` with the rows of all A and the router's scores in one product, and the update
    in one more, onto what the dense module gave."""
    bank, base = layer.experts, layer.base
    x, z_TN, scores_TE = _read_together(layer, x, _rows(bank))
    y = layer.run_base(x, *args, **kwargs)
    # Nothing else holds what a plain Linear has just computed: the update can be added to it.
    own = not layer.rows and is_plain(base, nn.Linear)

    def add(part: Tensor) -> Tensor:
        routing = layer.route(x, part, scores_TE)
        weights_TE = None if routing is None else routing.weights_TE()
        added = bank.added(flat(part), flat(x), weights_TE, z_TN, in_place=own)
        return added.reshape(part.shape)

    return layer.on_rows(y, add)


def single_lora(layer: MoELayer, x: Tensor, *args, **kwargs) -> Tensor:
    """`places.beside` of one LoRA that no router weighs, without gradients."""
    y = layer.run_base(x, *args, **kwargs)
    own = is_plain(layer.base, nn.Linear)

    def add(part: Tensor) -> Tensor:
        return layer.experts.added(flat(part), flat(x), None, in_place=own).view(part.shape)

    return layer.on_rows(y, add)


def vector_after(layer: MoELayer, x: Tensor, *args, **kwargs) -> Tensor:
    """`places.after` with the router's scores beside the Linear's own product, or the Linear and
    the vectors as one."""
    x, _, scores_TE = _read_together(layer, x, None)
    if _scales(layer, x):
        routing = layer.route(x, None, scores_TE)
        return ScaledLinear.apply(
            x, layer.base.weight, layer.base.bias, routing.weights_TE(), layer.experts.vectors,
            routing.sums_to_one,
        )  # fmt: skip
    y = layer.base(x, *args, **kwargs)
    return layer.on_rows(y, lambda part: layer.mix(part, layer.route(x, part, scores_TE)))


def parts_in_use(layer: MoELayer, x: Tensor, *args, **kwargs) -> Tensor:
    """`places.replace` of a split network: the parts that the router weighs, without a record of
    the decision."""
    y_TO = layer.experts.routed(flat(x), layer.router.weigh)
    return y_TO.reshape(*x.shape[:-1], y_TO.shape[-1])


def _rows(bank: LoRAExperts) -> Tensor | None:
    """The matrix (N, I) whose product with each token is all that the bank reads of it, if so."""
    if (bank.dropout and bank.training) or not bank.runs_merged:
        return None
    return bank.lora_A.flatten(0, 1)


def _read_together(
    layer: MoELayer, x: Tensor, rows_NI: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x for the base, and what experts and router read of it, where one product gives both."""
    router, base = layer.router, layer.base
    scores_EI = router.scores_of_input() if type(router) is Router else None
    if not isinstance(base, nn.Linear) or not joins(x, rows_NI, scores_EI):
        return x, None, None
    return project(x, rows_NI, scores_EI, own_gradient=is_plain(base, nn.Linear))


def _scales(layer: MoELayer, x: Tensor) -> bool:
    """Whether the base and the vectors after it run as one."""
    router = layer.router
    if layer.rows or layer.modality or type(router) is not Router:
        return False
    bank = layer.experts
    if type(bank) is not VectorExperts or not bank.runs_merged:
        return False
    return router.spec.reads == "input" and scales_in_chunks(x, layer.base, bank.vectors)
