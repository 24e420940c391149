"""Mixtures whose experts are merged before they meet the token (Zadouri et al. 2023, Eq. 2).

Each equals the weighted sum over experts, which a soft router would otherwise compute E times as
wide. Shapes: T tokens, E experts, I input features, O output features, R rank; S = T*heads rows
of weights, ordered (token, head), each for one of `heads` equal slices of H features.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsecraft.kernels.device import (
    as_sums,
    compute_dtype,
    is_few,
    is_followed,
    is_launched,
    is_transformed,
    needs_grad,
)
from sparsecraft.kernels.product import (
    add_lora,
    add_low_rank,
    fits_add_lora,
    low_rank,
    product,
)
from sparsecraft.kernels.projections import float32_product


class LoRAs(NamedTuple):
    """scale * B_e A_e dropout(x), for E experts.

    Attributes:
        a_ERI: (1, R, I) where the experts share one A.
        dropout: of the input, with one mask for all experts.
    """

    a_ERI: Tensor
    b_EOR: Tensor
    scale: float = 1.0
    dropout: float = 0.0


def mix_lora(
    x_TI: Tensor,
    weights_TE: Tensor | None,
    loras: LoRAs,
    onto: Tensor | None = None,
    in_place: bool = False,
    z_TN: Tensor | None = None,
) -> Tensor:
    """onto + scale * sum_e w_e B_e A_e dropout(x) as one low-rank update of rank E*R (MoLORA).

    The weights scale the bottleneck, where they commute with B.

    Args:
        weights_TE: None for a single expert with weight one.
        onto: (T, O); None for the update alone.
        in_place: nothing else holds `onto`, and the result may take its memory.
        z_TN: all A's rows times x, where they are known; N = E*R, or R with a shared A.
    """
    a_ERI, b_EOR, scale, dropout = loras
    x_TI = x_TI.to(compute_dtype(x_TI))
    if z_TN is None and dropout:
        x_TI = F.dropout(x_TI, dropout)
    if _is_few(x_TI, z_TN, weights_TE, loras, onto):
        return _mix_lora_few(x_TI, z_TN, weights_TE, loras, onto, in_place)
    if as_sums(x_TI):
        return _mix_lora_as_sums(x_TI, z_TN, weights_TE, loras, onto)
    if z_TN is None:
        z_TN = F.linear(x_TI, a_ERI.flatten(0, 1).to(x_TI.dtype))
    same = onto is not None and onto.dtype == x_TI.dtype
    if (
        same
        and not is_followed(onto, z_TN, b_EOR)
        and not needs_grad(onto, z_TN, weights_TE, b_EOR)
    ):
        return _added(onto, z_TN, weights_TE, b_EOR, scale, in_place)
    # The compiler decides about memory itself.
    if in_place and same and not torch.compiler.is_compiling() and not is_transformed():
        return _AddInPlace.apply(onto, z_TN, weights_TE, b_EOR, scale)
    if same:
        gated_TN = _gated(z_TN, _scaled(weights_TE, scale), b_EOR, x_TI.dtype)
        return torch.addmm(onto, gated_TN, _stacked(b_EOR, x_TI.dtype).t())
    update_TO = _update(z_TN, weights_TE, b_EOR, scale, x_TI.dtype)
    return update_TO if onto is None else onto + update_TO


def _added(onto, z_TN, weights_TE, b_EOR: Tensor, scale: float, in_place: bool) -> Tensor:
    """Without gradients: the scale costs no operation of its own."""
    gated_TN = _gated(z_TN, 1 if weights_TE is None else weights_TE, b_EOR, onto.dtype)
    run = onto.addmm_ if in_place else partial(torch.addmm, onto)
    return run(gated_TN, _stacked(b_EOR, onto.dtype).t(), alpha=scale)


def _update(z_TN: Tensor, weights_TE, b_EOR: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    gated_TN = _gated(z_TN, _scaled(weights_TE, scale), b_EOR, dtype)
    return F.linear(gated_TN, _stacked(b_EOR, dtype))


def _scaled(weights_TE: Tensor | None, scale: float) -> Tensor | float:
    if weights_TE is None:
        return scale
    return weights_TE if scale == 1 else weights_TE * scale


def _gated(z_TN: Tensor, gate_TE: Tensor | float, b_EOR: Tensor, dtype: torch.dtype) -> Tensor:
    """The bottleneck of all experts, each expert's ranks times its gate."""
    if isinstance(gate_TE, float | int):
        return (z_TN if gate_TE == 1 else z_TN * gate_TE).to(dtype)
    low_TER = z_TN.unflatten(1, (-1, b_EOR.shape[2]))  # a shared A has one row for all experts
    return (low_TER * gate_TE[..., None]).flatten(1).to(dtype)


def _stacked(b_EOR: Tensor, dtype: torch.dtype) -> Tensor:
    """All B side by side, (O, E*R)."""
    if len(b_EOR) == 1:  # its gradient has the strides of B, which the permuted one has not
        return b_EOR.to(dtype).flatten(0, 1)
    return b_EOR.to(dtype).permute(1, 0, 2).flatten(1)


