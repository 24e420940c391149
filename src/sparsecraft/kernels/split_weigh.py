"""One Triton kernel for all that lies between the two products of a split network whose experts
all run: bias, activation, gate, mean and weight. Equal to the torch code in `split.between`.

Shapes: T tokens, E experts, H neurons of one, M rows of its first matrix (H, or 2H when gated),
N = E*M, F = E*H.
"""

from __future__ import annotations

from torch import Tensor

from sparsecraft.kernels.split_triton import activation_code

try:  # absent from CPU builds of torch
    import triton
    import triton.language as tl
except ImportError:
    triton = None
else:
    from sparsecraft.kernels.split_triton import _activate

BLOCK = 512


def weigh(net, first_TN: Tensor, weights_TE: Tensor | None) -> Tensor:
    """weights * (activation(first + bias) - mean), (T, F) in first_TN's dtype.

    Args:
        weights_TE: None for the activations alone.
    """
    T, (E, H) = len(first_TN), net.down_EHD.shape[:2]
    hidden_TF = first_TN.new_empty(T, E * H)
    weighed, biased = weights_TE is not None, net.first_bias_EM is not None
    means = weighed and net.mean_EH is not None
    _weigh[(triton.cdiv(E * H, BLOCK), T)](
        first_TN.contiguous(), net.first_bias_EM if biased else first_TN,
        net.mean_EH if means else first_TN, weights_TE.contiguous() if weighed else first_TN,
        hidden_TF, E, H=H, M=net.first_EMD.shape[1], BIASED=biased, MEAN=means, WEIGHED=weighed,
        ACTIVATION=activation_code(net.activation), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return hidden_TF


if triton is not None:

    @triton.jit
    def _weigh(
        first, first_bias, mean, weights, hidden, E, H: tl.constexpr, M: tl.constexpr,
        BIASED: tl.constexpr, MEAN: tl.constexpr, WEIGHED: tl.constexpr,
        ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        t, f = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        live, e = f < E * H, f // H
        n = e * M + f - e * H
        first += t.to(tl.int64) * E * M
        a_F = tl.load(first + n, mask=live, other=0.0).to(tl.float32)
        if BIASED:
            a_F += tl.load(first_bias + n, mask=live, other=0.0).to(tl.float32)
        a_F = _activate(a_F, ACTIVATION)
        if M > H:
            up_F = tl.load(first + n + H, mask=live, other=0.0).to(tl.float32)
            if BIASED:
                up_F += tl.load(first_bias + n + H, mask=live, other=0.0).to(tl.float32)
            a_F *= up_F
        if MEAN:
            a_F -= tl.load(mean + f, mask=live, other=0.0).to(tl.float32)
        if WEIGHED:
            a_F *= tl.load(weights + t * E + e, mask=live, other=0.0).to(tl.float32)
        tl.store(hidden + t.to(tl.int64) * E * H + f, a_F.to(hidden.dtype.element_ty), mask=live)
