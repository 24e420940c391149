"""Triton kernels for the memory-bound steps of `grouped`, each beside the torch code it equals.

Shapes: T tokens, K slots per token, S = T*K sorted slots, E experts, O features, C chunks of S.
Under torch.compile the torch code is used: the compiler fuses it itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecraft.kernels.device import usable

try:  # absent from CPU builds of torch
    import triton
    import triton.language as tl
except ImportError:
    triton = None

CHUNK = 512
# `plan` holds the counts of all chunks in registers; beyond this it sorts.
MAX_COUNTS = 8192


def plan(indices_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slots sorted by expert, stably; every index is below `num_experts`.

    Returns:
        ends_E: int32, where each expert's slots end.
        order_S: which of the T*K slots stands at each sorted place.
        slot_TK: flat, the sorted place of each slot (the inverse of `order_S`).
    """
    indices_S = indices_TK.flatten()
    S = indices_S.numel()
    if usable(indices_S) and S:
        chunks, experts = triton.cdiv(S, CHUNK), triton.next_power_of_2(num_experts)
        if triton.next_power_of_2(chunks) * experts <= MAX_COUNTS:
            return _plan_triton(indices_S, num_experts, chunks, experts)
    # Narrow keys sort in fewer passes.
    narrow = indices_S.to(torch.uint8 if num_experts <= 256 else torch.int32)
    expert_S, order_S = narrow.sort(stable=True)
    experts_E = torch.arange(num_experts, device=indices_S.device, dtype=expert_S.dtype)
    ends_E = torch.searchsorted(expert_S, experts_E, right=True).to(torch.int32)
    places_S = torch.arange(S, device=indices_S.device)
    return ends_E, order_S, torch.empty_like(order_S).scatter_(0, order_S, places_S)


def combine(
    y_SO: Tensor, slot_TK: Tensor, K: int, x_TO: Tensor | None = None, empty: bool = False
) -> Tensor:
    """The sum of each token's K rows of y_SO, plus x_TO where given, summed in float32.

    Args:
        empty: there may be slots below zero, which have no row.
    """
    O = y_SO.shape[-1]
    if not (usable(y_SO) and y_SO.is_contiguous() and (x_TO is None or x_TO.is_contiguous())):
        rows_TKO = y_SO[slot_TK.clamp_min(0)] if empty else y_SO[slot_TK]
        if empty:  # whatever stands in the row that is read in their place
            rows_TKO = rows_TKO.where(slot_TK[:, None] >= 0, 0)
        y_TO = rows_TKO.view(-1, K, O).sum(1)
        return y_TO if x_TO is None else y_TO + x_TO
    out_TO = y_SO.new_empty(slot_TK.numel() // K, O)
    if out_TO.numel():
        block = min(4096, triton.next_power_of_2(O))
        grid = (out_TO.shape[0], triton.cdiv(O, block))
        x_TO = out_TO if x_TO is None else x_TO
        residual = x_TO is not out_TO
        _combine[grid](y_SO, slot_TK, x_TO, out_TO, O, K=K, RESIDUAL=residual, BLOCK=block)
    return out_TO


def _plan_triton(indices_S: Tensor, num_experts: int, chunks: int, experts: int):
    S, new = indices_S.numel(), indices_S.new_empty
    counts_CE = new(chunks, experts, dtype=torch.int32)
    ends_E = new(num_experts, dtype=torch.int32)
    order_S, slot_TK = new(S), new(S)
    _count[(chunks,)](indices_S, counts_CE, S, E=experts, CHUNK=CHUNK)
    _place[(chunks,)](
        indices_S, counts_CE, ends_E, order_S, slot_TK, S, chunks, num_experts,
        C=triton.next_power_of_2(chunks), E=experts, CHUNK=CHUNK,
    )  # fmt: skip
    return ends_E, order_S, slot_TK


if triton is not None:

    @triton.jit
    def _combine(y, slot, x, out, O, K: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):
        t = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < O
        total = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(K):
            row = tl.load(slot + t * K + k)
            filled = inside & (row >= 0)
            total += tl.load(y + row * O + column, mask=filled, other=0.0).to(tl.float32)
        if RESIDUAL:
            total += tl.load(x + t * O + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + t * O + column, total.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _count(indices, counts, S, E: tl.constexpr, CHUNK: tl.constexpr):
        chunk = tl.program_id(0)
        s = chunk * CHUNK + tl.arange(0, CHUNK)
        expert = tl.load(indices + s, mask=s < S, other=E).to(tl.int32)
        hit = (expert[:, None] == tl.arange(0, E)[None, :]).to(tl.int32)
        tl.store(counts + chunk * E + tl.arange(0, E), tl.sum(hit, 0))

    @triton.jit
    def _place(
        indices, counts, ends, order, slot, S, chunks, num_experts,
        C: tl.constexpr, E: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        chunk = tl.program_id(0)
        e, c = tl.arange(0, E), tl.arange(0, C)
        all_CE = tl.load(counts + c[:, None] * E + e[None, :], mask=(c < chunks)[:, None], other=0)
        total_E = tl.sum(all_CE, 0)
        end_E = tl.cumsum(total_E, 0)
        before_E = tl.sum(tl.where((c < chunk)[:, None], all_CE, 0), 0)
        first_E = end_E - total_E + before_E  # where this chunk's slots of each expert begin
        if chunk == 0:
            tl.store(ends + e, end_E, mask=e < num_experts)
        s = chunk * CHUNK + tl.arange(0, CHUNK)
        expert = tl.load(indices + s, mask=s < S, other=E).to(tl.int32)
        hit = (expert[:, None] == e[None, :]).to(tl.int32)
        rank = tl.cumsum(hit, 0) - 1 + first_E[None, :]
        place = tl.sum(tl.where(hit > 0, rank, 0), 1).to(tl.int64)
        tl.store(slot + s, place, mask=s < S)
        tl.store(order + place, s.to(tl.int64), mask=s < S)
