"""Products of a handful of tokens with several matrices in one launch, each with a low-rank update
or without, without gradients.

Shapes: T tokens, D width, N rows of a matrix; of an update E experts, R rank, Z = E*R, or R where
they share their first matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecraft.kernels.device import FEW_TOKENS, is_followed, runs
from sparsecraft.kernels.product import low_rank

try:  # absent from CPU builds of torch
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Of one token: rows of a matrix in one program, numbers that it reads of each at a time.
ROWS, BLOCK, WARPS = 1, 2048, 4
# Of several, whose products tensor cores compute: rows, numbers of each, warps; where there are few
# rows, and where there are many.
NARROW_TILE, WIDE_TILE, MANY_ROWS, STAGES = (16, 256, 2), (64, 128, 4), 8192, 4
FEWEST_TILES = 1024  # rows from which on tiles keep a GPU busy
RANKS = 64  # that are read at a time


class Low(NamedTuple):
    """scale * sum_e gate_e B_e z_e, which is added to a product.

    Attributes:
        gate_TE: None where all are one.
        b_ENR: whose rows are those of the matrix.
    """

    z_TZ: Tensor
    gate_TE: Tensor | None
    b_ENR: Tensor
    scale: float


def products(
    x_TD: Tensor,
    weights_ND: Sequence[Tensor],
    wide: Sequence[bool],
    lows: Sequence[Low | None] = (),
) -> list[Tensor]:
    """x @ weight^T (T, N) of each matrix, and its update, summed in float32.

    Under torch.compile it is one operator.

    Args:
        weights_ND: each of a type of its own.
        wide: which products are float32; the others have the type of x.
        lows: of each matrix; empty where none has any.
    """
    run = _products if is_followed(x_TD) else _launch
    return run(x_TD, list(weights_ND), list(wide), *flat(lows))


def flat(lows: Sequence[Low | None]) -> tuple[list[Tensor | None], list[float]]:
    """The operator's arguments for these updates."""
    tensors = [t for low in lows for t in (low[:3] if low else (None,) * 3)]
    return tensors, [low.scale if low else 0.0 for low in lows]


def in_torch(
    x_TD: Tensor,
    weights_ND: Sequence[Tensor],
    wide: Sequence[bool],
    lows: Sequence[Tensor | None] = (),
    scales: Sequence[float] = (),
) -> list[Tensor]:
    """The specification of `products`, of the operator's arguments."""
    found = _empty(x_TD, weights_ND, wide)
    for i, (y_TN, weight_ND) in enumerate(zip(found, weights_ND, strict=True)):
        sum_TN = x_TD.float() @ weight_ND.float().t()
        if scales and lows[3 * i] is not None:
            sum_TN += low_rank(*lows[3 * i : 3 * i + 3], scales[i])
        y_TN.copy_(sum_TN)
    return found


def _launch(
    x_TD: Tensor,
    weights_ND: list[Tensor],
    wide: list[bool],
    lows: list[Tensor | None],
    scales: list[float],
) -> list[Tensor]:
    if not runs(x_TD):
        return in_torch(x_TD, weights_ND, wide, lows, scales)
    (T, D), found = x_TD.shape, _empty(x_TD, weights_ND, wide)
    numbers = [len(weight_ND) for weight_ND in weights_ND]
    tiles = fits_tiles(x_TD, weights_ND) and sum(numbers) >= FEWEST_TILES
    each, tile, warps = WIDE_TILE if sum(numbers) >= MANY_ROWS else NARROW_TILE
    each, firsts = each if tiles else ROWS, [0]
    for number in numbers:
        firsts.append(firsts[-1] + triton.cdiv(number, each))
    lows = lows or [None] * (3 * len(numbers))
    updates = _ranks(lows) | {"SCALES": tuple(scales or [0.0] * len(numbers)), "CB": RANKS}
    given = [x_TD if t is None else t.contiguous() for t in lows]
    arguments = (
        x_TD.contiguous(), tuple(w.contiguous() for w in weights_ND), tuple(found),
        tuple(given[::3]), tuple(given[1::3]), tuple(given[2::3]),
    )  # fmt: skip
    split = {"FIRSTS": tuple(firsts), "NS": tuple(numbers), **updates}
    with torch.cuda.device_of(x_TD):  # Triton launches on the current one
        if tiles:
            _tiles[(firsts[-1],)](
                *arguments,
                T,
                D=D,
                TP=FEW_TOKENS,
                BN=each,
                BK=tile,
                **split,
                num_warps=warps,
                num_stages=STAGES,
            )
        else:
            block = min(BLOCK, triton.next_power_of_2(D))
            _rows[(firsts[-1], T)](*arguments, D, BN=each, BLOCK=block, **split, num_warps=WARPS)
    return found


