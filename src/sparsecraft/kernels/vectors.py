"""Triton kernels for `mix_vectors`: the mixed vector l lives in registers only.

Shapes: T tokens, E experts, O output features, in `heads` slices of H each; S = T*heads rows of
weights, ordered (token, head). A tile is BT tokens by BO features of one slice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecraft.kernels.device import INTERPRETED, as_sums, needs_grad


def mix_vectors(x_TO: Tensor, weights_SE: Tensor, vectors_EO: Tensor, sums_to_one: bool) -> Tensor:
    """x * l, each token's features times its mixed vector l = sum_e w_e L_e (MoV).

    Args:
        sums_to_one: the weights of every row are known to sum to one. Then l is computed as
            1 + sum_e w_e (L_e - 1), so that vectors of ones give x exactly.
    """
    if as_sums(x_TO) or not usable(x_TO, weights_SE, vectors_EO):
        return mix_vectors_torch(x_TO, weights_SE, vectors_EO, sums_to_one)
    if needs_grad(x_TO, weights_SE, vectors_EO):
        return _MixVectors.apply(x_TO, weights_SE, vectors_EO, sums_to_one)
    return forward(x_TO, weights_SE, vectors_EO, sums_to_one)


def mix_vectors_torch(
    x_TO: Tensor, weights_SE: Tensor, vectors_EO: Tensor, sums_to_one: bool
) -> Tensor:
    """The specification of `mix_vectors`; it writes l, at least in float32, to memory."""
    (T, O), (S, E) = x_TO.shape, weights_SE.shape
    heads = S // T if T else 1
    dtype = torch.promote_types(x_TO.dtype, torch.float32)
    weights_TNE = weights_SE.to(dtype).reshape(T, heads, E)
    vectors_ENH = vectors_EO.to(dtype).reshape(E, heads, O // heads)
    if sums_to_one:
        vectors_ENH = vectors_ENH - 1
    if as_sums(x_TO):
        l_TO = (weights_TNE.transpose(1, 2)[..., None] * vectors_ENH).sum(1).reshape(T, O)
        return (x_TO * (l_TO + 1 if sums_to_one else l_TO)).to(x_TO.dtype)
    with torch.autocast(x_TO.device.type, enabled=False):
        l_NTH = torch.bmm(weights_TNE.transpose(0, 1), vectors_ENH.transpose(0, 1))
    l_TO = l_NTH.transpose(0, 1).reshape(T, O)
    return (x_TO * (l_TO + 1 if sums_to_one else l_TO)).to(x_TO.dtype)


class _MixVectors(torch.autograd.Function):
    """`mix_vectors` that computes l anew in its backward pass."""

    @staticmethod
    def forward(x_TO, weights_SE, vectors_EO, sums_to_one):
        return forward(x_TO, weights_SE, vectors_EO, sums_to_one)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.sums_to_one = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TO):
        return *backward(grad_TO, *ctx.saved_tensors, ctx.sums_to_one), None


try:  # absent from CPU builds of torch
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MAX_EXPERTS = 64
# Up to this many experts, multiply-adds on the tile beat the tensor cores, unless one product of
# tf32 is fine enough.
UNROLLED = 16
FORWARD_TILE, FEW_TOKENS_BO = (16, 256), 128
BACKWARD_TILE = 16, 128
MAX_RANGES = 32  # parts of the vectors' gradient that are summed at the end
# Kernels are interpreted or compiled as decided when they are defined.


def usable(x_TO: Tensor, weights_SE: Tensor, vectors_EO: Tensor) -> bool:
    """Whether the kernels run on these tensors."""
    if triton is None or not x_TO.numel() or not 0 < weights_SE.shape[1] <= MAX_EXPERTS:
        return False
    if torch.float64 in (x_TO.dtype, weights_SE.dtype, vectors_EO.dtype):
        return False
    if x_TO.is_cuda:
        # Triton launches on the current device; the compiler's own code sets it.
        return torch.compiler.is_compiling() or x_TO.device.index == torch.cuda.current_device()
    return INTERPRETED


def forward(x_TO: Tensor, weights_SE: Tensor, vectors_EO: Tensor, sums_to_one: bool) -> Tensor:
    """x * l in one launch."""
    run = _forward_op if torch.compiler.is_compiling() else _forward
    return run(x_TO, weights_SE, vectors_EO, sums_to_one)


def backward(
    dy_TO: Tensor, x_TO: Tensor, weights_SE: Tensor, vectors_EO: Tensor, sums_to_one: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weights and vectors: one launch and two sums in a fixed order."""
    run = _backward_op if torch.compiler.is_compiling() else _backward
    return run(dy_TO, x_TO, weights_SE, vectors_EO, sums_to_one)