def _as_b(grad_ON: Tensor, b_EOR: Tensor) -> Tensor:
    """The gradient of all B side by side as that of B, with its strides, which DDP's buckets have
    too; AccumulateGrad would copy any other."""
    E, O, R = b_EOR.shape
    if E == 1:
        return grad_ON.to(b_EOR.dtype)[None]
    grad_EOR = grad_ON.view(O, E, R).transpose(0, 1)
    return grad_EOR.to(b_EOR.dtype, memory_format=torch.contiguous_format)


def _is_few(x_TI: Tensor, z_TN, weights_TE, loras: LoRAs, onto) -> bool:
    if not is_few(x_TI) or not fits_add_lora(loras.b_EOR):
        return False
    if z_TN is None and weights_TE is None and is_launched(x_TI):
        return False  # two products of torch's own
    if needs_grad(x_TI, z_TN, weights_TE, loras.a_ERI, loras.b_EOR, onto):
        return False
    return onto is None or onto.dtype == x_TI.dtype


def _mix_lora_few(x_TI, z_TN, weights_TE, loras: LoRAs, onto, in_place: bool) -> Tensor:
    """Two launches; the parameters are read as they are, and the bottleneck stays in float32."""
    a_ERI, b_EOR, scale, _ = loras
    if z_TN is None:
        z_TN = float32_product(x_TI, a_ERI.flatten(0, 1))
    if onto is None:
        out_TO = x_TI.new_empty(x_TI.shape[0], b_EOR.shape[1])
    else:
        onto = onto.contiguous()
        out_TO = onto if in_place else torch.empty_like(onto)
    return add_lora(z_TN, weights_TE, b_EOR, scale, onto, out_TO)


def _mix_lora_as_sums(x_TI, z_TN, weights_TE, loras: LoRAs, onto) -> Tensor:
    """As `_mix_lora_few`; the update may become part of the product that it is added to, or of the
    compiler's own kernels."""
    a_ERI, b_EOR, scale, _ = loras
    if z_TN is None:
        z_TN = float32_product(x_TI, a_ERI.flatten(0, 1))
    if onto is not None and onto.dtype == x_TI.dtype:
        return add_low_rank(onto, z_TN, weights_TE, b_EOR, scale)
    update_TO = low_rank(z_TN, weights_TE, b_EOR, scale)
    return (update_TO if onto is None else onto + update_TO).to(x_TI.dtype)


class _AddInPlace(torch.autograd.Function):
    """onto_TO, z_TN, weights_TE, b_EOR -> the mixture's sum in the memory of `onto`.

    Not `addmm_`: on a view, such as a flattened batch, autograd would copy the whole gradient.
    """

    @staticmethod
    def forward(ctx, onto_TO, z_TN, weights_TE, b_EOR, scale):
        gate_TE = _scaled(weights_TE, scale)
        gated_TN = _gated(z_TN, gate_TE, b_EOR, onto_TO.dtype)
        b_ON = _stacked(b_EOR, onto_TO.dtype)
        ctx.scale, gate_TE = scale, None if weights_TE is None else gate_TE
        ctx.save_for_backward(z_TN, weights_TE, b_EOR, gate_TE, gated_TN, b_ON)
        # Shares the version counter, so that autograd notices if `onto` was saved for a gradient.
        return onto_TO.detach().addmm_(gated_TN, b_ON.t())

    @staticmethod
    def backward(ctx, grad_TO):
        z_TN, weights_TE, b_EOR, gate_TE, gated_TN, b_ON = ctx.saved_tensors
        if torch.is_grad_enabled():
            return grad_TO, *_once_more(grad_TO, z_TN, weights_TE, b_EOR, ctx.scale), None
        E, _, R = b_EOR.shape
        _, needs_z, needs_weights, needs_b, _ = ctx.needs_input_grad
        grad_z = grad_weights = grad_b = None
        if needs_b:
            grad_b = _as_b(product(grad_TO.t(), gated_TN), b_EOR)
        if not (needs_z or needs_weights):
            return grad_TO, None, None, grad_b, None
        grad_TN = grad_TO @ b_ON
        if weights_TE is None:
            return grad_TO, grad_TN * ctx.scale if needs_z else None, None, grad_b, None
        grad_TER = grad_TN.unflatten(1, (E, R))
        if needs_weights:
            low_TER = z_TN.unflatten(1, (-1, R))
            grad_weights = ((grad_TER * low_TER).sum(-1) * ctx.scale).to(weights_TE.dtype)
        if needs_z:
            grad_TER = grad_TER * gate_TE[..., None]
            if z_TN.shape[1] == R:
                grad_TER = grad_TER.sum(1)
            grad_z = grad_TER.flatten(1)
        return grad_TO, grad_z, grad_weights, grad_b, None


def _once_more(
    grad_TO: Tensor, z_TN: Tensor, weights_TE: Tensor | None, b_EOR: Tensor, scale: float
) -> list[Tensor | None]:
    """The gradients of z, weights and B, of which gradients may be taken again."""
    inputs = (z_TN, weights_TE, b_EOR)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    update_TO = _update(*inputs, scale, grad_TO.dtype)
    found = iter(torch.autograd.grad(update_TO, wanted, grad_TO, create_graph=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]
