"""Grouped GEMM over tokens sorted by expert; equals `experts.base.loop`.

Shapes: T tokens, K slots per token, S = T*K sorted slots, E experts, I input features,
O output features, M first-layer features, H hidden features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsecraft.kernels.device import compute_dtype
from sparsecraft.kernels.fused import fuses, networks
from sparsecraft.kernels.sorting import combine, plan
from sparsecraft.kernels.two_layer import TwoLayer

# grouped_mm wants every row to start on a 16-byte boundary.
ALIGNMENT_BYTES = 16


def why_not_grouped(net: TwoLayer, x_TI: Tensor) -> str | None:
    """The reason why `grouped` cannot run these experts on these tokens, or None."""
    if net.by_expert and torch.compiler.is_compiling():
        return "each expert has an activation of its own, for rows that no graph knows"
    return why_no_product(x_TI, (*net.first_EMI.shape[1:], *net.second_EOH.shape[1:]))


def why_no_product(x: Tensor, widths: Iterable[int]) -> str | None:
    """The reason why grouped_mm takes no x, or matrices of these widths, or None."""
    dtype = compute_dtype(x)
    if x.is_cuda and dtype != torch.bfloat16:
        return f"grouped_mm on CUDA takes bfloat16 and the tokens are {dtype}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"grouped_mm takes no {dtype}"
    if dtype != torch.bfloat16 and torch.compiler.is_compiling():
        return f"the compiler knows grouped_mm of bfloat16 alone and the tokens are {dtype}"
    for width in widths:
        if width * dtype.itemsize % ALIGNMENT_BYTES:
            return f"a width of {width} in {dtype} is no multiple of {ALIGNMENT_BYTES} bytes"
    return None


def grouped(
    net: TwoLayer,
    x_TI: Tensor,
    weights_TK: Tensor,
    indices_TK: Tensor,
    sums_to_one: bool,
    empty: bool = False,
) -> Tensor:
    """Two grouped GEMMs; the base model's own tensors are never repeated K times.

    Args:
        empty: many slots may have no expert, and are to cost no product.
    """
    num_experts, K = net.E, indices_TK.shape[1]

    biased = net.first_bias_EM is not None or net.second_bias_EO is not None
    filled_TK = indices_TK < num_experts
    if not empty:  # slots without an expert go to the last one, with weight zero
        indices_TK = indices_TK.clamp(max=num_experts - 1)
    ends_E, order_S, slot_TK = (_plan_filled if empty else plan)(indices_TK, num_experts)
    weights_TK = weights_TK * filled_TK
    scaled_TK = weights_TK if net.scale == 1.0 else weights_TK * net.scale
    if fuses(net, x_TI):
        passes = net.residual and sums_to_one
        y_TO = networks(net, x_TI, scaled_TK, (ends_E, order_S, slot_TK), passes)
        rest = net.residual and not passes
        return add_residual(y_TO, x_TI, weights_TK, sums_to_one) if rest else y_TO
    weight_S1 = _Permute.apply(scaled_TK.flatten(), order_S, slot_TK, empty)[:, None].to(x_TI.dtype)
    expert_S = indices_TK.flatten()[order_S] if biased else None

    x_SI = _Scatter.apply(x_TI, order_S, slot_TK, K, empty)
    if net.input_dropout:
        x_SI = F.dropout(x_SI, net.input_dropout)
    hidden_SM = F.grouped_mm(x_SI, net.first_EMI.transpose(-2, -1), offs=ends_E)
    if net.first_bias_EM is not None:
        hidden_SM = hidden_SM + _rows(net.first_bias_EM, expert_S, empty)
    hidden_SH = _activated(net, hidden_SM, ends_E)
    # Weigh on the narrower side: the mixing weight commutes with the second product.
    early = hidden_SH.shape[-1] < net.O and net.second_bias_EO is None
    y_SO = F.grouped_mm(
        hidden_SH * weight_S1 if early else hidden_SH,
        net.second_EOH.transpose(-2, -1),
        offs=ends_E,
    )
    if net.second_bias_EO is not None:
        y_SO = y_SO + _rows(net.second_bias_EO, expert_S, empty)
    if net.output_dropout:
        y_SO = F.dropout(y_SO, net.output_dropout)
    y_SO = y_SO if early else y_SO * weight_S1
    if net.residual and sums_to_one:
        return _Combine.apply(y_SO, x_TI, order_S, slot_TK, K, empty)
    y_TO = _Combine.apply(y_SO, None, order_S, slot_TK, K, empty)
    return add_residual(y_TO, x_TI, weights_TK, sums_to_one) if net.residual else y_TO


def _activated(net: TwoLayer, hidden_SM: Tensor, ends_E: Tensor) -> Tensor:
    if not net.by_expert:
        return net.activate(hidden_SM)
    # Where one expert's tokens end is read from the device.
    *hidden_E, rest_SM = hidden_SM.tensor_split(ends_E.tolist())
    hidden_E = net.activated(hidden_E)
    rest_SH = rest_SM.new_zeros(len(rest_SM), hidden_E[0].shape[-1])
    return torch.cat([*hidden_E, rest_SH])


def by_expert(
    experts: Sequence[Callable[[Tensor], Tensor]],
    x_TI: Tensor,
    weights_TK: Tensor,
    indices_TK: Tensor,
    passes: Tensor | None,
    out_features: int,
) -> Tensor:
    """Each expert on its own tokens, which are sorted once.

    Args:
        passes: the input, where experts add it to what they compute and weights are known to sum
            to one: it passes through without rounding.
        out_features: O.
    """
    K = indices_TK.shape[1]
    indices_TK = indices_TK.clamp(max=len(experts))
    ends_E, order_S, slot_TK = _plan_filled(indices_TK, len(experts))
    ends = ends_E.tolist()
    rows_S = order_S[: ends[-1]]  # slots without an expert stand behind
    x_SI = _Scatter.apply(x_TI, rows_S, slot_TK, K, True)
    own = x_SI.tensor_split(ends[:-1])
    outputs = [expert(x) for expert, x in zip(experts, own, strict=True) if len(x)]
    if not outputs:
        return x_TI.new_zeros(len(x_TI), out_features) if passes is None else passes
    y_SO = torch.cat(outputs)
    y_SO = y_SO if passes is None else y_SO - x_SI
    weight_S1 = _Permute.apply(weights_TK.flatten(), rows_S, slot_TK, True)[:, None]
    y_SO = y_SO * weight_S1.to(y_SO.dtype)
    return _Combine.apply(y_SO, passes, rows_S, slot_TK, K, True)


def _plan_filled(indices_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`plan`, of which slots without an expert stand behind all others, where the products end;
    their own place is -1."""
    ends_E, order_S, slot_TK = plan(indices_TK, num_experts + 1)
    filled_TK = indices_TK.flatten() < num_experts
    return ends_E[:-1].contiguous(), order_S, slot_TK.where(filled_TK, -1)


