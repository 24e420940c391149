"""How the rows of a scorer start: one function for each kind of start."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sparsecraft.moe.init.domains import Means, OfDomains, Regression
from sparsecraft.recipe.kinds import named
from sparsecraft.recipe.scorers import (
    Hidden,
    KaimingUniform,
    KMeans,
    Normal,
    Ridge,
    Start,
    Uniform,
    Zeros,
)


def kaiming_uniform(start: KaimingUniform, weight_ED: Tensor) -> None:
    nn.init.kaiming_uniform_(weight_ED, a=math.sqrt(5))  # nn.Linear's, which PESC's code keeps


def normal(start: Normal, weight_ED: Tensor) -> None:
    nn.init.normal_(weight_ED, std=start.std)


def uniform(start: Uniform, weight_ED: Tensor) -> None:
    edge = math.sqrt(3) * start.std
    nn.init.uniform_(weight_ED, -edge, edge)


def zeros(start: Start, weight_ED: Tensor) -> None:
    """Also of starts from data, until the scorer's `begin`."""
    nn.init.zeros_(weight_ED)


# The call that names a further part of routers.
DOOR = "sparsecraft.moe.routers.build.register(option, made)"

# The function fills a new weight in place.
STARTS: dict[type[Start], Callable[[Any, Tensor], None]] = {
    KaimingUniform: kaiming_uniform,
    Normal: normal,
    Uniform: uniform,
    Zeros: zeros,
    Hidden: zeros,
    KMeans: zeros,
    Ridge: zeros,
}

# What gathers the tokens of domains for a start that reads them; means for all others.
GATHERS: dict[type[Start], Callable[[Any, int], OfDomains]] = {
    Ridge: lambda start, num_experts: Regression(num_experts, start.penalty),
}


def gathering(start: Start, num_experts: int) -> OfDomains:
    """What makes of the tokens of domains the rows of such a start."""
    gather = GATHERS.get(type(start))
    return Means(num_experts) if gather is None else gather(start, num_experts)


def draw(start: Start, weight_ED: Tensor) -> Tensor:
    """The weight, with the rows that the recipe's start gives it.

    Raises:
        RecipeError: nothing says what fills it.
    """
    named(STARTS, start, "function that fills a weight", DOOR)(start, weight_ED)
    return weight_ED
