"""Products with a few rows: float32 sums of bf16 products, float32 matrices as bf16 parts, and the
launches of a low-rank update for a handful of tokens.

Shapes: T tokens, D width, N plain rows, E rows that are split, P stacked rows, M rows,
O output features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsecraft.kernels.device import usable

try:  # absent from CPU builds of torch
    import triton
    import triton.language as tl
except ImportError:
    triton = None

ALIGNMENT = 8  # bf16 numbers in 16 bytes
MAX_RANKS = 1024  # experts times rank that `add_lora` unrolls

HIGH, MIDDLE, LOW = 0, 1, 2


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in float32 at least; a product of two bf16 numbers is exact."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    dtype = torch.promote_types(a.dtype, torch.float32)
    return a.to(dtype) @ b.to(dtype)


def stack(plain: Tensor | None, split: Tensor | None, order: tuple[int, ...], dim: int) -> Tensor:
    """One bf16 matrix: `plain`, then parts of `split`, along `dim`, padded with zeros.

    Three parts, HIGH + MIDDLE + LOW, hold all 24 bits of a float32 number.

    Args:
        order: which parts, one after the other.
    """
    present = split if plain is None else plain
    first = 0 if plain is None else plain.shape[dim]
    each = 0 if split is None else split.shape[dim]
    length = -(-(first + each * len(order)) // ALIGNMENT) * ALIGNMENT
    if usable(present) and present.numel():
        plain, split = (present if t is None else t for t in (plain, split))
        shape = (length, plain.shape[1]) if dim == 0 else (plain.shape[0], length)
        out = torch.empty(shape, dtype=torch.bfloat16, device=present.device)
        code = sum(part << 2 * i for i, part in enumerate(order))
        _stack[(triton.cdiv(out.numel(), 1024),)](
            plain, split, out, out.numel(), shape[1], first, max(each, 1), each * len(order),
            *plain.stride(), *split.stride(), CODE=code, DIM=dim, BLOCK=1024,
        )  # fmt: skip
        return out
    blocks = [] if plain is None else [plain.bfloat16()]
    if split is not None:
        parts = three_parts(split)
        blocks += [parts[i] for i in order]
    missing = length - first - each * len(order)
    return F.pad(torch.cat(blocks, dim), (0, missing) if dim else (0, 0, 0, missing))


def three_parts(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t = t.float()
    high = t.bfloat16()
    middle = (t - high).bfloat16()
    return high, middle, (t - high - middle).bfloat16()


def add_lora(
    z_TN: Tensor,
    gate_TE: Tensor | None,
    b_EOR: Tensor,
    scale: float,
    base_TO: Tensor | None,
    out_TO: Tensor,
) -> Tensor:
    """out = base + scale * sum_e gate_e B_e z_e, in one launch; out may be base. No gradients.

    Args:
        z_TN: N = E*R, or R where the experts share one A.
    """
    E, O, R = b_EOR.shape
    N, RP = z_TN.shape[1], triton.next_power_of_2(R)
    BO = max(16, min(128, 512 // RP))  # one load of 16 bytes per thread and expert, at rank 4
    gate = z_TN if gate_TE is None else gate_TE.contiguous()
    _add_lora[(triton.cdiv(O, BO), out_TO.shape[0])](
        z_TN.contiguous(), gate, b_EOR.contiguous(), out_TO if base_TO is None else base_TO,
        out_TO, O, N, scale, BASE=base_TO is not None, GATED=gate_TE is not None,
        EACH=R if N == E * R else 0, E=E, R=R, RP=RP, BO=BO,
    )  # fmt: skip
    return out_TO


def low_rank(z_TN: Tensor, gate_TE: Tensor | None, b_EOR: Tensor, scale: float) -> Tensor:
    """scale * sum_e gate_e B_e z_e in float32 at least, as `add_lora` adds it."""
    dtype = torch.promote_types(z_TN.dtype, torch.float32)
    z_TER = z_TN.to(dtype).unflatten(1, (-1, b_EOR.shape[2]))
    if gate_TE is not None:
        z_TER = z_TER * gate_TE[..., None]
    return scale * (z_TER.unsqueeze(-2) * b_EOR.to(dtype)).sum((1, 3))


def _add_low_rank(
    onto_TO: Tensor, z_TN: Tensor, gate_TE: Tensor | None, b_EOR: Tensor, scale: float
) -> Tensor:
    onto_TO = onto_TO.contiguous()
    if usable(onto_TO) and fits_add_lora(b_EOR):
        return add_lora(z_TN, gate_TE, b_EOR, scale, onto_TO, torch.empty_like(onto_TO))
    return (onto_TO + low_rank(z_TN, gate_TE, b_EOR, scale)).to(onto_TO.dtype)


# `onto` and its update, for a compiler's graph, which may make it part of a product.
add_low_rank = torch.library.custom_op(
    "sparsecraft::add_low_rank",
    _add_low_rank,
    mutates_args=(),
    schema="(Tensor onto, Tensor z, Tensor? gate, Tensor b, float scale) -> Tensor",
)


@add_low_rank.register_fake
def _(onto, z, gate, b, scale):
    return onto.new_empty(onto.shape)


UPDATE = torch.ops.sparsecraft.add_low_rank.default  # in a compiler's graph


def fits_add_lora(b_EOR: Tensor) -> bool:
    E, _, R = b_EOR.shape
    return E * R <= MAX_RANKS


if triton is not None:

    @triton.jit
    def _stack(
        plain, split, out, size, columns, first, each, parts, plain_row, plain_column, split_row,
        split_column, CODE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        at = (i % columns if DIM else i // columns) - first
        row, column, live = (i // columns).to(tl.int64), (i % columns).to(tl.int64), i < size
        own = plain + row * plain_row + column * plain_column
        value = tl.load(own, mask=live & (at < 0), other=0.0).to(tl.float32)
        # Of the split matrix: which part, of which of its rows or columns.
        part, inner = at // each, (at % each).to(tl.int64)
        split_at = row * split_row + inner * split_column
        if DIM == 0:
            split_at = inner * split_row + column * split_column
        live_split = live & (at >= 0) & (at < parts)
        whole = tl.load(split + split_at, mask=live_split, other=0.0).to(tl.float32)
        high = whole.to(tl.bfloat16).to(tl.float32)
        middle = (whole - high).to(tl.bfloat16).to(tl.float32)
        which = (CODE >> (2 * part)) & 3
        value += tl.where(which == 0, high, tl.where(which == 1, middle, whole - high - middle))
        tl.store(out + i, value.to(tl.bfloat16), mask=live)

    @triton.jit
    def _add_lora(
        z, gate, b, base, out, O, N, scale, BASE: tl.constexpr, GATED: tl.constexpr,
        EACH: tl.constexpr, E: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BO: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(1)
        o, r = tl.program_id(0) * BO + tl.arange(0, BO), tl.arange(0, RP)
        at_OR, live_OR = o[:, None] * R + r[None, :], (o < O)[:, None] & (r < R)[None, :]
        sum_O = tl.zeros((BO,), tl.float32)
        for e in tl.static_range(E):
            z_R = tl.load(z + t * N + e * EACH + r, mask=r < R, other=0.0).to(tl.float32)
            if GATED:
                z_R *= tl.load(gate + t * E + e).to(tl.float32)
            b_OR = tl.load(b + e * O * R + at_OR, mask=live_OR, other=0.0).to(tl.float32)
            sum_O += tl.sum(b_OR * z_R[None, :], 1)
        sum_O *= scale
        at = t.to(tl.int64) * O + o
        if BASE:
            sum_O += tl.load(base + at, mask=o < O, other=0.0).to(tl.float32)
        tl.store(out + at, sum_O.to(out.dtype.element_ty), mask=o < O)
