"""Five factors of each dimension of a matrix, for its five cores (MPOE, Gao et al. 2022).

The factors of a dimension are those of the least sum, as equal as they can be, and none is 1. The
largest of both dimensions stand in the middle, because its core is shared; the others stand so that
what each expert has of its own is smallest. Smaller still it would be with unequal factors, down to
experts that hardly differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import permutations, product

from sparsecraft.errors import RecipeError
from sparsecraft.recipe.experts import CORES

Factors = tuple[int, ...]

# Those of the released code, by (larger, smaller) dimension. By the rule above, the first would
# have 6.3 % of the matrix in what each expert has of its own, and not 7.8 %.
RELEASED = {
    (3072, 768): ((4, 4, 8, 6, 4), (3, 4, 4, 4, 4)),
    (4096, 1024): ((4, 4, 8, 8, 4), (4, 4, 4, 4, 4)),
}


@cache
def factors(larger: int, smaller: int) -> tuple[Factors, Factors]:
    """Five factors of each of two dimensions, in the order of the cores.

    Raises:
        RecipeError: one of them is no product of five whole numbers from 2.
    """
    if (larger, smaller) in RELEASED:
        return RELEASED[larger, smaller]
    first, second = (even_factors(dimension) for dimension in (larger, smaller))
    return min(product(_orders(first), _orders(second)), key=lambda pair: (own_size(*pair), pair))


def own_size(first: Factors, second: Factors) -> int:
    """Numbers in the four outer cores with full bonds, which each expert has of its own."""
    n = [i * j for i, j in zip(first, second, strict=True)]
    return n[0] ** 2 + (n[0] * n[1]) ** 2 + (n[3] * n[4]) ** 2 + n[4] ** 2


def even_factors(dimension: int) -> Factors:
    """The five whole numbers from 2 of the least sum whose product this is, in ascending order.

    Raises:
        RecipeError: there are none; the message names the nearest dimensions that have some.
    """
    found = min(_products(dimension, CORES), key=lambda five: (sum(five), five), default=None)
    if found is None:
        below = next((d for d in range(dimension - 1, 31, -1) if _fits(d)), None)
        above = next(d for d in range(max(32, dimension + 1), 2 * dimension + 64) if _fits(d))
        nearest = str(above) if below is None else f"{below} and {above}"
        raise RecipeError(
            f"{dimension} is no product of five whole numbers from 2, which its five cores take; "
            f"the nearest that {'is' if below is None else 'are'}: {nearest}."
        )
    return found


def _fits(dimension: int) -> bool:
    return any(_products(dimension, CORES))


def _products(dimension: int, count: int, least: int = 2) -> Iterator[Factors]:
    """Every `count` whole numbers from `least`, in ascending order, whose product this is."""
    if count == 1:
        if dimension >= least:
            yield (dimension,)
        return
    factor = least
    while factor**count <= dimension:
        if dimension % factor == 0:
            for rest in _products(dimension // factor, count - 1, factor):
                yield (factor, *rest)
        factor += 1


def _orders(five: Factors) -> list[Factors]:
    """Its orders with the largest in the middle."""
    *others, largest = five
    return sorted({(a, b, largest, c, d) for a, b, c, d in permutations(others)})
