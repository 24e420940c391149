"""Matrix product operators of five cores: a matrix as a chain of products (Gao et al. 2022, MPOE).

    W[i1..i5, j1..j5] = sum_{d1..d4} T1[i1,j1,d1] T2[d1,i2,j2,d2] ... T5[d4,i5,j5]

Shapes: O = i1 ... i5 rows, I = j1 ... j5 columns, core k (d_{k-1}, i_k, j_k, d_k), d_0 = d_5 = 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

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
    kind = Kind(*(tuple(core.shape[axis] for core in cores) for axis in (1, 2)))
    first, second, middle, fourth, last = (core.flatten(1, 2) for core in cores)
    left, right = left_end(first, second), right_end(fourth, last)
    ends = left[None, None], right[None, None]
    return Matrices.apply(*ends, (kind,), left.dtype, middle.flatten(1))[0][0]


def left_end(first: Tensor, second: Tensor) -> Tensor:
    """The first two cores (..., 1, n1, d_1), (..., d_1, n2, d_2) as one, (..., n1 n2, d_2)."""
    joined = first.squeeze(-3) @ second.flatten(-2)
    return joined.reshape(*first.shape[:-3], -1, second.shape[-1])


def right_end(fourth: Tensor, last: Tensor) -> Tensor:
    """The last two cores (..., d_3, n4, d_4), (..., d_4, n5, 1) as one, (..., d_3, n4 n5)."""
    joined = fourth.flatten(-3, -2) @ last.squeeze(-1)
    return joined.reshape(*fourth.shape[:-2], -1)


class Kind(NamedTuple):
    """Matrices of the same factors, which are stacked one on another."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    count: int = 1


class Matrices(torch.autograd.Function):
    """The matrices of E experts, (E, count O, I) of each kind, rounded once, to `dtype`.

    Args:
        lefts_MEAB, rights_MEDG: ends of M matrices, which are those of the kinds one after another;
            all have bonds and numbers alike.
        middles: their middle cores, (d_2, i3 j3 d_3).
    """

    @staticmethod
    def forward(lefts_MEAB, rights_MEDG, kinds, dtype, *middles):
        joined = _half(lefts_MEAB, _stacked(middles), rights_MEDG.shape[-2]) @ rights_MEDG
        parts = joined.split([kind.count for kind in kinds])
        return tuple(_as_matrices(*pair, dtype) for pair in zip(parts, kinds, strict=True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        lefts_MEAB, rights_MEDG, ctx.kinds, _, *middles = inputs
        ctx.save_for_backward(lefts_MEAB, rights_MEDG, *middles)

    @staticmethod
    def backward(ctx, *grads_EOI):
        """In the dtype of the matrices' gradients, which are rounded to it already."""
        lefts, rights, *middles = (part.to(grads_EOI[0].dtype) for part in ctx.saved_tensors)
        of_lefts, of_rights, _, _, *of_middles = ctx.needs_input_grad
        dlefts, drights, dmiddles = None, None, [None] * len(middles)
        with torch.autocast(lefts.device.type, enabled=False):
            dpairs = [_as_pairs(*pair) for pair in zip(grads_EOI, ctx.kinds, strict=True)]
            dpairs = torch.cat(dpairs) if len(dpairs) > 1 else dpairs[0]
            dpairs = dpairs.unflatten(-1, (-1, rights.shape[-1]))
            if of_rights:
                drights = _half(lefts, _stacked(middles), rights.shape[-2]).mT @ dpairs
            dhalf = (dpairs @ rights.mT).reshape(*lefts.shape[:-1], -1).flatten(1, -2)
            if of_lefts:
                dlefts = (dhalf @ _stacked(middles).mT).reshape(lefts.shape)
            if any(of_middles):
                dmiddles = (lefts.flatten(1, -2).mT @ dhalf).unbind()
        return dlefts, drights, None, None, *dmiddles


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Of one no copy."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]


def _half(lefts_MEAB: Tensor, middles_MBC: Tensor, d: int) -> Tensor:
    """Left ends times middle cores, (M, E, i1 j1 i2 j2 i3 j3, d)."""
    flat = lefts_MEAB.flatten(1, 2) @ middles_MBC
    return flat.reshape(*lefts_MEAB.shape[:2], -1, d)


def _as_matrices(joined: Tensor, kind: Kind, dtype: torch.dtype) -> Tensor:
    """Numbers in the cores' order, (count, E, i1 j1 i2 j2 i3 j3, i4 j4 i5 j5), as matrices
    (E, count O, I)."""
    pairs = joined.reshape(*joined.shape[:2], *itertools.chain(*zip(*kind[:2], strict=True)))
    turned = pairs.permute(1, 0, 2, 4, 6, 8, 10, 3, 5, 7, 9, 11)
    # Without a format a cast keeps the order in memory, and the reshape would copy again.
    turned = turned.to(dtype, memory_format=torch.contiguous_format)
    return turned.reshape(joined.shape[1], kind.count * prod(kind.rows), -1)


def _as_pairs(matrices: Tensor, kind: Kind) -> Tensor:
    """Matrices (E, count O, I) in the cores' order, (count, E, O I)."""
    turned = matrices.reshape(len(matrices), kind.count, *kind.rows, *kind.columns)
    return turned.permute(1, 0, 2, 7, 3, 8, 4, 9, 5, 10, 6, 11).reshape(*turned.shape[1::-1], -1)


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
