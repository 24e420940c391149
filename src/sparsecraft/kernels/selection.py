"""Which experts each token uses: the scores of a few tokens, the rules, and the list of experts
that any token uses. Each Triton kernel stands beside the torch code it equals.

Nothing here waits for the device. Shapes: T tokens, D features, N outputs, E experts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsecraft.errors import SparsecraftError
from sparsecraft.kernels.device import FEW_TOKENS, needs_grad, usable

try:  # absent from CPU builds of torch
    import triton
    import triton.language as tl
except ImportError:
    triton = None

RULES = ("top_k", "share", "relative", "threshold")
OUTCOMES = ("none", "sigmoid", "relu", "tanh", "abs")
MAX_EXPERTS = 16384  # of one token in the registers of one program
TILE = 8192  # scores of several tokens at once, likewise
ROWS = 4  # of the router's weights in one program, for several tokens; as `_score_many` is written
LISTED_TOKENS = 2  # up to here the experts in use are listed at once: `gather` is the fast path
# Whether a kernel for a few tokens is sent to the multiprocessors before the one in front of it
# has ended: it then waits there. Compute capability 9.0 or later.
EARLY_LAUNCH = False


@dataclass(frozen=True, slots=True)
class Active:
    """The experts that at least one token uses.

    Attributes:
        list_E: int32, ascending, then -1 in the places that are left.
        count: int32, of one element, how many there are; it stays on the device.
    """

    list_E: Tensor
    count: Tensor


def score(
    x_TD: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None = None,
    outcome: str = "none",
    unit: bool = False,
) -> Tensor:
    """outcome(x @ weight^T + bias) in float32, in one launch for a few tokens without gradients.

    Args:
        unit: divide each token by its length first; a token of zeros stays zero.
    """
    if outcome not in OUTCOMES:
        raise SparsecraftError(f"Unknown outcome '{outcome}'. Use one of {', '.join(OUTCOMES)}.")
    few = 0 < x_TD.numel() <= FEW_TOKENS * x_TD.shape[-1]
    bias = () if bias_N is None else (bias_N,)
    if not (few and usable(x_TD)) or needs_grad(x_TD, weight_ND, *bias):
        return score_torch(x_TD, weight_ND, bias_N, outcome, unit)
    (T, D), N = x_TD.shape, weight_ND.shape[0]
    y_TN = x_TD.new_empty(T, N, dtype=torch.float32)
    TP, width = triton.next_power_of_2(T), triton.next_power_of_2(D)
    block = min(4096 if T == 1 else min(1024, TILE // TP), width)
    (_score if T == 1 else _score_many)[(N if T == 1 else triton.cdiv(N, ROWS),)](
        x_TD.contiguous(), weight_ND.contiguous(), y_TN if bias_N is None else bias_N, y_TN,
        T, D, N, BIASED=bias_N is not None, OUTCOME=OUTCOMES.index(outcome), UNIT=unit,
        TP=TP, BLOCK=block, num_warps=max(1, min(16, TP * block // 512)), **early(x_TD.device),
    )  # fmt: skip
    return y_TN


def early(device: torch.device) -> dict:
    """Options of a launch, as `EARLY_LAUNCH` says."""
    if EARLY_LAUNCH and device.type == "cuda" and _may_be_early(device.index):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@functools.cache
def _may_be_early(device: int) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)


def score_torch(
    x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None, outcome: str, unit: bool
) -> Tensor:
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    with torch.autocast(x_TD.device.type, enabled=False):
        y_TN = F.linear(x_TD.to(dtype), weight_ND.to(dtype))
        if unit:
            y_TN = y_TN / x_TD.to(dtype).norm(dim=-1, keepdim=True).clamp(min=1e-30)
        y_TN = y_TN if bias_N is None else y_TN + bias_N.to(dtype)
    return y_TN if outcome == "none" else getattr(torch, outcome)(y_TN)


def select(
    scores_TE: Tensor, rule: str, k: int = 1, threshold: float | Tensor = 0.5
) -> tuple[Tensor, Active | None]:
    """Ones where a token uses an expert and zeros elsewhere, float32; and the experts in use.

    top_k      the k largest scores; of equal ones the first.
    share      the fewest largest scores whose sum reaches `threshold` of the whole; of equal ones
               the first. Scores below zero count as zero. Sums are exact, of scores in units of
               2^-40 of the largest or finer, so that every device selects the same.
    relative   scores of at least `threshold` times the largest.
    threshold  scores above `threshold`.

    A NaN is less than every number. All rules but `threshold` select at least one expert.

    Args:
        threshold: a number, or a tensor of one on the scores' device, whose value may change
            under a captured graph.

    Returns:
        The weights, and the list that `gather` takes; None on a CPU and for many tokens, where it
        would not be used, and for several of `top_k` and `share`, where it is a launch of its own.
    """
    E = scores_TE.shape[-1]
    if rule not in RULES:
        raise SparsecraftError(f"Unknown rule '{rule}'. Use one of {', '.join(RULES)}.")
    if rule == "top_k" and not 1 <= k <= E:
        raise SparsecraftError(f"top_k of {k} among {E} experts: k must be from 1 to {E}.")
    if not (usable(scores_TE) and scores_TE.numel() and E <= MAX_EXPERTS):
        weights_TE = select_torch(scores_TE, rule, k, threshold)
        return weights_TE, active_torch(weights_TE) if scores_TE.is_cuda else None
    scores_TE = scores_TE.float().contiguous()
    weights_TE = torch.empty_like(scores_TE)
    return weights_TE, _launch(scores_TE, weights_TE, RULES.index(rule), k, threshold)


def select_torch(scores_TE: Tensor, rule: str, k: int, threshold: float | Tensor) -> Tensor:
    """The weights of `select` by sorting; equal to the kernel's, ties included."""
    scores_TE = scores_TE.detach().float()
    scores_TE = scores_TE.where(scores_TE == scores_TE, -torch.inf)
    threshold = torch.as_tensor(threshold, dtype=torch.float32, device=scores_TE.device)
    if rule == "threshold":
        return (scores_TE > threshold).float()
    sorted_TE, order_TE = scores_TE.sort(dim=-1, descending=True, stable=True)
    first_T1 = sorted_TE[:, :1]
    if rule == "top_k":
        chosen_TE = torch.arange(scores_TE.shape[-1], device=scores_TE.device) < k
        chosen_TE = chosen_TE.expand_as(scores_TE).clone()
    elif rule == "relative":
        chosen_TE = (sorted_TE >= threshold * first_T1) & (sorted_TE > -torch.inf)
    else:
        units_TE = _units(sorted_TE)
        limit_T1 = threshold.double() * units_TE.sum(-1, keepdim=True)
        chosen_TE = units_TE.cumsum(-1) - units_TE < limit_T1
    chosen_TE[:, 0] = True
    return torch.zeros_like(scores_TE).scatter_(1, order_TE, chosen_TE.float())


