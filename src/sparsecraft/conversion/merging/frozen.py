"""Routing that is the same for every token: weights that are given or measured, and held.

Shapes: T tokens, E experts, B sequences, S positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.dense.tokens import is_encoder_decoder
from sparsecraft.errors import MergeError, did_you_mean
from sparsecraft.moe.context import sentence_width
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.masks import of_frames, of_rows
from sparsecraft.moe.outputs import decoder_ids, outputs
from sparsecraft.moe.routers.router import Router
from sparsecraft.moe.routing import Routing, spread
from sparsecraft.moe.tracing import trace

# How far from one the weights may sum where the router's own always do.
SUM_TOLERANCE = 1e-6


class FrozenRouter(nn.Module):
    """Gives every token, or every head of every token, the same weights."""

    runs = "sparse"

    def __init__(self, router: Router, weights_E: Tensor):
        super().__init__()
        self.spec, self.width = router.spec, router.scorer.width
        self.weights_E = weights_E.float()

    def forward(self, x: Tensor, batch: Any = None) -> Routing:
        per_row = self.width if self.spec.by_head else x.shape[-1]
        T, E = x.numel() // per_row, len(self.weights_E)
        weights_TE = self.weights_E.to(x.device).expand(T, E)
        indices_E = torch.arange(E, device=x.device)
        indices_TE = indices_E.expand(T, E)
        known = self.spec.sums_to_one
        return Routing(weights_TE, indices_TE, torch.zeros_like(weights_TE), known)


@contextmanager
def frozen_routing(layers: Mapping[MoELayer, Tensor]) -> Iterator[None]:
    """Let the routers of some layers give constant weights (E,) inside the block."""
    routers = {layer: layer.router for layer in layers}
    try:
        for layer, weights_E in layers.items():
            layer.router = FrozenRouter(layer.router, weights_E)
        yield
    finally:
        for layer, router in routers.items():
            layer.router = router


def measured_weights(model: nn.Module, batches: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
    """Layer name -> mean routing weight of each expert over all tokens, (E,) float64.

    Padding is left out: where `attention_mask` is 0, and in a decoder beside an encoder where
    `decoder_attention_mask` is 0 or, without one, labels are -100.

    Raises:
        MergeError: no batch, one without the sentence embeddings that the routers read, or a mask
            of other tokens than a layer's.
    """
    sums: dict[str, Tensor] = {}
    for batch in batches:
        if sentence_width(model) and "sentence_embeddings" not in batch:
            raise MergeError(
                "The routers decide by sentence and the data has no embeddings; pass batches with "
                "sentence_embeddings, or give the weights."
            )
        batch, masks = _with_decoder(model, batch)
        with trace(model) as routing:
            outputs(model, [batch])
        for name, found in routing.items():
            weights_TE = found.weights_TE().double().cpu()
            layer = model.get_submodule(name)
            mask = masks.get(layer.reads)
            if mask is not None:
                real_T = _real(name, layer, found.shape, mask)
                weights_TE = weights_TE[spread(real_T, len(weights_TE), found.heads)]
            sums[name] = sums.get(name, 0) + torch.cat(
                [weights_TE.sum(0), torch.tensor([len(weights_TE)], dtype=torch.float64)]
            )
    if not sums:
        raise MergeError("weights='measured' needs data with at least one batch; pass data=...")
    return {name: total[:-1] / total[-1] for name, total in sums.items()}


def _with_decoder(
    model: nn.Module, batch: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
    """The batch with its decoder's tokens; for what layers read, which tokens are real."""
    mask = batch.get("attention_mask")
    masks = {"input": None if mask is None else of_frames(model, mask)}
    if not is_encoder_decoder(model):
        return batch, masks
    labels, mask = batch.get("labels"), batch.get("decoder_attention_mask")
    if labels is not None:
        ids = decoder_ids(model, labels.to(model.device))
        batch = {"decoder_input_ids": ids, **batch}
        mask = labels != -100 if mask is None else mask
    elif mask is None and "decoder_input_ids" not in batch:
        mask = masks["input"]  # `outputs` gives the decoder the encoder's tokens
    return batch, masks | {"decoder": mask}


def _real(name: str, layer: MoELayer, shape: torch.Size, mask: Tensor) -> Tensor:
    """Which of the tokens that a layer routed are real, (T,)."""
    real_T = of_rows(mask, shape, layer.sequence_first)
    if real_T is None:
        raise MergeError(
            f"The mask of the tokens that {name!r} reads has shape {tuple(mask.shape)}, and it "
            f"routed {shape.numel()} rows; give attention_mask (or a decoder's labels) one "
            "value for each token (batch, positions)."
        )
    return real_T.bool().cpu()


def given_weights(layers: Mapping[str, MoELayer], weights: Any) -> dict[str, Tensor]:
    """Layer name -> weights (E,) float64, for every layer of `layers`.

    Args:
        weights: a weight for each expert, the same in all layers; or a dict layer name -> weights.

    Raises:
        MergeError: a layer without weights, a name without layer, or weights that do not fit.
    """
    if not layers:
        raise MergeError(
            "No layer of this model mixes several experts, so that there is no routing to fix; "
            "use how='exact'."
        )
    if not isinstance(weights, Mapping):
        weights = dict.fromkeys(layers, weights)
    for name in weights:
        if name not in layers:
            raise MergeError(f"No routed layer is called {name!r}." + did_you_mean(name, layers))
    if missing := sorted(set(layers) - set(weights)):
        raise MergeError(
            f"weights says nothing about {len(missing)} of {len(layers)} routed layers, "
            f"{missing[0]!r} among them; give all of them."
        )
    return {name: _checked(name, layer, weights[name]) for name, layer in layers.items()}


def _checked(name: str, layer: MoELayer, weights: Any) -> Tensor:
    try:
        weights_E = torch.as_tensor(weights, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise MergeError(f"weights of {name!r} are {weights!r}; they must be numbers.") from None
    E = layer.experts.num_experts
    if tuple(weights_E.shape) != (E,):
        raise MergeError(
            f"weights of {name!r} have shape {list(weights_E.shape)} and the layer has {E} "
            "experts; give one weight for each."
        )
    total = weights_E.sum().item()
    if not math.isfinite(total) or weights_E.min() < 0:
        raise MergeError(f"weights of {name!r} are {weights_E.tolist()}; none may be negative.")
    if layer.router.spec.sums_to_one and abs(total - 1) > SUM_TOLERANCE:
        raise MergeError(
            f"weights of {name!r} sum to {total:.6f}, and those of its router always to one; "
            "scale them so that they do."
        )
    return weights_E
