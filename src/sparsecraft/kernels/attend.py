"""Attention of one new token of each sequence to a static cache on a GPU, without gradients, in two
launches: heads that share keys read them once, and positions that the mask hides are not read.

The parts and their sum are Flash-Decoding's (Dao et al. 2023).
Shapes: B sequences, H heads of queries, N of keys and values, L positions, D width of a head,
G = H / N heads that share keys, P parts of the positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsecraft.kernels.device import runs

try:  # absent from CPU builds of torch
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BLOCK = 64  # positions that a program reads at a time
PROGRAMS = 512  # of a launch, about
MAX_WIDTH = 256


def fits(q_BH1D: Tensor, k_BNLD: Tensor, v_BNLD: Tensor, mask: Tensor | None) -> bool:
    """Whether `attend` takes these, or what a compiler puts in their place.

    Args:
        mask: bool, or numbers that are added to the scores; (B or 1, 1, 1, L).
    """
    if not runs(q_BH1D) or q_BH1D.ndim != 4:
        return False
    (B, H, one, D), (_, N, L, _) = q_BH1D.shape, k_BNLD.shape
    same = q_BH1D.dtype == k_BNLD.dtype == v_BNLD.dtype and q_BH1D.dtype != torch.float64
    shapes = k_BNLD.shape == v_BNLD.shape == (B, N, L, D) and H % N == 0
    masks = mask is None or (mask.shape[1:] == (1, 1, L) and mask.shape[0] in (1, B))
    return same and shapes and masks and one == 1 and D <= MAX_WIDTH


def attend(
    q_BH1D: Tensor, k_BNLD: Tensor, v_BNLD: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """softmax(scale q k^T + mask) v, (B, H, 1, D); zeros where a mask hides all positions.

    Args:
        scale: D^-1/2 where it is None.
    """
    return _attend(q_BH1D, k_BNLD, v_BNLD, mask, scale)


def _launch(
    q_BH1D: Tensor, k_BNLD: Tensor, v_BNLD: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    (B, H, _, D), (N, L) = q_BH1D.shape, k_BNLD.shape[1:3]
    scale = D**-0.5 if scale is None else scale
    if triton is None or not runs(q_BH1D):
        return F.scaled_dot_product_attention(
            q_BH1D, k_BNLD, v_BNLD, attn_mask=mask, scale=scale, enable_gqa=True
        )
    k_BNLD, v_BNLD = (t if t.stride(3) == 1 else t.contiguous() for t in (k_BNLD, v_BNLD))
    q_BH1D = q_BH1D.contiguous()
    P = min(triton.cdiv(L, BLOCK), triton.cdiv(PROGRAMS, B * N))
    sums_BHPD = q_BH1D.new_empty(B, H, P, D, dtype=torch.float32)
    tops_2BHP = q_BH1D.new_empty(2, B, H, P, dtype=torch.float32)
    y_BH1D = torch.empty_like(q_BH1D)
    given = q_BH1D if mask is None else mask
    strides = (0, 0) if mask is None else (mask.stride(0) if len(mask) > 1 else 0, mask.stride(3))
    widths = {"D": D, "DP": max(16, triton.next_power_of_2(D))}
    with torch.cuda.device_of(q_BH1D):  # Triton launches on the current one
        _part[(B * N, P)](
            q_BH1D, k_BNLD, v_BNLD, given, sums_BHPD, tops_2BHP, scale, N, L, *strides,
            *k_BNLD.stride()[:3], *v_BNLD.stride()[:3], B * H * P, G=H // N,
            GP=max(16, triton.next_power_of_2(H // N)), P=P, MASKED=mask is not None,
            ADDED=mask is not None and mask.dtype != torch.bool, BLOCK=BLOCK, **widths,
            num_warps=4, num_stages=2,
        )  # fmt: skip
        _whole[(B * H,)](
            sums_BHPD, tops_2BHP, y_BH1D, B * H * P, P=P, PP=triton.next_power_of_2(P), **widths,
            num_warps=2,
        )  # fmt: skip
    return y_BH1D


_attend = torch.library.custom_op(
    "sparsecraft::attend",
    _launch,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? mask, float? scale) -> Tensor",
)


@_attend.register_fake
def _(q, k, v, mask, scale):
    return q.new_empty(q.shape)


OPERATOR = torch.ops.sparsecraft.attend.default  # in a compiler's graph

if triton is not None:

    @triton.jit
    def _part(
        q, k, v, mask, sums, tops, scale, N, L, of_mask_b, of_mask_l, of_kb, of_kn, of_kl, of_vb,
        of_vn, of_vl, of_total, G: tl.constexpr, GP: tl.constexpr, P: tl.constexpr,
        MASKED: tl.constexpr, ADDED: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
        DP: tl.constexpr,
    ):  # fmt: skip
        b, n, p = tl.program_id(0) // N, tl.program_id(0) % N, tl.program_id(1)
        g, d, j = tl.arange(0, GP), tl.arange(0, DP), tl.arange(0, BLOCK)
        head_G = (b * N + n) * G + g
        live_GD = (g < G)[:, None] & (d < D)[None, :]
        q_GD = tl.load(q + head_G[:, None] * D + d[None, :], mask=live_GD, other=0.0)
        of_k = k + b.to(tl.int64) * of_kb + n * of_kn
        of_v = v + b.to(tl.int64) * of_vb + n * of_vn
        top_G = tl.full((GP,), float("-inf"), tl.float32)
        total_G = tl.zeros((GP,), tl.float32)
        sum_GD = tl.zeros((GP, DP), tl.float32)
        for start in range(p * BLOCK, L, P * BLOCK):
            i = start + j
            live_L = i < L
            added_L = tl.zeros((BLOCK,), tl.float32)
            if MASKED:
                given_L = tl.load(mask + b * of_mask_b + i * of_mask_l, mask=live_L, other=0)
                if ADDED:
                    added_L = given_L.to(tl.float32)
                    live_L = live_L & (added_L > float("-inf"))
                    # The smallest number of a type hides a position too, and overflows below.
                    added_L = tl.maximum(added_L, -2e38)
                else:
                    live_L = live_L & (given_L != 0)
            if tl.max(live_L.to(tl.int32), 0) > 0:
                live = live_L[None, :] & (d < D)[:, None]
                k_DL = tl.load(of_k + i[None, :] * of_kl + d[:, None], mask=live, other=0.0)
                s_GL = tl.dot(q_GD, k_DL, input_precision="ieee") * scale + added_L[None, :]
                # In powers of two, which the hardware raises.
                s_GL = tl.where(live_L[None, :], s_GL * 1.4426950408889634, float("-inf"))
                higher_G = tl.maximum(top_G, tl.max(s_GL, 1))
                raised_GL = tl.exp2(s_GL - higher_G[:, None])
                before_G = tl.exp2(top_G - higher_G)
                live = live_L[:, None] & (d < D)[None, :]
                v_LD = tl.load(of_v + i[:, None] * of_vl + d[None, :], mask=live, other=0.0)
                new_GD = tl.dot(raised_GL.to(v_LD.dtype), v_LD, input_precision="ieee")
                sum_GD = sum_GD * before_G[:, None] + new_GD
                total_G = total_G * before_G + tl.sum(raised_GL, 1)
                top_G = higher_G
        at_G = head_G * P + p
        tl.store(sums + at_G[:, None] * D + d[None, :], sum_GD, mask=live_GD)
        tl.store(tops + at_G, top_G, mask=g < G)
        tl.store(tops + of_total + at_G, total_G, mask=g < G)

    @triton.jit
    def _whole(
        sums, tops, y, of_total, P: tl.constexpr, PP: tl.constexpr, D: tl.constexpr,
        DP: tl.constexpr,
    ):  # fmt: skip
        h, p, d = tl.program_id(0), tl.arange(0, PP), tl.arange(0, DP)
        top_P = tl.load(tops + h * P + p, mask=p < P, other=float("-inf"))
        total_P = tl.load(tops + of_total + h * P + p, mask=p < P, other=0.0)
        share_P = tl.where(total_P > 0, tl.exp2(top_P - tl.max(top_P, 0)), 0.0)
        live = (p < P)[:, None] & (d < D)[None, :]
        sum_PD = tl.load(sums + (h * P + p)[:, None] * D + d[None, :], mask=live, other=0.0)
        total = tl.sum(share_P * total_P, 0)
        y_D = tl.sum(sum_PD * share_P[:, None], 0) / tl.where(total > 0, total, 1.0)
        tl.store(y + h * D + d, y_D.to(y.dtype.element_ty), mask=d < D)