def fits_tiles(x_TD: Tensor, weights_ND: Sequence[Tensor]) -> bool:
    """Whether tensor cores multiply these as they are."""
    half = x_TD.dtype.itemsize == 2 and 1 < len(x_TD) <= FEW_TOKENS
    return half and all(weight.dtype == x_TD.dtype for weight in weights_ND)


def _ranks(lows: list[Tensor | None]) -> dict[str, tuple[int, ...]]:
    """Of every update experts, rank (0: there is none), how far the z of two experts are apart, and
    whether it is gated."""
    found = []
    for z_TZ, gate_TE, b_ENR in zip(lows[::3], lows[1::3], lows[2::3], strict=True):
        if b_ENR is None:
            found.append((0, 0, 0, False))
            continue
        E, _, R = b_ENR.shape
        found.append((E, R, R if z_TZ.shape[1] == E * R else 0, gate_TE is not None))
    return dict(zip(("ES", "RS", "APART", "GATED"), zip(*found, strict=True), strict=True))


def _empty(x_TD: Tensor, weights_ND: list[Tensor], wide: list[bool], *lows) -> list[Tensor]:
    return [
        x_TD.new_empty(len(x_TD), len(weight_ND), dtype=torch.float32 if each else x_TD.dtype)
        for weight_ND, each in zip(weights_ND, wide, strict=True)
    ]


_products = torch.library.custom_op(
    "sparsecraft::products",
    _launch,
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, bool[] wide, Tensor?[] lows, float[] scales) -> Tensor[]",
)
_products.register_fake(_empty)
OPERATOR = torch.ops.sparsecraft.products.default  # in a compiler's graph

