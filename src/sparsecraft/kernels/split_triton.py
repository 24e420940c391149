"""Triton kernels for `split.gather`: of a split network's weights, only the rows of experts in use
are read, once for all tokens. Equal to `split.masked`.

Two launches, no waiting: `_up_*` writes the hidden values of the experts in use, side by side, and
`_down` multiplies them with their rows; its last program of a tile adds the parts in order.
Shapes: T tokens (TP padded), E experts, H neurons of one, M rows of its first matrix (H, or 2H
when gated), D features, R rows of down in use, S parts of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsecraft.kernels.device import INTERPRETED
from sparsecraft.kernels.selection import Active, early

try:  # absent from CPU builds of torch
    import triton
    import triton.language as tl
except ImportError:
    triton = None
else:
    from sparsecraft.kernels.selection import _in_turn

MAX_TOKENS = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

FEW = 4  # tokens up to which multiply-adds on the weights' tile beat the tensor cores
# By tokens, padded: neurons of a program, features at a time, warps, and loads in flight, of a
# loop without tensor cores as STAGES. Measured by benchmarks/split/tune.py on an H200.
UP = {
    1: {"BN": 8, "BD": 512, "STAGES": 1, "num_warps": 4},
    2: {"BN": 8, "BD": 256, "STAGES": 1, "num_warps": 4},
    4: {"BN": 4, "BD": 256, "STAGES": 1, "num_warps": 4},
    16: {"BN": 32, "BD": 128, "num_warps": 4, "num_stages": 3},
}
# Rows at a time, features of a tile, programs per multiprocessor (all resident at once), warps.
DOWN = {
    1: {"BR": 32, "BD": 128, "PER_SM": 4, "num_warps": 4, "num_stages": 1},
    2: {"BR": 32, "BD": 128, "PER_SM": 4, "num_warps": 4, "num_stages": 1},
    4: {"BR": 16, "BD": 128, "PER_SM": 4, "num_warps": 4, "num_stages": 1},
    16: {"BR": 64, "BD": 256, "PER_SM": 1, "num_warps": 8, "num_stages": 3},
}
SUMMED = 8192  # partial sums in the registers of the last program
MULTIPROCESSORS = 132  # where the device does not say: the interpreter

ACTIVATIONS = {
    "SiLU": 0, "SiLUActivation": 0,
    "GELU": 1, "GELUActivation": 1,
    "GELUTanh": 2, "PytorchGELUTanh": 2, "NewGELUActivation": 2,
    "ReLU": 3,
}  # fmt: skip


def activation_code(activation: nn.Module) -> int | None:
    """The kernels' number of an activation, or None if they do not have it."""
    code = ACTIVATIONS.get(type(activation).__name__)
    if code == 1 and getattr(activation, "approximate", "none") == "tanh":
        return 2
    return code


def gather(net, x_TD: Tensor, weights_TE: Tensor, used: Active, configs: dict | None = None):
    """`split.masked` for up to 16 tokens.

    Args:
        configs: "up" and "down" in place of the constants above; for tuning.
    """
    (T, D), (E, H) = x_TD.shape, net.down_EHD.shape[:2]
    configs, TP = configs or {}, padded(T)
    up = configs.get("up") or _fit_up(UP[TP], D, H, x_TD.element_size(), TP)
    down = configs.get("down") or _fit_down(DOWN[TP], D, x_TD.element_size())
    x_TD, weights_TE = x_TD.contiguous(), weights_TE.contiguous()
    hidden_TR = x_TD.new_empty(T, E * H, dtype=torch.float32 if TP <= FEW else x_TD.dtype)
    tiles = triton.cdiv(D, down["BD"])
    arrived = torch.empty(tiles, dtype=torch.int32, device=x_TD.device)
    _up(net, x_TD, weights_TE, used, hidden_TR, arrived, dict(up))
    return _down_rows(net, hidden_TR, used, arrived, dict(down))


