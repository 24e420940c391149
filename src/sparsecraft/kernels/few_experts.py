"""A handful of tokens on a GPU without gradients by experts that are read once each, for all tokens
together, in two launches; the sum over slots equals `experts.base.loop`.

Shapes: T tokens, K slots per token, E experts, I input features, O output features, M first-layer
features, H hidden features (M = 2H when gated), P parts of a sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecraft.kernels.device import FEW_TOKENS, is_followed

try:  # absent from CPU builds of torch
    import triton
    import triton.language as tl
except ImportError:
    triton = None
else:
    from sparsecraft.kernels.split_triton import _activate

BN, BK = 32, 128  # rows and columns of a matrix that a program reads at a time
PROGRAMS = 1024  # of a launch, about: what it takes to keep a GPU's memory busy
LAUNCH = {"num_warps": 2, "num_stages": 4}


def networks(x_TI: Tensor, *given) -> Tensor:
    """sum_k w_k expert_k(x), (T, O), of 16-bit matrices; slots of number E have no expert.

    Args:
        given: see `_launch`.
    """
    run = _parts if is_followed(x_TI) else _launch
    return run(x_TI, *given).sum(0).to(x_TI.dtype)


def _launch(
    x_TI: Tensor,
    weights_TK: Tensor,
    indices_TK: Tensor,
    matrices: list[Tensor],
    biases: list[Tensor | None],
    scale: float,
    options: list[int],
) -> Tensor:
    """Parts of the sum, (P, T, O) float32.

    Args:
        matrices: (E, M, I) and (E, O, H).
        biases: of both, (E, M) and (E, O).
        options: the activation's code, and what is added of the input: nothing (0), its share of
            the weights (1), all (2).
    """
    (first_EMI, second_EOH), (code, passes) = matrices, options
    x_TI, weights_TK, indices_TK = (t.contiguous() for t in (x_TI, weights_TK, indices_TK))
    first_bias, second_bias = (x_TI if bias is None else bias.contiguous() for bias in biases)
    (T, I), K = x_TI.shape, indices_TK.shape[1]
    E, M, _ = first_EMI.shape
    _, O, H = second_EOH.shape
    slots = {"T": T, "TP": FEW_TOKENS, "K": K, "KP": triton.next_power_of_2(K)}
    active_ETH = x_TI.new_empty(E, FEW_TOKENS, H)
    parts_PTO = _empty(x_TI, weights_TK, indices_TK, matrices, biases, scale, options)
    P, rows = len(parts_PTO), 16 if triton.cdiv(H, BN) * E < PROGRAMS // 2 else BN
    with torch.cuda.device_of(x_TI):  # Triton launches on the current one
        _up[(triton.cdiv(H, rows), E)](
            x_TI, indices_TK, first_EMI, first_bias, active_ETH, *first_EMI.stride(), I=I, H=H,
            GATED=M > H, BIASED=biases[0] is not None, ACTIVATION=code, **slots, BN=rows, BK=BK,
            **LAUNCH,
        )  # fmt: skip
        _down[(triton.cdiv(O, BN), P)](
            x_TI, weights_TK, indices_TK, second_EOH, second_bias, active_ETH, parts_PTO, O, E,
            scale, *second_EOH.stride(), H=H, PASSES=passes, BIASED=biases[1] is not None, **slots,
            SHARE=triton.cdiv(E, P), BN=BN, BK=BK, **LAUNCH,
        )  # fmt: skip
    return parts_PTO


def _empty(x_TI, weights_TK, indices_TK, matrices, biases, scale, options) -> Tensor:
    """A part of the sum for every few experts."""
    E, O, _ = matrices[1].shape
    share = -(-E // max(1, min(E, PROGRAMS * BN // O)))
    return x_TI.new_empty(-(-E // share), len(x_TI), O, dtype=torch.float32)


if triton is not None:
    _parts = torch.library.custom_op(
        "sparsecraft::few_experts",
        _launch,
        mutates_args=(),
        schema="(Tensor x, Tensor weights, Tensor indices, Tensor[] matrices, Tensor?[] biases, "
        "float scale, int[] options) -> Tensor",
    )
    _parts.register_fake(_empty)

    @triton.jit
    def _up(
        x, indices, first, bias, active, of_e, of_m, of_i,
        I: tl.constexpr, H: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr,
        ACTIVATION: tl.constexpr, T: tl.constexpr, TP: tl.constexpr, K: tl.constexpr,
        KP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ):  # fmt: skip
        n, e, t = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1), tl.arange(0, TP)
        k = tl.arange(0, KP)
        live_TK = (t < T)[:, None] & (k < K)[None, :]
        index_TK = tl.load(indices + t[:, None] * K + k[None, :], mask=live_TK, other=-1)
        if tl.max((index_TK == e).to(tl.int32)) > 0:
            live_N, row = n < H, first + e.to(tl.int64) * of_e + n.to(tl.int64)[:, None] * of_m
            a_NT = tl.zeros((BN, TP), tl.float32)
            u_NT = tl.zeros((BN, TP), tl.float32)
            for start in range(0, I, BK):
                i = start + tl.arange(0, BK)
                live = live_N[:, None] & (i < I)[None, :]
                of_x = (t < T)[None, :] & (i < I)[:, None]
                x_KT = tl.load(x + t[None, :] * I + i[:, None], mask=of_x, other=0.0)
                at = row + i[None, :] * of_i
                a_NT = tl.dot(tl.load(at, mask=live, other=0.0), x_KT, a_NT)
                if GATED:
                    u_NT = tl.dot(tl.load(at + H * of_m, mask=live, other=0.0), x_KT, u_NT)
            M: tl.constexpr = 2 * H if GATED else H
            if BIASED:
                b_N = tl.load(bias + e * M + n, mask=live_N, other=0.0).to(tl.float32)
                a_NT += b_N[:, None]
            a_NT = _activate(a_NT, ACTIVATION)
            if GATED:
                if BIASED:
                    c_N = tl.load(bias + e * M + H + n, mask=live_N, other=0.0).to(tl.float32)
                    u_NT += c_N[:, None]
                a_NT *= u_NT
            at = active + (e * TP + t).to(tl.int64)[None, :] * H + n[:, None]
            tl.store(at, a_NT.to(active.dtype.element_ty), mask=live_N[:, None])

    @triton.jit
    def _down(
        x, weights, indices, second, bias, active, parts, O, E, scale, of_e, of_o, of_h,
        H: tl.constexpr, PASSES: tl.constexpr, BIASED: tl.constexpr, T: tl.constexpr,
        TP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, SHARE: tl.constexpr,
        BN: tl.constexpr, BK: tl.constexpr,
    ):  # fmt: skip
        n, p, t = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1), tl.arange(0, TP)
        k = tl.arange(0, KP)
        live_TK, at_TK = (t < T)[:, None] & (k < K)[None, :], t[:, None] * K + k[None, :]
        index_TK = tl.load(indices + at_TK, mask=live_TK, other=-1)
        weight_TK = tl.load(weights + at_TK, mask=live_TK, other=0.0).to(tl.float32)
        y_NT = tl.zeros((BN, TP), tl.float32)
        for i in range(SHARE):
            e = p * SHARE + i
            live_N = (n < O) & (e < E)
            found_TK = (index_TK == e) & (e < E)
            chosen_T = tl.max(found_TK.to(tl.int32), 1) > 0
            w_T = tl.sum(tl.where(found_TK, weight_TK, 0.0), 1)
            row = second + e.to(tl.int64) * of_e + n.to(tl.int64)[:, None] * of_o
            of_active = active + (e * TP + t).to(tl.int64)[None, :] * H
            a_NT = tl.zeros((BN, TP), tl.float32)
            for start in range(0, tl.where(tl.max(chosen_T.to(tl.int32)) > 0, H, 0), BK):
                h = start + tl.arange(0, BK)
                live = live_N[:, None] & (h < H)[None, :]
                h_KT = tl.load(of_active + h[:, None], mask=(h < H)[:, None], other=0.0)
                w_NK = tl.load(row + h[None, :] * of_h, mask=live, other=0.0)
                a_NT = tl.dot(w_NK, h_KT, a_NT)
            if BIASED:
                b_N = tl.load(bias + e * O + n, mask=live_N, other=0.0).to(tl.float32)
                a_NT += b_N[:, None]
            # Other tokens' columns may hold anything.
            y_NT += tl.where(chosen_T[None, :], w_T[None, :] * scale * a_NT, 0.0)
        live = (n < O)[:, None] & (t < T)[None, :]
        if PASSES > 0 and p == 0:
            x_NT = tl.load(x + t[None, :] * O + n[:, None], mask=live, other=0.0).to(tl.float32)
            if PASSES == 2:
                y_NT += x_NT
            else:
                y_NT += x_NT * tl.sum(tl.where(index_TK < E, weight_TK, 0.0), 1)[None, :]
        tl.store(parts + (p * T + t).to(tl.int64)[None, :] * O + n[:, None], y_NT, mask=live)
