"""Matrix product operators of five cores: a matrix as a chain of products (Gao et al. 2022, MPOE).

    W[i1..i5, j1..j5] = sum_{d1..d4} T1[i1,j1,d1] T2[d1,i2,j2,d2] ... T5[d4,i5,j5]

Shapes: O = i1 ... i5 rows, I = j1 ... j5 columns, core k (d_{k-1}, i_k, j_k, d_k), d_0 = d_5 = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

Shape = tuple[int, int, int, int]


def shapes(rows: Sequence[int], columns: Sequence[int], bond: int | None = None) -> list[Shape]:
    """Those of the five cores, with bonds as large as they can be, or `bond`."""
    n = [i * j for i, j in zip(rows, columns, strict=True)]
    d = [1]
    for k in (1, 2):
        d.append(min(d[-1] * n[k - 1], prod(n[k:]), bond or prod(n)))
    back = [1]
    for k in (4, 3):
        back.append(min(back[-1] * n[k], d[2] * prod(n[2:k]), bond or prod(n)))
    d += reversed(back)
    return [(d[k], rows[k], columns[k], d[k + 1]) for k in range(5)]


def decompose(
    weight_OI: Tensor, rows: Sequence[int], columns: Sequence[int], bond: int | None = None
) -> list[Tensor]:
    """The five cores of a matrix, in float64, by a singular value decomposition at each bond, from
    both ends to the middle: the outer cores are orthogonal, the middle one holds all sizes."""
    sizes = shapes(rows, columns, bond)
    n = [i * j for i, j in zip(rows, columns, strict=True)]
    order = [axis for k in range(5) for axis in (k, 5 + k)]
    rest = weight_OI.detach().double().reshape(*rows, *columns).permute(order)
    first, rest = _leading(rest.reshape(n[0], -1), sizes[0][3])
    second, rest = _leading(rest.reshape(sizes[1][0] * n[1], -1), sizes[1][3])
    last, rest = _leading(rest.reshape(-1, n[4]).t(), sizes[4][0])
    rest = rest.t().reshape(-1, n[3] * sizes[3][3])
    fourth, rest = _leading(rest.t(), sizes[3][0])
    parts = first, second, rest.t(), fourth.t(), last.t()
    return [part.reshape(size) for part, size in zip(parts, sizes, strict=True)]


def compose(cores: Sequence[Tensor]) -> Tensor:
    """The matrix (O, I) of five cores, from both ends to the middle, so that no product is larger
    than it."""
    first, second, middle, fourth, last = cores
    rows, columns = ([core.shape[axis] for core in cores] for axis in (1, 2))
    ends = left_end(first, second), right_end(fourth, last)
    return _as_matrix(_join(*ends, middle), rows, columns)


def left_end(first: Tensor, second: Tensor) -> Tensor:
    """The first two cores as one, (i1 j1 i2 j2, d_2); of each expert, where they are stacked."""
    a, b = first.flatten(-4, -2), second.flatten(-3)
    return (a @ b).reshape(*first.shape[:-4], -1, second.shape[-1])


def right_end(fourth: Tensor, last: Tensor) -> Tensor:
    """The last two cores as one, (d_3, i4 j4 i5 j5); of each expert, where they are stacked."""
    a, b = fourth.flatten(-4, -2), last.flatten(-3)
    return (a @ b).reshape(*fourth.shape[:-3], -1)


class Matrix(torch.autograd.Function):
    """The matrix (O, I) of two ends and the middle core, rounded once, to `dtype`; with stacked
    ends the matrices (E, O, I) of all experts. The backward pass keeps the parts alone."""

    @staticmethod
    def forward(left, middle, right, rows, columns, dtype):
        return _as_matrix(_join(left, right, middle), rows, columns, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *parts, ctx.rows, ctx.columns, _ = inputs
        ctx.save_for_backward(*parts)

    @staticmethod
    def backward(ctx, dW):
        """In the dtype of the matrix' gradient, which is rounded to it already."""
        left, middle, right = (part.to(dW.dtype) for part in ctx.saved_tensors)
        of_left, of_middle, of_right = ctx.needs_input_grad[:3]
        dleft = dmiddle = dright = None
        with torch.autocast(dW.device.type, enabled=False):
            dpairs = _as_pairs(dW, ctx.rows, ctx.columns)
            dpairs = dpairs.reshape(*right.shape[:-2], -1, right.shape[-1])
            if of_right:
                dright = _half(left, middle).mT @ dpairs
            dhalf = (dpairs @ right.mT).reshape(*left.shape[:-1], -1)
            if of_left:
                dleft = dhalf @ middle.flatten(1).t()
            if of_middle:
                dmiddle = left.flatten(0, -2).t() @ dhalf.flatten(0, -2)
                dmiddle = dmiddle.reshape(middle.shape)
        return dleft, dmiddle, dright, None, None, None


def _half(left: Tensor, middle: Tensor) -> Tensor:
    """The left end times the middle core, (..., i1 j1 i2 j2 i3 j3, d_3)."""
    return (left @ middle.flatten(1)).reshape(*left.shape[:-2], -1, middle.shape[-1])


def _join(left: Tensor, right: Tensor, middle: Tensor) -> Tensor:
    return _half(left, middle) @ right


def _as_matrix(
    joined: Tensor, rows: Sequence[int], columns: Sequence[int], dtype: torch.dtype | None = None
) -> Tensor:
    """Numbers in the cores' order, (..., i1 j1 ... i3 j3, i4 j4 i5 j5), as matrices (..., O, I)."""
    E = joined.shape[:-2]
    pairs = joined.reshape(-1, *(size for pair in zip(rows, columns, strict=True) for size in pair))
    turned = pairs.permute(0, 1, 3, 5, 7, 9, 2, 4, 6, 8, 10)
    # Without a format a cast keeps the order in memory, and the reshape would copy again.
    turned = turned.to(dtype or joined.dtype, memory_format=torch.contiguous_format)
    return turned.reshape(*E, prod(rows), prod(columns))


def _as_pairs(matrix: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """Matrices (..., O, I) in the cores' order."""
    turned = matrix.reshape(-1, *rows, *columns).permute(0, 1, 6, 2, 7, 3, 8, 4, 9, 5, 10)
    return turned.contiguous()


def _leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` first left singular vectors U (rows, count) and what is left, U^T matrix.

    They are eigenvectors of the small matrix A A^T: of a matrix with thousands of columns that
    takes a tenth of the time, and in float64 U is as orthogonal. Signs: the largest entry of each
    vector is positive, so that they are the same in every run.
    """
    _, vectors = torch.linalg.eigh(matrix @ matrix.t())
    vectors = vectors.flip(1)[:, :count]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
    return vectors, vectors.t() @ matrix