def _rows(bias_EO: Tensor, expert_S: Tensor, empty: bool) -> Tensor:
    """The bias of each slot's expert. What grouped_mm leaves in memory beyond its last offset meets
    a row of zeros that no expert has, so that no gradient of a bias is of that."""
    return (F.pad(bias_EO, (0, 0, 0, 1)) if empty else bias_EO)[expert_S]


def add_residual(y_TO: Tensor, x_TO: Tensor, weights_TK: Tensor, sums_to_one: bool) -> Tensor:
    """Add sum_k w_k * x; exactly x where the weights are known to sum to one."""
    if sums_to_one:
        return y_TO + x_TO
    return y_TO + x_TO * weights_TK.sum(-1, keepdim=True).to(x_TO.dtype)


class _Permute(torch.autograd.Function):
    """w_S -> w_S[order]. Its gradient is the inverse gather, not an accumulating index_put."""

    @staticmethod
    def forward(w_S, order_S, slot_TK, empty):
        return w_S[order_S]

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, order_S, slot_TK, ctx.empty = inputs
        ctx.save_for_backward(order_S, slot_TK)

    @staticmethod
    def backward(ctx, grad_S):
        order_S, slot_TK = ctx.saved_tensors
        if not ctx.empty:
            return _Permute.apply(grad_S, slot_TK, order_S, False), None, None, None
        return grad_S[slot_TK.clamp_min(0)].where(slot_TK >= 0, 0), None, None, None


class _Scatter(torch.autograd.Function):
    """x_TI -> x_SI, each token to its K sorted slots. Its gradient is `_Combine`.

    Written out because the gradient of plain indexing is an atomic scatter-add, which is slow
    and not deterministic on CUDA.
    """

    @staticmethod
    def forward(x_TI, order_S, slot_TK, K, empty):
        return x_TI[order_S // K]

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, order_S, slot_TK, ctx.K, ctx.empty = inputs
        ctx.save_for_backward(order_S, slot_TK)

    @staticmethod
    def backward(ctx, grad_SI):
        grad_TI = _Combine.apply(grad_SI, None, *ctx.saved_tensors, ctx.K, ctx.empty)
        return grad_TI, None, None, None, None


class _Combine(torch.autograd.Function):
    """y_SO -> y_TO, the sum of each token's K slots, plus x_TO. Its gradient is `_Scatter`."""

    @staticmethod
    def forward(y_SO, x_TO, order_S, slot_TK, K, empty):
        return combine(y_SO, slot_TK, K, x_TO, empty)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x_TO, order_S, slot_TK, ctx.K, ctx.empty = inputs
        ctx.residual = x_TO is not None
        ctx.save_for_backward(order_S, slot_TK)

    @staticmethod
    def backward(ctx, grad_TO):
        grad_SO = _Scatter.apply(grad_TO, *ctx.saved_tensors, ctx.K, ctx.empty)
        return grad_SO, grad_TO if ctx.residual else None, None, None, None, None
