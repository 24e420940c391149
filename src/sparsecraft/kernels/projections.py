"""What a layer computes from its tokens beside the frozen Linear: rows of all LoRAs and a router's
scores in one product, and one gradient of the tokens for all of it.

Shapes: T tokens, I input features, O output features, N plain rows (E*R of a bank of LoRAs),
E experts, P stacked rows, S = T*heads rows of weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft.kernels.device import is_few, is_handful, needs_grad
from sparsecraft.kernels.product import HIGH, LOW, MIDDLE, product, stack
from sparsecraft.kernels.products import products
from sparsecraft.kernels.vectors import backward, forward, usable

# Below this, the cast of the tokens costs less than splitting the weight.
SPLIT_TOKENS = 256
# Tokens whose gradient at the Linear's output is in memory at a time: still whole waves of tiles.
CHUNK_TOKENS = 2048


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is exactly of this kind, and nothing else sees its tensors or gradients."""
    return (
        type(module) is kind
        and not is_watched(module)
        and type(module.weight) in (Tensor, nn.Parameter)
    )


def is_watched(module: nn.Module) -> bool:
    """Whether other code runs when the module is called: hooks, or a `forward` of its own, as
    accelerate puts in. Its tensors may have no memory except then (offloading, sharding)."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def float32_product(x_TI: Tensor, weight_EI: Tensor) -> Tensor:
    """x @ weight^T in float32 (float64 of float64 tokens), whatever the tokens' dtype.

    Equals F.linear on float32 copies, forward and backward, to float32 rounding.
    """
    if is_handful(x_TI, weight_EI):
        return products(x_TI, [weight_EI], [True])[0]
    # Without this, autocast would compute the product in bf16 all the same.
    with torch.autocast(x_TI.device.type, enabled=False):
        if _splits(x_TI, weight_EI):
            return Projections.apply(x_TI, None, weight_EI, False)[2]
        dtype = torch.promote_types(x_TI.dtype, torch.float32)
        return F.linear(x_TI.to(dtype), weight_EI.to(dtype))


def joins(x: Tensor, rows_NI: Tensor | None, scores_EI: Tensor | None) -> bool:
    """Whether `project` takes these: in bf16 on CUDA, or a handful of tokens without gradients."""
    weights = [w for w in (rows_NI, scores_EI) if w is not None]
    if not weights or torch.compiler.is_compiling() or _autocast_changes(x):
        return False
    if is_few(x):
        return not needs_grad(x, *weights)
    return all(_splits(x, weight) for weight in weights)


def project(
    x: Tensor, rows_NI: Tensor | None, scores_EI: Tensor | None, own_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x for the Linear, x @ rows^T and x @ scores^T; x is (..., I), the products are float32.

    The rows count in the tokens' dtype and the scores in float32. The gradient that the Linear
    sends back to its x takes up those of the products.

    Args:
        own_gradient: nothing else holds that gradient, so that it may be written to.
    """
    with torch.autocast(x.device.type, enabled=False):
        if is_few(x):
            weights = [w for w in (rows_NI, scores_EI) if w is not None]
            x_TI = x.reshape(-1, x.shape[-1])
            if rows_NI is None:
                return x, None, products(x_TI, [scores_EI], [True])[0]
            z_TN, *logits = products(x_TI, weights, [True] * len(weights))
            return x, z_TN, logits[0] if logits else None
        same_x, z_TN, logits_TE = Projections.apply(x, rows_NI, scores_EI, own_gradient)
        return same_x if x.requires_grad else x, z_TN, logits_TE


