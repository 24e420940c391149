"""A handful of tokens on a GPU without gradients: scores, the best experts, and each slot by the
matrices of its own expert, in one, one and two launches; the last equals `experts.base.loop`.

Under torch.compile they are opaque operators, which cost as much as a launch elsewhere: the
compiler's own code for the torch forms casts whole matrices, sorts, and reads all experts.
Shapes: T tokens, K slots per token, S = T*K slots, E experts, I input features, O output features,
M first-layer features, H hidden features (M = 2H when gated).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecraft.kernels import few_experts
from sparsecraft.kernels.device import compute_dtype, is_followed, is_handful
from sparsecraft.kernels.projections import is_watched
from sparsecraft.kernels.split_triton import activation_code
from sparsecraft.kernels.two_layer import TwoLayer

try:  # absent from CPU builds of torch
    import triton
    import triton.language as tl
except ImportError:
    triton = None
else:
    from sparsecraft.kernels.split_triton import _activate

ROWS = 4  # of a matrix in one program, or one where programs would be too few for a GPU
PROGRAMS = 1024
TILE = 4096  # numbers of a matrix that a program reads at a time
MAX_EXPERTS = 1024  # of one token in the registers of one program


def fits(net: TwoLayer, x_TI: Tensor, slots: int) -> bool:
    """Whether `networks` computes what these experts do, and reads no more than all of them."""
    # A slot reads its expert anew, from the cache of the chip at best.
    return (
        is_handful(x_TI, net.first_EMI, net.second_EOH)
        and (len(x_TI) * slots <= net.E or x_TI.dtype.itemsize == 2)
        and x_TI.dtype == compute_dtype(x_TI) == net.first_EMI.dtype
        and net.activation is not None
        and activation_code(net.activation) is not None
        and not is_watched(net.activation)
        and not (net.input_dropout or net.output_dropout)
    )


def picks(logits_TE: Tensor) -> bool:
    """Whether `top_k` takes these scores."""
    return is_handful(logits_TE) and logits_TE.shape[1] <= MAX_EXPERTS


def top_k(logits_TE: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """`moe.routers.selectors.top_k`: weights (T, K) in float32 and experts (T, K)."""
    run = _top_k if is_followed(logits_TE) else _pick
    return run(logits_TE, k, renormalize)


def networks(
    net: TwoLayer, x_TI: Tensor, weights_TK: Tensor, indices_TK: Tensor, sums_to_one: bool
) -> Tensor:
    """sum_k w_k expert_k(x), (T, O); slots of number E have no expert."""
    passes = (2 if sums_to_one else 1) if net.residual else 0
    matrices, biases = [net.first_EMI, net.second_EOH], [net.first_bias_EM, net.second_bias_EO]
    options = [activation_code(net.activation), passes]
    if indices_TK.numel() > net.E:
        run = few_experts.networks
    else:
        run = _networks if is_followed(x_TI) else _launch
    return run(x_TI, weights_TK, indices_TK, matrices, biases, net.scale, options)


def _pick(logits_TE: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    (T, E), logits_TE = logits_TE.shape, logits_TE.contiguous()
    weights_TK = logits_TE.new_empty(T, k, dtype=torch.float32)
    indices_TK = logits_TE.new_empty(T, k, dtype=torch.long)
    with torch.cuda.device_of(logits_TE):
        _best[(T,)](
            logits_TE, weights_TK, indices_TK, E=E, K=k, KP=triton.next_power_of_2(k),
            EP=triton.next_power_of_2(E), ALONE=renormalize, num_warps=1,
        )  # fmt: skip
    return weights_TK, indices_TK


def _launch(
    x_TI: Tensor,
    weights_TK: Tensor,
    indices_TK: Tensor,
    matrices: list[Tensor],
    biases: list[Tensor | None],
    scale: float,
    options: list[int],
) -> Tensor:
    (first_EMI, second_EOH), (code, passes) = matrices, options
    (T, I), K = x_TI.shape, indices_TK.shape[1]
    E, M, _ = first_EMI.shape
    _, O, H = second_EOH.shape
    x_TI, weights_TK, indices_TK = (t.contiguous() for t in (x_TI, weights_TK, indices_TK))
    first_bias, second_bias = (x_TI if bias is None else bias.contiguous() for bias in biases)
    active_SH = x_TI.new_empty(T * K, H, dtype=torch.float32)
    y_TO = x_TI.new_empty(T, O)
    rows = ROWS if H * T * K >= ROWS * PROGRAMS else 1
    with torch.cuda.device_of(x_TI):  # Triton launches on the current one
        _up[(triton.cdiv(H, rows), T * K)](
            x_TI, indices_TK, first_EMI, first_bias, active_SH, E, *first_EMI.stride(), I=I, K=K,
            H=H, GATED=M > H, BIASED=biases[0] is not None, ACTIVATION=code, BN=rows,
            BK=_tile(I, rows), num_warps=4,
        )  # fmt: skip
        _down[(triton.cdiv(O, ROWS), T)](
            x_TI, weights_TK, indices_TK, second_EOH, second_bias, active_SH, y_TO, O, E, scale,
            *second_EOH.stride(), H=H, K=K, PASSES=passes, BIASED=biases[1] is not None,
            BN=ROWS, BK=_tile(H, ROWS), num_warps=4,
        )  # fmt: skip
    return y_TO


def _tile(width: int, rows: int) -> int:
    return max(16, min(TILE // rows, triton.next_power_of_2(width)))


if triton is not None:
    _networks = torch.library.custom_op(
        "sparsecraft::few_networks",
        _launch,
        mutates_args=(),
        schema="(Tensor x, Tensor weights, Tensor indices, Tensor[] matrices, Tensor?[] biases, "
        "float scale, int[] options) -> Tensor",
    )

    @_networks.register_fake
    def _(x, weights, indices, matrices, biases, scale, options):
        return x.new_empty(x.shape[0], matrices[1].shape[1])

    _top_k = torch.library.custom_op(
        "sparsecraft::top_k",
        _pick,
        mutates_args=(),
        schema="(Tensor logits, int k, bool renormalize) -> (Tensor, Tensor)",
    )

    @_top_k.register_fake
    def _(logits, k, renormalize):
        shape = logits.shape[0], k
        return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(
            shape, dtype=torch.long
        )

    @triton.jit
    def _best(
        logits, weights, indices, E: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
        EP: tl.constexpr, ALONE: tl.constexpr,
    ):  # fmt: skip
        t, e, k = tl.program_id(0), tl.arange(0, EP), tl.arange(0, KP)
        s_E = tl.load(logits + t * E + e, mask=e < E, other=float("-inf")).to(tl.float32)
        best_K, index_K = tl.full((KP,), float("-inf"), tl.float32), tl.zeros((KP,), tl.int32)
        left_E = tl.where(e < E, 1, 0)
        for j in tl.static_range(K):
            # Where scores are minus infinity too, one that is left is chosen.
            top = tl.max(tl.where(left_E > 0, s_E, float("-inf")), 0)
            at = tl.min(tl.where((left_E > 0) & (s_E >= top), e, E - 1), 0)
            best_K, index_K = tl.where(k == j, top, best_K), tl.where(k == j, at, index_K)
            left_E = tl.where(e == at, 0, left_E)
        largest = tl.max(best_K, 0)
        raised_K = tl.where(k < K, tl.exp(best_K - largest), 0.0)
        total = tl.sum(raised_K if ALONE else tl.where(e < E, tl.exp(s_E - largest), 0.0), 0)
        tl.store(weights + t * K + k, raised_K / total, mask=k < K)
        tl.store(indices + t * K + k, index_K.to(tl.int64), mask=k < K)

    @triton.jit
    def _up(
        x, indices, first, bias, active, E, of_e, of_m, of_i,
        I: tl.constexpr, K: tl.constexpr, H: tl.constexpr, GATED: tl.constexpr,
        BIASED: tl.constexpr, ACTIVATION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ):  # fmt: skip
        n, s = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1)
        e = tl.load(indices + s).to(tl.int64)
        if e < E:
            live_N, row = n < H, first + e * of_e + n.to(tl.int64)[:, None] * of_m
            a_NK = tl.zeros((BN, BK), tl.float32)
            u_NK = tl.zeros((BN, BK), tl.float32)
            for start in range(0, I, BK):
                i = start + tl.arange(0, BK)
                live = live_N[:, None] & (i < I)[None, :]
                x_K = tl.load(x + (s // K) * I + i, mask=i < I, other=0.0).to(tl.float32)
                at = row + i[None, :] * of_i
                a_NK += tl.load(at, mask=live, other=0.0).to(tl.float32) * x_K[None, :]
                if GATED:
                    w_NK = tl.load(at + H * of_m, mask=live, other=0.0).to(tl.float32)
                    u_NK += w_NK * x_K[None, :]
            a_N = tl.sum(a_NK, 1)
            M: tl.constexpr = 2 * H if GATED else H
            if BIASED:
                a_N += tl.load(bias + e * M + n, mask=live_N, other=0.0).to(tl.float32)
            a_N = _activate(a_N, ACTIVATION)
            if GATED:
                u_N = tl.sum(u_NK, 1)
                if BIASED:
                    u_N += tl.load(bias + e * M + H + n, mask=live_N, other=0.0).to(tl.float32)
                a_N *= u_N
            tl.store(active + s * H + n, a_N, mask=live_N)

    @triton.jit
    def _down(
        x, weights, indices, second, bias, active, y, O, E, scale, of_e, of_o, of_h,
        H: tl.constexpr, K: tl.constexpr, PASSES: tl.constexpr, BIASED: tl.constexpr,
        BN: tl.constexpr, BK: tl.constexpr,
    ):  # fmt: skip
        n, t = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1)
        live_N, y_N = n < O, tl.zeros((BN,), tl.float32)
        total = 0.0
        for k in tl.static_range(K):
            e = tl.load(indices + t * K + k).to(tl.int64)
            if e < E:
                w = tl.load(weights + t * K + k).to(tl.float32)
                row = second + e * of_e + n.to(tl.int64)[:, None] * of_o
                a_NK = tl.zeros((BN, BK), tl.float32)
                for start in range(0, H, BK):
                    h = start + tl.arange(0, BK)
                    live = live_N[:, None] & (h < H)[None, :]
                    h_K = tl.load(active + (t * K + k) * H + h, mask=h < H, other=0.0)
                    w_NK = tl.load(row + h[None, :] * of_h, mask=live, other=0.0)
                    a_NK += w_NK.to(tl.float32) * h_K[None, :]
                a_N = tl.sum(a_NK, 1)
                if BIASED:
                    a_N += tl.load(bias + e * O + n, mask=live_N, other=0.0).to(tl.float32)
                y_N += w * scale * a_N
                total += w
        if PASSES > 0:
            x_N = tl.load(x + t * O + n, mask=live_N, other=0.0).to(tl.float32)
            y_N += x_N if PASSES == 2 else x_N * total
        tl.store(y + t * O + n, y_N.to(y.dtype.element_ty), mask=live_N)
