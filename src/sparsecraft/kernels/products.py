"""Products of a handful of tokens with several matrices in one launch, without gradients.

Shapes: T tokens, D width, N rows of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsecraft.kernels.device import INTERPRETED

try:  # absent from CPU builds of torch
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def products(x_TD: Tensor, weights_ND: Sequence[Tensor], wide: Sequence[bool]) -> list[Tensor]:
    """x @ weight^T (T, N) of each matrix, summed in float32.

    Under torch.compile it is one operator.

    Args:
        weights_ND: each of a type of its own.
        wide: which products are float32; the others have the type of x.
    """
    run = _products if torch.compiler.is_compiling() else _launch
    return run(x_TD, list(weights_ND), list(wide))


def in_torch(x_TD: Tensor, weights_ND: Sequence[Tensor], wide: Sequence[bool]) -> list[Tensor]:
    """The specification of `products`."""
    found = _empty(x_TD, weights_ND, wide)
    return [y.copy_(x_TD.float() @ w.float().t()) for y, w in zip(found, weights_ND, strict=True)]


def _launch(x_TD: Tensor, weights_ND: list[Tensor], wide: list[bool]) -> list[Tensor]:
    if triton is None or not (x_TD.is_cuda or INTERPRETED):
        return in_torch(x_TD, weights_ND, wide)
    T, D = x_TD.shape
    found, firsts = _empty(x_TD, weights_ND, wide), [0]
    for weight_ND in weights_ND:
        firsts.append(firsts[-1] + len(weight_ND))
    block = min(4096, triton.next_power_of_2(D))
    with torch.cuda.device_of(x_TD):  # Triton launches on the current one
        _rows[(firsts[-1], T)](
            x_TD.contiguous(), tuple(w.contiguous() for w in weights_ND), tuple(found), D,
            FIRSTS=tuple(firsts), BLOCK=block, num_warps=8,
        )  # fmt: skip
    return found


def _empty(x_TD: Tensor, weights_ND: list[Tensor], wide: list[bool]) -> list[Tensor]:
    return [
        x_TD.new_empty(len(x_TD), len(weight_ND), dtype=torch.float32 if each else x_TD.dtype)
        for weight_ND, each in zip(weights_ND, wide, strict=True)
    ]


_products = torch.library.custom_op(
    "sparsecraft::products",
    _launch,
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, bool[] wide) -> Tensor[]",
)
_products.register_fake(_empty)
OPERATOR = torch.ops.sparsecraft.products.default  # in a compiler's graph

if triton is not None:

    @triton.jit
    def _rows(x, weights, found, D, FIRSTS: tl.constexpr, BLOCK: tl.constexpr):
        n, t = tl.program_id(0), tl.program_id(1)
        for i in tl.static_range(len(weights)):
            if (n >= FIRSTS[i]) & (n < FIRSTS[i + 1]):
                row = weights[i] + (n - FIRSTS[i]).to(tl.int64) * D
                total = tl.zeros((BLOCK,), tl.float32)
                for start in range(0, D, BLOCK):
                    d = start + tl.arange(0, BLOCK)
                    x_D = tl.load(x + t * D + d, mask=d < D, other=0.0).to(tl.float32)
                    total += x_D * tl.load(row + d, mask=d < D, other=0.0).to(tl.float32)
                at = t * (FIRSTS[i + 1] - FIRSTS[i]) + n - FIRSTS[i]
                tl.store(found[i] + at, tl.sum(total, 0))
