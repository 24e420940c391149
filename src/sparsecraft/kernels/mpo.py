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
    left = (first.flatten(0, 2) @ second.flatten(1)).reshape(-1, middle.shape[0])
    right = (fourth.flatten(0, 2) @ last.flatten(1)).reshape(middle.shape[3], -1)
    joined = (left @ middle.flatten(1)).reshape(-1, middle.shape[3]) @ right
    rows, columns = ([core.shape[axis] for core in cores] for axis in (1, 2))
    pairs = joined.reshape([size for pair in zip(rows, columns, strict=True) for size in pair])
    return pairs.permute(0, 2, 4, 6, 8, 1, 3, 5, 7, 9).reshape(prod(rows), prod(columns))


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
