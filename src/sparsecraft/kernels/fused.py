"""Two grouped products with one launch between them, which keeps no more than their first result.

What `grouped` does, for elementwise activations that the kernels know, gated or not, and without
biases and dropout: activation, gate and mixing weight are one launch in each direction; sorted
tokens and activations are made again in the backward pass.
Shapes: T tokens, K slots per token, S = T*K sorted slots, E experts, I input features, O output
features, M first-layer features, H hidden features (M = 2H when gated).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsecraft.kernels.device import is_transformed, usable
from sparsecraft.kernels.projections import is_watched
from sparsecraft.kernels.sorting import combine
from sparsecraft.kernels.split_triton import activation_code
from sparsecraft.kernels.two_layer import TwoLayer

try:  # absent from CPU builds of torch
    import triton
    import triton.language as tl
except ImportError:
    triton = None
else:
    from sparsecraft.kernels.split_triton import _activate

BLOCK = 1024


def fuses(net: TwoLayer, x_TI: Tensor) -> bool:
    """Whether `networks` computes what these experts do."""
    return (
        net.activation is not None
        and activation_code(net.activation) is not None
        and not is_watched(net.activation)
        and net.first_bias_EM is None
        and net.second_bias_EO is None
        and not (net.input_dropout or net.output_dropout)
        and usable(x_TI)
        and x_TI.numel() > 0
        and not is_transformed()
    )


def networks(
    net: TwoLayer,
    x_TI: Tensor,
    weights_TK: Tensor,
    places: tuple[Tensor, Tensor, Tensor],
    adds: bool,
) -> Tensor:
    """sum_k w_k second_k(activation(first_k(x))), (T, O).

    Args:
        places: what `sorting.plan` gives; slots of no expert stand last, and their own place is -1.
        adds: plus x.
    """
    code = activation_code(net.activation)
    first, second = net.first_EMI, net.second_EOH
    return _Networks.apply(x_TI, weights_TK, first, second, places, (code, adds))


class _Networks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TI, weights_TK, first_EMI, second_EOH, places, options):
        (ends_E, order_S, slot_TK), (code, adds) = places, options
        K = weights_TK.shape[1]
        weight_S = weights_TK.flatten()[order_S]
        x_SI = x_TI[order_S // K]
        hidden_SM = F.grouped_mm(x_SI, first_EMI.transpose(-2, -1), offs=ends_E)
        del x_SI
        active_SH = activate(hidden_SM, weight_S, second_EOH.shape[-1], code)
        y_SO = F.grouped_mm(active_SH, second_EOH.transpose(-2, -1), offs=ends_E)
        ctx.save_for_backward(x_TI, weight_S, first_EMI, second_EOH, hidden_SM, *places)
        ctx.K, ctx.code, ctx.adds, ctx.dtype = K, code, adds, weights_TK.dtype
        return combine(y_SO, slot_TK, K, x_TI if adds else None, empty=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_TO):
        x_TI, weight_S, first_EMI, second_EOH, hidden_SM, ends_E, order_S, slot_TK = (
            ctx.saved_tensors
        )
        of_x, of_weights, of_first, of_second = ctx.needs_input_grad[:4]
        dx_TI = dweights_TK = dfirst_EMI = dsecond_EOH = None
        dy_TO = dy_TO.contiguous()
        dy_SO = dy_TO[order_S // ctx.K]
        dactive_SH = F.grouped_mm(dy_SO, second_EOH, offs=ends_E)
        dhidden_SM, active_SH, dweight_S = activate_backward(
            hidden_SM, weight_S, dactive_SH, ctx.code, of_second
        )
        del dactive_SH
        if of_weights:
            dweights_TK = dweight_S[slot_TK.clamp_min(0)].where(slot_TK >= 0, 0)
            dweights_TK = dweights_TK.view(-1, ctx.K).to(ctx.dtype)
        if of_second:
            dsecond_EOH = F.grouped_mm(dy_SO.t(), active_SH, offs=ends_E)
        del dy_SO, active_SH
        if of_x:
            dx_SI = F.grouped_mm(dhidden_SM, first_EMI, offs=ends_E)
            dx_TI = combine(dx_SI, slot_TK, ctx.K, dy_TO if ctx.adds else None, empty=True)
            del dx_SI
        if of_first:
            dfirst_EMI = F.grouped_mm(dhidden_SM.t(), x_TI[order_S // ctx.K], offs=ends_E)
        return dx_TI, dweights_TK, dfirst_EMI, dsecond_EOH, None, None


def activate(hidden_SM: Tensor, weight_S: Tensor, H: int, code: int) -> Tensor:
    """weight * activation(gate) * up, or weight * activation(hidden), (S, H)."""
    S, M = hidden_SM.shape
    active_SH = hidden_SM.new_empty(S, H)
    _forward[(S, triton.cdiv(H, BLOCK))](
        hidden_SM, weight_S, active_SH, H=H, M=M, ACTIVATION=code, BLOCK=BLOCK, num_warps=4
    )
    return active_SH


def activate_backward(
    hidden_SM: Tensor, weight_S: Tensor, dactive_SH: Tensor, code: int, again: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients of `activate`'s hidden values and, in float32, weights.

    Args:
        again: make its result again, which is in the middle of the three.
    """
    (S, M), H = hidden_SM.shape, dactive_SH.shape[1]
    dhidden_SM, dweight_S = (
        torch.empty_like(hidden_SM),
        torch.empty_like(weight_S, dtype=torch.float32),
    )
    active_SH = torch.empty_like(dactive_SH) if again else None
    _backward[(S,)](
        hidden_SM, weight_S, dactive_SH, dhidden_SM, dactive_SH if active_SH is None else active_SH,
        dweight_S, H=H, M=M, AGAIN=again, ACTIVATION=code, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return dhidden_SM, active_SH, dweight_S


if triton is not None:

    @triton.jit
    def _forward(
        hidden, weight, active, H: tl.constexpr, M: tl.constexpr,
        ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        s, h = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        live = h < H
        value = _activate(
            tl.load(hidden + s * M + h, mask=live, other=0.0).to(tl.float32), ACTIVATION
        )
        if M > H:
            value *= tl.load(hidden + s * M + H + h, mask=live, other=0.0).to(tl.float32)
        value *= tl.load(weight + s).to(tl.float32)
        tl.store(active + s * H + h, value.to(active.dtype.element_ty), mask=live)

    @triton.jit
    def _backward(
        hidden, weight, dactive, dhidden, active, dweight, H: tl.constexpr, M: tl.constexpr,
        AGAIN: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        s = tl.program_id(0).to(tl.int64)
        w = tl.load(weight + s).to(tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, H, BLOCK):
            h = start + tl.arange(0, BLOCK)
            live = h < H
            z = tl.load(hidden + s * M + h, mask=live, other=0.0).to(tl.float32)
            d = tl.load(dactive + s * H + h, mask=live, other=0.0).to(tl.float32)
            value, slope = _activate(z, ACTIVATION), _slope(z, ACTIVATION)
            dz = d * w * slope
            if M > H:
                up = tl.load(hidden + s * M + H + h, mask=live, other=0.0).to(tl.float32)
                dup = d * w * value
                tl.store(dhidden + s * M + H + h, dup.to(dhidden.dtype.element_ty), mask=live)
                dz *= up
                value *= up
            tl.store(dhidden + s * M + h, dz.to(dhidden.dtype.element_ty), mask=live)
            total += tl.where(live, d * value, 0.0)
            if AGAIN:
                tl.store(active + s * H + h, (w * value).to(active.dtype.element_ty), mask=live)
        tl.store(dweight + s, tl.sum(total))

    @triton.jit
    def _slope(v, ACTIVATION: tl.constexpr):
        """The derivative of `_activate`."""
        if ACTIVATION == 0:
            share = tl.sigmoid(v)
            d = share * (1.0 + v * (1.0 - share))
        elif ACTIVATION == 1:
            density = 0.3989422804014327 * tl.exp(-0.5 * v * v)
            d = 0.5 * (1.0 + tl.erf(v * 0.7071067811865476)) + v * density
        elif ACTIVATION == 2:
            share = tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
            d = share + v * share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * v * v)
        else:
            d = tl.where(v <= 0.0, 0.0, 1.0)  # a NaN passes its gradient on, as in torch
        return d
