"""One planned edit -> its layer: experts from the dense module, and a router."""

from __future__ import annotations

import torch
from torch import nn

from sparsecraft.dense.tokens import is_causal, is_sequence_first
from sparsecraft.errors import SurgeryError
from sparsecraft.moe.experts.base import Experts
from sparsecraft.moe.experts.build import build_experts
from sparsecraft.moe.init.banks import partition_of_weights
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.routers.build import build_router
from sparsecraft.moe.routers.gate import Gate
from sparsecraft.moe.routers.router import Router
from sparsecraft.surgery.plan import PlannedEdit


def build_layer(
    model: nn.Module,
    item: PlannedEdit,
    *,
    number: int = 0,
    device: torch.device | str | None = None,
) -> MoELayer:
    """The layer for one planned edit, without its base, on the donor's device by default.

    Args:
        number: of the planned edit, so that random partitions differ.
    """
    edit, site = item.edit, item.site
    experts, router = build_parts(model, item, number=number, device=device)
    layer = MoELayer(edit.place, experts, router, rows=site.rows, modality=edit.modality)
    layer.causal = is_causal(model, site.path)
    layer.reads = item.reads
    layer.sequence_first = is_sequence_first(model, site.path)
    return layer


def build_parts(
    model: nn.Module,
    item: PlannedEdit,
    *,
    number: int = 0,
    device: torch.device | str | None = None,
) -> tuple[Experts, nn.Module | None]:
    """The experts and the router of one planned edit; see `build_layer`."""
    edit, donor, site = item.edit, item.donor, item.site
    reference = donor.reference
    device = reference.device if device is None else device
    # Quantized donors hold integers; their tokens arrive in the model's floating dtype.
    dtype = reference.dtype if reference.is_floating_point() else model.dtype
    experts = build_experts(edit.experts, donor, site, edit.place, device=device, dtype=dtype)
    router = None
    if edit.experts.parts:
        if not experts.down.is_meta:
            experts.arrange(partition_of_weights(experts, number))
        router = edit.router and Gate(edit.router, experts)
    elif edit.router is not None:
        router = _router(model, item, experts, device=device, dtype=dtype)
    return experts, router


def new_router(model: nn.Module, item: PlannedEdit, layer: MoELayer) -> Router:
    """A new router of the planned edit for a layer that stands, like the one that it has."""
    like = next(layer.router.parameters())
    at = {"device": like.device, "dtype": like.dtype}
    return _router(model, item, layer.experts, **at).train(layer.router.training)


def _router(model: nn.Module, item: PlannedEdit, experts: Experts, **at) -> Router:
    width, spec = router_width(model, item), item.edit.router.in_layer(item.layer)
    key, before = item.previous or (None, None)
    at |= {"outputs": experts.out_features, "previous": before, "experts": item.edit.experts}
    router = build_router(spec, width, experts.num_experts, **at)
    router.key, router.previous = item.claim, key
    return router


def router_width(model: nn.Module, item: PlannedEdit) -> int:
    """Features of what the router scores."""
    router, donor = item.edit.router, item.donor
    if router.sentences:
        return router.sentences.dim
    if router.by_head:
        if not item.site.head_dim:
            raise SurgeryError(
                f"The attention at {item.site.owner!r} does not say how wide its heads are; use "
                "decides='token'."
            )
        return item.site.head_dim
    return donor.out_features if router.reads == "output" else donor.in_features