def _forward(x_TO: Tensor, weights_SE: Tensor, vectors_EO: Tensor, sums_to_one: bool) -> Tensor:
    x_TO = x_TO.contiguous()
    (T, O), (S, E) = x_TO.shape, weights_SE.shape
    heads = S // T
    BT, BO = FORWARD_TILE
    precision = _precision(x_TO, sums_to_one)
    dot = E > UNROLLED or (precision == "tf32" and T >= BT)
    few = not dot and T < BT
    if few:
        BT, BO = triton.next_power_of_2(T), FEW_TOKENS_BO
    tiles = triton.cdiv(O // heads, BO)
    y_TO = torch.empty_like(x_TO)
    _mix[(triton.cdiv(T, BT) * heads * tiles,)](
        x_TO, weights_SE.contiguous(), vectors_EO.contiguous(), y_TO, T, O // heads, heads, tiles,
        E=E, EP=_padded(E), ONE=sums_to_one, DOT=dot, BT=BT, BO=BO, PRECISION=precision,
        num_warps=4 if E <= 32 else 8,
    )  # fmt: skip
    return y_TO


def _backward(
    dy_TO: Tensor, x_TO: Tensor, weights_SE: Tensor, vectors_EO: Tensor, sums_to_one: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x_TO, dy_TO = x_TO.contiguous(), dy_TO.contiguous()
    (T, O), (S, E) = x_TO.shape, weights_SE.shape
    heads = S // T
    BT, BO = BACKWARD_TILE
    tiles = triton.cdiv(O // heads, BO)
    rows = triton.cdiv(triton.cdiv(T, MAX_RANGES), BT) * BT  # tokens of one range
    ranges = triton.cdiv(T, rows)
    dx_TO = torch.empty_like(x_TO)
    parts = {"device": x_TO.device, "dtype": torch.float32}
    dweights_NSE = torch.empty(tiles, S, E, **parts)
    dvectors_NEO = torch.empty(ranges, E, O, **parts)
    _mix_backward[(ranges * heads * tiles,)](
        dy_TO, x_TO, weights_SE.contiguous(), vectors_EO.contiguous(),
        dx_TO, dweights_NSE, dvectors_NEO, T, O // heads, heads, tiles, rows,
        E=E, EP=_padded(E), ONE=sums_to_one, BT=BT, BO=BO,
        PRECISION="tf32x3" if x_TO.dtype == torch.float32 else "tf32",
        L_PRECISION=_precision(x_TO, sums_to_one),
        num_warps=2 if E <= 16 else 4 if E <= 32 else 8, num_stages=3,
    )  # fmt: skip
    dweights_SE = dweights_NSE.sum(0).to(weights_SE.dtype)
    return dx_TO, dweights_SE, dvectors_NEO.sum(0).to(vectors_EO.dtype)


def _precision(x_TO: Tensor, sums_to_one: bool) -> str:
    """Of l. Where it is 1 + w (L - 1), tf32's ten bits of the deviation are finer than the eight
    of a bf16 x, and vectors of ones still deviate by exactly zero."""
    return "tf32" if sums_to_one and x_TO.dtype == torch.bfloat16 else "tf32x3"


def _padded(E: int) -> int:
    return max(16, triton.next_power_of_2(E))


if triton is not None:
    # Under torch.compile the launches are opaque operators: the compiler's own code for the torch
    # form would write l to memory.
    _inputs = "Tensor x, Tensor weights, Tensor vectors, bool sums_to_one"
    _forward_op = torch.library.custom_op(
        "sparsecraft::mix_vectors", _forward, mutates_args=(), schema=f"({_inputs}) -> Tensor"
    )
    _backward_op = torch.library.custom_op(
        "sparsecraft::mix_vectors_backward",
        _backward,
        mutates_args=(),
        schema=f"(Tensor dy, {_inputs}) -> (Tensor, Tensor, Tensor)",
    )

    @_forward_op.register_fake
    def _(x, weights, vectors, sums_to_one):
        return x.new_empty(x.shape)

    @_backward_op.register_fake
    def _(dy, x, weights, vectors, sums_to_one):
        return tuple(t.new_empty(t.shape) for t in (x, weights, vectors))

    @triton.jit
    def _mix(
        x, weights, vectors, y, T, H, heads, tiles,
        E: tl.constexpr, EP: tl.constexpr, ONE: tl.constexpr, DOT: tl.constexpr,
        BT: tl.constexpr, BO: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        # Neighbors in the grid read neighboring features.
        block, across = tl.program_id(0) // (heads * tiles), tl.program_id(0) % (heads * tiles)
        head, tile, O = across // tiles, across % tiles, heads * H
        t, h = tl.arange(0, BT), tile * BO + tl.arange(0, BO)
        o, live_o, live_t = head * H + h, h < H, block * BT + t < T
        first = (block * BT).to(tl.int64)  # offsets from here fit 32 bits
        row = first * heads + t * heads + head
        at, live = t[:, None] * O + o[None, :], live_t[:, None] & live_o[None, :]
        x_TO = tl.load(x + first * O + at, mask=live, other=0.0).to(tl.float32)
        if DOT:
            e = tl.arange(0, EP)
            w_TE = _weights(weights, row, live_t, e, E)
            v_EO = _vectors(vectors, e, o, live_o, E, O, ONE)
            l_TO = tl.dot(w_TE, v_EO, input_precision=PRECISION)
        else:
            l_TO = tl.zeros((BT, BO), tl.float32)
            for e in tl.static_range(E):
                w_T = tl.load(weights + row * E + e, mask=live_t, other=0.0).to(tl.float32)
                v_O = tl.load(vectors + e * O + o, mask=live_o, other=0.0).to(tl.float32)
                l_TO += w_T[:, None] * (v_O - 1.0 if ONE else v_O)[None, :]
        if ONE:
            l_TO += 1.0
        tl.store(y + first * O + at, (x_TO * l_TO).to(y.dtype.element_ty), mask=live)

    @triton.jit
    def _mix_backward(
        dy, x, weights, vectors, dx, dweights, dvectors, T, H, heads, tiles, rows,
        E: tl.constexpr, EP: tl.constexpr, ONE: tl.constexpr,
        BT: tl.constexpr, BO: tl.constexpr, PRECISION: tl.constexpr, L_PRECISION: tl.constexpr,
    ):  # fmt: skip
        span, across = tl.program_id(0) // (heads * tiles), tl.program_id(0) % (heads * tiles)
        head, tile, O = across // tiles, across % tiles, heads * H
        e, t, h = tl.arange(0, EP), tl.arange(0, BT), tile * BO + tl.arange(0, BO)
        o, live_o = head * H + h, h < H
        v_EO = _vectors(vectors, e, o, live_o, E, O, ONE)
        dv_EO = tl.zeros((EP, BO), tl.float32)
        part = dweights + tile.to(tl.int64) * T * heads * E
        at, at_TE = t[:, None] * O + o[None, :], t[:, None] * heads * E + e[None, :]
        for start in range(0, rows, BT):
            first = (span * rows + start).to(tl.int64)  # offsets from here fit 32 bits
            live_t = first + t < T
            live = live_t[:, None] & live_o[None, :]
            dy_TO = tl.load(dy + first * O + at, mask=live, other=0.0).to(tl.float32)
            x_TO = tl.load(x + first * O + at, mask=live, other=0.0).to(tl.float32)
            w_TE = _weights(weights, first * heads + t * heads + head, live_t, e, E)
            l_TO = tl.dot(w_TE, v_EO, input_precision=L_PRECISION)
            if ONE:
                l_TO += 1.0
            dx_TO = (dy_TO * l_TO).to(dx.dtype.element_ty)
            tl.store(dx + first * O + at, dx_TO, mask=live)
            # Of 16-bit dy and x, tf32's eleven bits drop less than their own rounding did.
            dl_TO = dy_TO * x_TO
            dw_TE = tl.dot(dl_TO, tl.trans(v_EO), input_precision=PRECISION)
            live_TE = live_t[:, None] & (e < E)[None, :]
            tl.store(part + (first * heads + head) * E + at_TE, dw_TE, mask=live_TE)
            dv_EO = tl.dot(tl.trans(w_TE), dl_TO, acc=dv_EO, input_precision=PRECISION)
        at_EO = (span * E + e).to(tl.int64)[:, None] * O + o[None, :]
        tl.store(dvectors + at_EO, dv_EO, mask=(e < E)[:, None] & live_o[None, :])

    @triton.jit
    def _weights(weights, row, live_t, e, E: tl.constexpr):
        live = live_t[:, None] & (e < E)[None, :]
        at = row[:, None] * E + e[None, :]
        return tl.load(weights + at, mask=live, other=0.0).to(tl.float32)

    @triton.jit
    def _vectors(vectors, e, o, live_o, E: tl.constexpr, O, ONE: tl.constexpr):
        """The vectors, less one where the weights sum to one; zero outside."""
        live = (e < E)[:, None] & live_o[None, :]
        at = e[:, None] * O + o[None, :]
        v_EO = tl.load(vectors + at, mask=live, other=1.0 if ONE else 0.0).to(tl.float32)
        return v_EO - 1.0 if ONE else v_EO