def padded(T: int) -> int:
    """Tokens that the kernels compute: those of the tensor cores take 16."""
    return triton.next_power_of_2(T) if T <= FEW else MAX_TOKENS


def _fit_up(config: dict, D: int, H: int, itemsize: int, TP: int) -> dict:
    """A configuration for bf16 and wide layers, cut down to this one."""
    config, width = dict(config), triton.next_power_of_2(D)
    if TP <= FEW:
        tile = config["BN"] * config["BD"] * 2 // max(2, itemsize)
        config["BD"] = min(config["BD"], width)
        # A narrow row leaves room for more of them.
        config["BN"] = max(1, min(triton.next_power_of_2(H), 16, tile // config["BD"]))
    else:
        config["BN"] = max(16, min(config["BN"], triton.next_power_of_2(H)))
        config["BD"] = max(16, min(config["BD"] * 2 // max(2, itemsize), width))
    return config


def _fit_down(config: dict, D: int, itemsize: int) -> dict:
    config = dict(config)
    config["BD"] = max(16, min(config["BD"], triton.next_power_of_2(D)))
    config["BR"] = max(16, config["BR"] * 2 // max(2, itemsize))
    return config


def _up(net, x_TD, weights_TE, used: Active, hidden_TR, arrived, config: dict) -> None:
    (T, D), (E, H) = x_TD.shape, net.down_EHD.shape[:2]
    TP, tiles = padded(T), triton.cdiv(H, config["BN"])
    more = {} if TP <= FEW else {"PRECISION": _precision(x_TD), "WIDE": INTERPRETED}
    (_up_few if TP <= FEW else _up_many)[(E * tiles,)](
        x_TD, net.first_EMD, _or(net.first_bias_EM, x_TD), _or(net.mean_EH, x_TD), weights_TE,
        used.list_E, hidden_TR, arrived, T, D, E, tiles, arrived.numel(),
        H=H, M=net.first_EMD.shape[1], BIASED=net.first_bias_EM is not None,
        MEAN=net.mean_EH is not None, ACTIVATION=activation_code(net.activation),
        EVEN=D % config["BD"] == 0, PLACES=triton.next_power_of_2(arrived.numel()), TP=TP,
        **more, **early(x_TD.device), **config,
    )  # fmt: skip


def _down_rows(net, hidden_TR, used: Active, arrived, config: dict) -> Tensor:
    T, (E, H, D) = hidden_TR.shape[0], net.down_EHD.shape
    BD, tiles = config["BD"], arrived.numel()
    TP = padded(T)
    programs = multiprocessors(hidden_TR.device) * config.pop("PER_SM")
    splits = max(1, min(programs // tiles, triton.cdiv(E * H, config["BR"])))
    part_STD = hidden_TR.new_empty(splits, T, D, dtype=torch.float32)
    y_TD = torch.empty(T, D, dtype=net.down_EHD.dtype, device=hidden_TR.device)
    _down[(tiles * splits,)](
        hidden_TR, net.down_EHD, used.list_E, used.count, _or(net.bias_D, y_TD), part_STD,
        arrived, y_TD, T, D, E, tiles, splits, H=H, BIASED=net.bias_D is not None,
        EVEN=D % BD == 0, TP=TP, PARTS=max(1, min(32, SUMMED // (TP * BD))),
        PRECISION=_precision(y_TD), WIDE=INTERPRETED, **early(y_TD.device), **config,
    )  # fmt: skip
    return y_TD


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor


def _precision(x: Tensor) -> str:
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


if triton is not None:
    FEW_TP = tl.constexpr(FEW)

    @triton.jit
    def _activate(v, ACTIVATION: tl.constexpr):
        if ACTIVATION == 0:
            v = v * tl.sigmoid(v)
        elif ACTIVATION == 1:
            v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
        elif ACTIVATION == 2:  # 0.5 (1 + tanh(z)) = sigmoid(2z)
            v = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
        else:
            v = tl.where(v < 0.0, 0.0, v)  # a NaN stays
        return v

    @triton.jit
    def _dot(a, b, acc, PRECISION: tl.constexpr, WIDE: tl.constexpr):
        if WIDE:  # the interpreter takes a bf16 operand's bits for its value
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, acc=acc, input_precision=PRECISION)

    @triton.jit
    def _rows(first, row_N, live_N, d, D, EVEN: tl.constexpr):
        at = row_N.to(tl.int64)[:, None] * D + d[None, :]
        live = live_N[:, None]
        if not EVEN:
            live = live & (d < D)[None, :]
        return tl.load(first + at, mask=live, other=0.0, eviction_policy="evict_first")

    @triton.jit
    def _up_few(
        x, first, first_bias, mean, weights, listed, hidden, arrived, T, D, E, tiles, places,
        H: tl.constexpr, M: tl.constexpr, BIASED: tl.constexpr, MEAN: tl.constexpr,
        ACTIVATION: tl.constexpr, EVEN: tl.constexpr, PLACES: tl.constexpr, TP: tl.constexpr,
        PDL: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        _in_turn(PDL)
        pid = tl.program_id(0)
        if pid == 0:  # for `_down`
            place = tl.arange(0, PLACES)
            tl.store(arrived + place, tl.zeros_like(place), mask=place < places)
        i, n = pid // tiles, (pid % tiles) * BN + tl.arange(0, BN)
        e = tl.load(listed + i)
        if e >= 0:
            G: tl.constexpr = M > H
            a0 = tl.zeros((BN, BD), tl.float32)
            a1, a2, a3, u0, u1, u2, u3 = a0, a0, a0, a0, a0, a0, a0
            for start in tl.range(0, D, BD, num_stages=STAGES):
                d = start + tl.arange(0, BD)
                w_ND = _rows(first, e * M + n, n < H, d, D, EVEN).to(tl.float32)
                v_ND = w_ND
                if G:
                    v_ND = _rows(first, e * M + H + n, n < H, d, D, EVEN).to(tl.float32)
                a0, u0 = _add(a0, u0, w_ND, v_ND, x, 0, d, T, D, G, EVEN)
                if TP >= 2:
                    a1, u1 = _add(a1, u1, w_ND, v_ND, x, 1, d, T, D, G, EVEN)
                if TP >= 4:
                    a2, u2 = _add(a2, u2, w_ND, v_ND, x, 2, d, T, D, G, EVEN)
                    a3, u3 = _add(a3, u3, w_ND, v_ND, x, 3, d, T, D, G, EVEN)
            for t in tl.static_range(TP):
                a_ND = a0 if t == 0 else a1 if t == 1 else a2 if t == 2 else a3
                u_ND = u0 if t == 0 else u1 if t == 1 else u2 if t == 2 else u3
                a_N = _hidden(
                    tl.sum(a_ND, 1), tl.sum(u_ND, 1), first_bias, mean, e, n, H, M, BIASED, MEAN,
                    ACTIVATION,
                )  # fmt: skip
                w = tl.load(weights + t * E + e, mask=t < T, other=0.0)
                tl.store(hidden + t * E * H + i * H + n, a_N * w, mask=(n < H) & (t < T))

    @triton.jit
    def _add(
        a_ND, u_ND, w_ND, v_ND, x, t, d, T, D, GATED: tl.constexpr, EVEN: tl.constexpr
    ):  # fmt: skip
        at = x + tl.minimum(t, T - 1) * D + d  # a token that is not there counts for nothing
        if EVEN:
            x_D = tl.load(at).to(tl.float32)
        else:
            x_D = tl.load(at, mask=d < D, other=0.0).to(tl.float32)
        a_ND += w_ND * x_D[None, :]
        if GATED:
            u_ND += v_ND * x_D[None, :]
        return a_ND, u_ND

    @triton.jit
    def _hidden(
        a_N, u_N, first_bias, mean, e, n, H: tl.constexpr, M: tl.constexpr, BIASED: tl.constexpr,
        MEAN: tl.constexpr, ACTIVATION: tl.constexpr,
    ):  # fmt: skip
        if BIASED:
            a_N += tl.load(first_bias + e * M + n, mask=n < H, other=0.0).to(tl.float32)
        a_N = _activate(a_N, ACTIVATION)
        if M > H:
            if BIASED:
                u_N += tl.load(first_bias + e * M + H + n, mask=n < H, other=0.0).to(tl.float32)
            a_N *= u_N
        if MEAN:
            a_N -= tl.load(mean + e * H + n, mask=n < H, other=0.0).to(tl.float32)
        return a_N

    @triton.jit
    def _up_many(
        x, first, first_bias, mean, weights, listed, hidden, arrived, T, D, E, tiles, places,
        H: tl.constexpr, M: tl.constexpr, BIASED: tl.constexpr, MEAN: tl.constexpr,
        ACTIVATION: tl.constexpr, EVEN: tl.constexpr, PLACES: tl.constexpr,
        TP: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
        BN: tl.constexpr, BD: tl.constexpr,
    ):  # fmt: skip
        _in_turn(PDL)
        pid = tl.program_id(0)
        if pid == 0:  # for `_down`
            place = tl.arange(0, PLACES)
            tl.store(arrived + place, tl.zeros_like(place), mask=place < places)
        i, n, t = pid // tiles, (pid % tiles) * BN + tl.arange(0, BN), tl.arange(0, TP)
        e = tl.load(listed + i)
        if e >= 0:
            live, live_t = n < H, t < T
            a_NT = tl.zeros((BN, TP), tl.float32)
            up_NT = tl.zeros((BN, TP), tl.float32)
            for start in range(0, D, BD):
                d = start + tl.arange(0, BD)
                w_ND = _rows(first, e * M + n, live, d, D, EVEN)
                if M > H:
                    v_ND = _rows(first, e * M + H + n, live, d, D, EVEN)
                live_DT = live_t[None, :]
                if not EVEN:
                    live_DT = live_DT & (d < D)[:, None]
                x_DT = tl.load(x + t[None, :] * D + d[:, None], mask=live_DT, other=0.0)
                a_NT = _dot(w_ND, x_DT, a_NT, PRECISION, WIDE)
                if M > H:
                    up_NT = _dot(v_ND, x_DT, up_NT, PRECISION, WIDE)
            if BIASED:
                bias_N = tl.load(first_bias + e * M + n, mask=live, other=0.0).to(tl.float32)
                a_NT += bias_N[:, None]
            a_NT = _activate(a_NT, ACTIVATION)
            if M > H:
                if BIASED:
                    at = first_bias + e * M + H + n
                    up_NT += tl.load(at, mask=live, other=0.0).to(tl.float32)[:, None]
                a_NT *= up_NT
            if MEAN:
                mean_N = tl.load(mean + e * H + n, mask=live, other=0.0).to(tl.float32)
                a_NT -= mean_N[:, None]
            w_T = tl.load(weights + t * E + e, mask=live_t, other=0.0)
            a_NT = (a_NT * w_T[None, :]).to(hidden.dtype.element_ty)
            at = t[None, :] * (E * H) + i * H + n[:, None]
            tl.store(hidden + at, a_NT, mask=live[:, None] & live_t[None, :])

    @triton.jit
    def _down(
        hidden, down, listed, count, bias, part, arrived, y, T, D, E, tiles, splits,
        H: tl.constexpr, BIASED: tl.constexpr, EVEN: tl.constexpr, TP: tl.constexpr,
        PARTS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
        BR: tl.constexpr, BD: tl.constexpr,
    ):  # fmt: skip
        _in_turn(PDL)
        tile, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles
        rows = tl.load(count) * H
        each = tl.maximum((rows + splits - 1) // splits, 1)
        parts = tl.maximum((rows + each - 1) // each, 1)  # that have rows
        if split < parts:
            d, t = tile * BD + tl.arange(0, BD), tl.arange(0, TP)
            end = tl.minimum((split + 1) * each, rows)
            y_TD = _products(
                hidden, down, listed, split * each, end, d, t, T, D, E, H, EVEN, TP, PRECISION,
                WIDE, BR, BD,
            )  # fmt: skip
            live = (t < T)[:, None] & (d < D)[None, :]
            at = t[:, None] * D + d[None, :]
            if parts > 1:
                tl.store(part + split * T * D + at, y_TD, mask=live)
                tl.debug_barrier()  # every thread's part is written before the arrival is counted
                last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == parts - 1
            else:
                last = parts == 1
            if last:
                if parts > 1:
                    y_TD = _sum_parts(part, parts, at, live, T, D, TP, BD, PARTS)
                if BIASED:
                    bias_D = tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
                    y_TD += bias_D[None, :]
                tl.store(y + at, y_TD.to(y.dtype.element_ty), mask=live)

    @triton.jit
    def _products(
        hidden, down, listed, begin, end, d, t, T, D, E, H: tl.constexpr, EVEN: tl.constexpr,
        TP: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, BR: tl.constexpr,
        BD: tl.constexpr,
    ):  # fmt: skip
        sum_TD = tl.zeros((BR if TP <= FEW_TP else TP, BD), tl.float32)  # token 0, if few
        s1, s2, s3 = sum_TD, sum_TD, sum_TD
        r = begin + tl.arange(0, BR)
        e = tl.load(listed + r // H, mask=r < end, other=0)
        for start in range(begin, end, BR):
            r = start + tl.arange(0, BR)
            i, live_r = r // H, r < end
            w_RD = _rows(down, e * H + r - i * H, live_r, d, D, EVEN)
            # Where the next rows are is known before these have come.
            e = tl.load(listed + (r + BR) // H, mask=r + BR < end, other=0)
            if TP <= FEW_TP:
                w_RD = w_RD.to(tl.float32)
                sum_TD += _of_token(hidden, 0, r, live_r, T, E * H)[:, None] * w_RD
                if TP >= 2:
                    s1 += _of_token(hidden, 1, r, live_r, T, E * H)[:, None] * w_RD
                if TP >= 4:
                    s2 += _of_token(hidden, 2, r, live_r, T, E * H)[:, None] * w_RD
                    s3 += _of_token(hidden, 3, r, live_r, T, E * H)[:, None] * w_RD
            else:
                live = (t < T)[:, None] & live_r[None, :]
                h_TR = tl.load(hidden + t[:, None] * (E * H) + r[None, :], mask=live, other=0.0)
                sum_TD = _dot(h_TR, w_RD, sum_TD, PRECISION, WIDE)
        if TP <= FEW_TP:
            sum_TD = tl.sum(sum_TD, 0)[None, :]
            if TP >= 2:
                sum_TD = tl.where(t[:, None] == 1, tl.sum(s1, 0)[None, :], sum_TD)
            if TP >= 4:
                sum_TD = tl.where(t[:, None] == 2, tl.sum(s2, 0)[None, :], sum_TD)
                sum_TD = tl.where(t[:, None] == 3, tl.sum(s3, 0)[None, :], sum_TD)
        return sum_TD

    @triton.jit
    def _of_token(hidden, t, r, live_r, T, rows):
        return tl.load(hidden + tl.minimum(t, T - 1) * rows + r, mask=live_r, other=0.0)

    @triton.jit
    def _sum_parts(
        part, parts, at, live, T, D, TP: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr
    ):  # fmt: skip
        y_TD = tl.zeros((TP, BD), tl.float32)
        s = tl.arange(0, PARTS)
        for start in range(0, parts, PARTS):
            at_STD = ((start + s) * T * D)[:, None, None] + at[None, :, :]
            live_STD = (start + s < parts)[:, None, None] & live[None, :, :]
            y_TD += tl.sum(
                tl.load(part + at_STD, mask=live_STD, other=0.0, cache_modifier=".cg"), 0
            )
        return y_TD