if triton is not None:

    @triton.jit
    def _read_z(
        z, gate, t, live, c, E: tl.constexpr, R: tl.constexpr, APART: tl.constexpr,
        GATED: tl.constexpr,
    ):  # fmt: skip
        """z of tokens t and ranks c, times its expert's gate."""
        Z: tl.constexpr = E * R if APART > 0 else R
        found = tl.load(z + t * Z + c // R * APART + c % R, mask=live, other=0.0).to(tl.float32)
        if GATED:
            found *= tl.load(gate + t * E + c // R, mask=live, other=0.0).to(tl.float32)
        return found

    @triton.jit
    def _read_b(b, n, live_N, c, N: tl.constexpr, E: tl.constexpr, R: tl.constexpr):
        """Rows n of the matrices at ranks c, (N, C)."""
        at = ((c // R * N)[None, :] + n[:, None]) * R + (c % R)[None, :]
        live = live_N[:, None] & (c < E * R)[None, :]
        return tl.load(b + at, mask=live, other=0.0).to(tl.float32)

    @triton.jit
    def _rows(
        x, weights, found, zs, gates, bs, D, BN: tl.constexpr, BLOCK: tl.constexpr,
        FIRSTS: tl.constexpr, NS: tl.constexpr, SCALES: tl.constexpr, CB: tl.constexpr,
        ES: tl.constexpr, RS: tl.constexpr, APART: tl.constexpr, GATED: tl.constexpr,
    ):  # fmt: skip
        block, t = tl.program_id(0), tl.program_id(1)
        for i in tl.static_range(len(weights)):
            if (block >= FIRSTS[i]) & (block < FIRSTS[i + 1]):
                n = (block - FIRSTS[i]) * BN + tl.arange(0, BN)
                live_N = n < NS[i]
                row = weights[i] + n.to(tl.int64)[:, None] * D
                sum_NK = tl.zeros((BN, BLOCK), tl.float32)
                for start in range(0, D, BLOCK):
                    d = start + tl.arange(0, BLOCK)
                    x_K = tl.load(x + t * D + d, mask=d < D, other=0.0).to(tl.float32)
                    live = live_N[:, None] & (d < D)[None, :]
                    w_NK = tl.load(row + d[None, :], mask=live, other=0.0).to(tl.float32)
                    sum_NK += w_NK * x_K[None, :]
                y_N = tl.sum(sum_NK, 1)
                if RS[i] > 0:
                    for start in range(0, ES[i] * RS[i], CB):
                        c = start + tl.arange(0, CB)
                        z_C = _read_z(
                            zs[i], gates[i], t, c < ES[i] * RS[i], c, ES[i], RS[i], APART[i],
                            GATED[i],
                        )  # fmt: skip
                        b_NC = _read_b(bs[i], n, live_N, c, NS[i], ES[i], RS[i])
                        y_N += SCALES[i] * tl.sum(b_NC * z_C[None, :], 1)
                tl.store(found[i] + t * NS[i] + n, y_N.to(found[i].dtype.element_ty), mask=live_N)

    @triton.jit
    def _tiles(
        x, weights, found, zs, gates, bs, T, D: tl.constexpr, TP: tl.constexpr, BN: tl.constexpr,
        BK: tl.constexpr, FIRSTS: tl.constexpr, NS: tl.constexpr, SCALES: tl.constexpr,
        CB: tl.constexpr, ES: tl.constexpr, RS: tl.constexpr, APART: tl.constexpr,
        GATED: tl.constexpr,
    ):  # fmt: skip
        block, t = tl.program_id(0), tl.arange(0, TP)
        for i in tl.static_range(len(weights)):
            if (block >= FIRSTS[i]) & (block < FIRSTS[i + 1]):
                n = (block - FIRSTS[i]) * BN + tl.arange(0, BN)
                live_N = n < NS[i]
                row = weights[i] + n.to(tl.int64)[:, None] * D
                y_NT = tl.zeros((BN, TP), tl.float32)
                for start in range(0, D, BK):
                    d = start + tl.arange(0, BK)
                    of_x = (t < T)[None, :] & (d < D)[:, None]
                    x_KT = tl.load(x + t[None, :] * D + d[:, None], mask=of_x, other=0.0)
                    live = live_N[:, None] & (d < D)[None, :]
                    y_NT = tl.dot(tl.load(row + d[None, :], mask=live, other=0.0), x_KT, y_NT)
                if RS[i] > 0:
                    for start in range(0, ES[i] * RS[i], CB):
                        c = start + tl.arange(0, CB)
                        of_z = (c < ES[i] * RS[i])[:, None] & (t < T)[None, :]
                        z_CT = _read_z(
                            zs[i], gates[i], t[None, :], of_z, c[:, None], ES[i], RS[i], APART[i],
                            GATED[i],
                        )  # fmt: skip
                        b_NC = _read_b(bs[i], n, live_N, c, NS[i], ES[i], RS[i])
                        y_NT += SCALES[i] * tl.dot(b_NC, z_CT, input_precision="ieee")
                live = live_N[:, None] & (t < T)[None, :]
                at = found[i] + t[None, :] * NS[i] + n[:, None]
                tl.store(at, y_NT.to(found[i].dtype.element_ty), mask=live)