def _units(sorted_TE: Tensor) -> Tensor:
    """Scores as whole numbers in float64 that sum exactly: the largest is just below 2^bits."""
    scores_TE = sorted_TE.clamp(0, torch.finfo(torch.float32).max)
    bits = 52 - max(0, scores_TE.shape[-1] - 1).bit_length()
    exponent_T1 = scores_TE[:, :1].contiguous().view(torch.int32) >> 23
    scale_T1 = (exponent_T1.long().neg() + (1149 + bits) << 52).view(torch.float64)
    return (scores_TE.double() * scale_T1).floor()


def active(weights_TE: Tensor) -> Active:
    """The experts with a weight that is not zero, of weights made elsewhere."""
    if not (usable(weights_TE) and weights_TE.numel() and weights_TE.shape[-1] <= MAX_EXPERTS):
        return active_torch(weights_TE)
    return _launch(weights_TE.float().contiguous(), None, len(RULES), 0, 0.0)


def active_torch(weights_TE: Tensor) -> Active:
    used_E = (weights_TE != 0).any(0)
    order_E = (~used_E).to(torch.uint8).sort(stable=True).indices
    list_E = order_E.where(used_E[order_E], -1).to(torch.int32)
    return Active(list_E, used_E.sum(dtype=torch.int32)[None])