class Projections(torch.autograd.Function):
    """x, rows_NI, scores_EI -> x, z_TN, logits_TE: three bf16 parts hold a score's 24 bits.

    A product of two bf16 numbers is exact in float32, and the sums are float32.
    """

    @staticmethod
    def forward(x, rows_NI, scores_EI, own_gradient):
        x_TI = x.reshape(-1, x.shape[-1])
        y_TP = product(x_TI, stack(rows_NI, scores_EI, (HIGH, MIDDLE, LOW), 0).t())
        N = 0 if rows_NI is None else len(rows_NI)
        logits_TE = None
        if scores_EI is not None:
            E = len(scores_EI)
            logits_TE = y_TP[:, N : N + 3 * E].unflatten(1, (3, E)).sum(1)
        return x.view_as(x), None if rows_NI is None else y_TP[:, :N], logits_TE

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.own_gradient = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_x, grad_TN, grad_TE):
        x, rows_NI, scores_EI = ctx.saved_tensors
        x_TI = x.reshape(-1, x.shape[-1])
        grad_TN = _or_zeros(grad_TN, x_TI, rows_NI)
        grad_TE = _or_zeros(grad_TE, x_TI, scores_EI)
        left_TP = stack(grad_TN, grad_TE, (HIGH, MIDDLE, LOW, HIGH), 1)
        grad_rows = grad_scores = None
        if any(ctx.needs_input_grad[1:3]):
            grad_PI = product(left_TP.t(), x_TI)
            N = 0 if rows_NI is None else len(rows_NI)
            if ctx.needs_input_grad[1]:
                grad_rows = grad_PI[:N].to(rows_NI.dtype)
            if ctx.needs_input_grad[2]:
                E = len(scores_EI)
                grad_scores = grad_PI[N : N + 3 * E].unflatten(0, (3, E)).sum(0)
                grad_scores = grad_scores.to(scores_EI.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_rows, grad_scores, None
        # The scores' part: (high + middle + low) high + high middle, finer than the bf16 result.
        right_PI = stack(rows_NI, scores_EI, (HIGH, HIGH, HIGH, MIDDLE), 0)
        if grad_x is None:
            return (left_TP @ right_PI).view(x.shape), grad_rows, grad_scores, None
        grad_TI = grad_x.reshape(-1, grad_x.shape[-1])
        if ctx.own_gradient:
            grad_TI.addmm_(left_TP, right_PI)
        else:
            grad_TI = torch.addmm(grad_TI, left_TP, right_PI)
        return grad_TI.view(x.shape), grad_rows, grad_scores, None


def _or_zeros(grad: Tensor | None, x_TI: Tensor, weight: Tensor | None) -> Tensor | None:
    if weight is None or grad is not None:
        return grad
    return x_TI.new_zeros(len(x_TI), len(weight), dtype=torch.float32)


def _splits(x: Tensor, weight_EI: Tensor) -> bool:
    # float16 tokens would need float16 parts, whose range is too narrow for a small weight's tail.
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and weight_EI.dtype in (torch.float32, torch.bfloat16)
        and x.numel() >= SPLIT_TOKENS * x.shape[-1]
        and x.shape[-1] % 8 == 0  # 16 bytes
    )


def _autocast_changes(x: Tensor) -> bool:
    device = x.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != x.dtype


def scales_in_chunks(x: Tensor, base: nn.Module, vectors_EO: Tensor) -> bool:
    """Whether `ScaledLinear` is worth it: bf16 tokens that take gradients, more than one chunk,
    and a Linear that takes none."""
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and x.numel() > CHUNK_TOKENS * x.shape[-1]
        and needs_grad(x)
        and is_plain(base, nn.Linear)
        and base.weight.dtype == torch.bfloat16
        and not needs_grad(*base.parameters())
        and usable(x, vectors_EO.t(), vectors_EO)  # of the weights only E is asked
        and not torch.compiler.is_compiling()
        and not _autocast_changes(x)
    )


class ScaledLinear(torch.autograd.Function):
    """`mix_vectors` of a frozen Linear's output, whose gradient is never whole in memory.

    x, weight_OI, bias_O, weights_SE, vectors_EO -> (x @ weight^T + bias) * l.
    """

    @staticmethod
    def forward(ctx, x, weight_OI, bias_O, weights_SE, vectors_EO, sums_to_one):
        y_TO = F.linear(x, weight_OI, bias_O).view(-1, len(weight_OI))
        ctx.save_for_backward(y_TO, weight_OI, weights_SE, vectors_EO)
        ctx.sums_to_one = sums_to_one
        mixed_TO = forward(y_TO, weights_SE, vectors_EO, sums_to_one)
        return mixed_TO.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        y_TO, weight_OI, weights_SE, vectors_EO = ctx.saved_tensors
        T, O = y_TO.shape
        grad_TO = grad.reshape(T, O)
        grad_TI = y_TO.new_empty(T, weight_OI.shape[1])
        grad_weights, grad_vectors = [], []
        for first in range(0, T, CHUNK_TOKENS):
            part, rows = slice(first, first + CHUNK_TOKENS), len(weights_SE) // T
            dy_TO, *others = backward(
                grad_TO[part], y_TO[part], weights_SE[rows * first : rows * part.stop],
                vectors_EO, ctx.sums_to_one,
            )  # fmt: skip
            torch.mm(dy_TO, weight_OI, out=grad_TI[part])
            del dy_TO  # before the next one is made
            grad_weights.append(others[0])
            grad_vectors.append(others[1])
        grad_x = grad_TI.view(*grad.shape[:-1], -1)
        return grad_x, None, None, torch.cat(grad_weights), sum(grad_vectors), None
