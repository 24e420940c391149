"""Refusals of numbers that are out of their range."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sparsecraft.errors import RecipeError

LARGEST = 2**31 - 1  # of a width: what an index of torch's kernels holds


def check_whole(name: str, value: int, most: int = LARGEST) -> None:
    if type(value) is not int or value < 1:
        raise RecipeError(f"{name} is {value!r}; it must be a whole number from 1.")
    if value > most:
        raise RecipeError(f"{name} is {value:.4g}; it must be at most {most:,}.")


def check_adapter(name: str, width: int, dropout: float, **factors: float) -> None:
    check_whole(name, width)
    if not (is_number(dropout) and 0 <= dropout < 1):
        raise RecipeError(f"dropout is {dropout!r}; it must be at least 0 and less than 1.")
    for factor, value in factors.items():
        if not (is_number(value) and 0 < value < math.inf):
            raise RecipeError(f"{factor} is {value!r}; it must be a positive number.")


def check_deviation(value: float, name: str = "init_std") -> None:
    if not (is_number(value) and 0 <= value < math.inf):
        raise RecipeError(f"{name} is {value!r}; it must be a number from 0.")


def check_coefficients(losses: Mapping[str, float]) -> None:
    for name, coefficient in losses.items():
        if not (is_number(coefficient) and 0 <= coefficient < math.inf):
            raise RecipeError(f"losses.{name} is {coefficient}; it must be a number from 0.")


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