def _launch(
    scores_TE: Tensor, weights_TE: Tensor | None, rule: int, k: int, threshold
) -> Active | None:
    T, E = scores_TE.shape
    EP = max(16, triton.next_power_of_2(E))
    cuts = RULES[rule : rule + 1] in (("top_k",), ("share",))
    # A cut is found in many steps: one program for each token, and no list of all of them.
    apart = weights_TE is not None and (1 if cuts else LISTED_TOKENS) < T
    TB = 1 if apart or T == 1 else max(1, min(16, TILE // EP))
    # A warp that is alone waits for no other at each of the steps.
    warps = max(1, min(16, EP // 1024 if cuts else TB * EP // 256))
    used = Active(
        torch.empty(E, dtype=torch.int32, device=scores_TE.device),
        torch.empty(1, dtype=torch.int32, device=scores_TE.device),
    )
    if pointer := isinstance(threshold, Tensor):
        threshold = threshold.float()
    _select[(T if apart else 1,)](
        scores_TE, threshold, scores_TE if weights_TE is None else weights_TE, used.list_E,
        used.count, T, E, k, RULE=rule, POINTER=pointer, LISTS=not apart, TB=TB, EP=EP,
        BITS=52 - max(0, E - 1).bit_length(), num_warps=warps, **early(scores_TE.device),
    )  # fmt: skip
    return None if apart else used


if triton is not None:

    @triton.jit
    def _in_turn(PDL: tl.constexpr):
        # Nothing is read or written before all that came before has been: kernels in a row each
        # wait for the one in front of them, hence for all.
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()

    @triton.jit
    def _outcome(y_T, OUTCOME: tl.constexpr):
        if OUTCOME == 1:
            y_T = tl.sigmoid(y_T)
        elif OUTCOME == 2:
            y_T = tl.where(y_T < 0.0, 0.0, y_T)  # a NaN stays
        elif OUTCOME == 3:
            y_T = 2.0 * tl.sigmoid(2.0 * y_T) - 1.0
        elif OUTCOME == 4:
            y_T = tl.abs(y_T)
        return y_T

    @triton.jit
    def _score(
        x, weight, bias, y, T, D, N, BIASED: tl.constexpr, OUTCOME: tl.constexpr,
        UNIT: tl.constexpr, PDL: tl.constexpr, TP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        _in_turn(PDL)
        n = tl.program_id(0)
        sum_D, square_D = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for start in range(0, D, BLOCK):
            d = start + tl.arange(0, BLOCK)
            w_D = tl.load(weight + n.to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32)
            x_D = tl.load(x + d, mask=d < D, other=0.0).to(tl.float32)
            sum_D += w_D * x_D
            if UNIT:
                square_D += x_D * x_D
        s = tl.sum(sum_D, 0)
        if UNIT:
            s /= tl.maximum(tl.sqrt(tl.sum(square_D, 0)), 1e-30)
        if BIASED:
            s += tl.load(bias + n).to(tl.float32)
        tl.store(y + n, _outcome(s, OUTCOME))

    @triton.jit
    def _score_many(
        x, weight, bias, y, T, D, N, BIASED: tl.constexpr, OUTCOME: tl.constexpr,
        UNIT: tl.constexpr, PDL: tl.constexpr, TP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        _in_turn(PDL)
        n, t = tl.program_id(0) * 4, tl.arange(0, TP)
        s0_TD, square_TD = tl.zeros((TP, BLOCK), tl.float32), tl.zeros((TP, BLOCK), tl.float32)
        s1_TD, s2_TD, s3_TD = s0_TD, s0_TD, s0_TD
        for start in tl.range(0, D, BLOCK, num_stages=3):
            d = start + tl.arange(0, BLOCK)
            live = (t < T)[:, None] & (d < D)[None, :]
            x_TD = tl.load(x + t[:, None] * D + d[None, :], mask=live, other=0.0).to(tl.float32)
            s0_TD += x_TD * _router_row(weight, n, N, d, D)
            s1_TD += x_TD * _router_row(weight, n + 1, N, d, D)
            s2_TD += x_TD * _router_row(weight, n + 2, N, d, D)
            s3_TD += x_TD * _router_row(weight, n + 3, N, d, D)
            if UNIT:
                square_TD += x_TD * x_TD
        length_T = tl.full((TP,), 1.0, tl.float32)
        if UNIT:
            length_T = tl.maximum(tl.sqrt(tl.sum(square_TD, 1)), 1e-30)
        for i in tl.static_range(4):
            s_TD = s0_TD if i == 0 else s1_TD if i == 1 else s2_TD if i == 2 else s3_TD
            s_T = tl.sum(s_TD, 1) / length_T
            if BIASED:
                s_T += tl.load(bias + n + i, mask=n + i < N, other=0.0).to(tl.float32)
            tl.store(y + t * N + n + i, _outcome(s_T, OUTCOME), mask=(t < T) & (n + i < N))

    @triton.jit
    def _router_row(weight, n, N, d, D):
        at = weight + n.to(tl.int64) * D + d
        return tl.load(at, mask=(d < D) & (n < N), other=0.0).to(tl.float32)[None, :]

    @triton.jit
    def _select(
        scores, threshold, weights, listed, count, T, E, k, RULE: tl.constexpr,
        POINTER: tl.constexpr, LISTS: tl.constexpr, TB: tl.constexpr, EP: tl.constexpr,
        BITS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        _in_turn(PDL)
        e = tl.arange(0, EP)
        used_E = tl.zeros((EP,), tl.int32)
        limit = threshold
        if POINTER:
            limit = tl.load(threshold)
        begin = tl.program_id(0)
        for start in range(begin, T if LISTS else begin + 1, TB):
            t = start + tl.arange(0, TB)
            live = (t < T)[:, None] & (e < E)[None, :]
            at = t[:, None] * E + e[None, :]
            if RULE == 4:  # weights made elsewhere
                chosen = (tl.load(scores + at, mask=live, other=0.0) != 0.0).to(tl.int32)
            else:
                s_TE = tl.load(scores + at, mask=live, other=float("-inf"))
                s_TE = tl.where(s_TE == s_TE, s_TE, float("-inf"))
                s_TE = tl.where(s_TE == 0.0, 0.0, s_TE)  # -0.0 ties with 0.0
                chosen = _rule(s_TE, limit, e, k, RULE, EP, BITS) & live.to(tl.int32)
                tl.store(weights + at, chosen.to(tl.float32), mask=live)
            used_E |= tl.max(chosen, 0)
        if LISTS:  # a place for each: those in use first, then the others
            before_E, number = tl.cumsum(used_E, 0) - used_E, tl.sum(used_E, 0)
            place_E = tl.where(used_E > 0, before_E, number + e - before_E)
            tl.store(listed + place_E, tl.where(used_E > 0, e, -1), mask=e < E)
            tl.store(count, number)

    @triton.jit
    def _rule(
        s_TE, limit, e, k, RULE: tl.constexpr, EP: tl.constexpr, BITS: tl.constexpr,
    ):  # fmt: skip
        if RULE == 3:
            return (s_TE > limit).to(tl.int32)
        largest_T, index_T = tl.max(s_TE, 1), tl.argmax(s_TE, 1)
        first = (e[None, :] == index_T[:, None]).to(tl.int32)
        if RULE == 2:
            enough = (s_TE >= (limit * largest_T)[:, None]) & (s_TE > float("-inf"))
            return enough.to(tl.int32) | first
        # Unsigned numbers in the order of the scores.
        bits = s_TE.to(tl.uint32, bitcast=True)
        key_TE = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
        if RULE == 0:
            value_TE = tl.full(s_TE.shape, 1, tl.int32)
            limit_T = tl.zeros_like(index_T) + k
        else:
            finite_TE = tl.minimum(tl.maximum(s_TE, 0.0), 3.4028234663852886e38)
            top_T = tl.max(finite_TE, 1).to(tl.int32, bitcast=True) >> 23
            scale_T = ((1149 + BITS) - top_T).to(tl.int64) << 52
            scale_T = scale_T.to(tl.float64, bitcast=True)
            value_TE = tl.floor(finite_TE.to(tl.float64) * scale_T[:, None])
            limit_T = limit.to(tl.float64) * tl.sum(value_TE, 1)
        # The largest key above or at which the values still reach the limit, bit by bit; for
        # top-k any key with just k at or above it. One token, so that the loop can end early.
        cut_T, left = tl.zeros_like(index_T).to(tl.uint32), 32
        bit = tl.full((1,), 0x80000000, tl.uint32)
        while left > 0:
            higher_T = cut_T | bit
            sums_T = tl.sum(tl.where(key_TE >= higher_T[:, None], value_TE, 0), 1)
            cut_T = tl.where(sums_T >= limit_T, higher_T, cut_T)
            bit, left = bit >> 1, left - 1
            if RULE == 0:
                left = tl.where(tl.max((sums_T == limit_T).to(tl.int32), 0) > 0, 0, left)
        above, ties = key_TE > cut_T[:, None], (key_TE == cut_T[:, None]).to(tl.int32)
        rank_TE = tl.cumsum(ties, 1) - ties
        before_TE = tl.sum(tl.where(above, value_TE, 0), 1)[:, None] + rank_TE * value_TE
        at_cut = (ties > 0) & (before_TE < limit_T[:, None])
        if RULE == 0:
            return (above | at_cut).to(tl.int32)
        return ((above | at_cut) & (limit_T > 0.0)[:, None]).to(tl.int32) | first
