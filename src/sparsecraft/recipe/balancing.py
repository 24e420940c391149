"""What keeps experts evenly loaded beside losses: a bias, a capacity, coefficients that adapt.

Torch-free. What of it has a state that moves with every optimizer step is computed in
`sparsecraft.moe.routers.moving`.
"""

from __future__ import annotations

import math
from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, Literal

from sparsecraft.errors import RecipeError
from sparsecraft.recipe.kinds import add_kind, family
from sparsecraft.recipe.numbers import check_whole
from sparsecraft.recipe.typed import check_types


class Moving(ABC):
    """An option with a state that moves with every optimizer step of a training, by what the
    routers did in it."""

    __slots__ = ()
    kind: str

    def __post_init__(self) -> None:
        check_types(self)


@family
class Balance(Moving):
    """What evens out the loads of experts without a loss.

    Attributes:
        needs_free: it is for experts of which some compute nothing.
    """

    __slots__ = ()
    needs_free: ClassVar[bool] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Bias(Balance):
    """A bias on the choice alone, and not on the weights: b_e += rate sign(mean load - load_e)
    behind every step (Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing", algorithm 1). It is
    added to the softmax over all experts."""

    kind: Literal["bias"] = "bias"
    rate: float = 1e-3
    """The paper's u."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.rate < math.inf:
            raise RecipeError(f"select.balance.rate is {self.rate}; it must be positive.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold(Balance):
    """Zero-computation experts come into use over `steps` optimizer steps, so that a model starts
    as the dense one: their softmax is multiplied in the choice by what rises from 0 to 1, and so
    are the loads that they are meant to have (ours)."""

    kind: Literal["hold"] = "hold"
    steps: int = 500
    needs_free = True

    def __post_init__(self) -> None:
        check_types(self)
        check_whole("select.balance.steps", self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class ByDropRate(Moving):
    """What a layer's balance losses are multiplied by: behind every step it becomes
    a = beta a + (1 - beta) min(1, d / full_at), where d is the share of the layer's slots that
    found no room (Skywork-MoE, Wei et al. 2024, adaptive auxiliary loss coefficients; the stage's
    coefficient is their alpha_max, 0.01, and full_at their alpha_max / xi)."""

    kind: Literal["drop_rate"] = "drop_rate"
    full_at: float = 0.05
    """Share of dropped slots from which the whole coefficient counts."""
    beta: float = 0.99

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.full_at <= 1:
            raise RecipeError(
                f"capacity.coefficient.full_at is {self.full_at}; it is a share in (0, 1]."
            )
        if not 0 <= self.beta < 1:
            raise RecipeError(f"capacity.coefficient.beta is {self.beta}; it must lie in [0, 1).")


@dataclass(frozen=True, slots=True, kw_only=True)
class BySparsity(Moving):
    """What the balance losses of all layers are multiplied by: behind every step it becomes
    `factor` times larger where fewer than 1 - k / E of all layers' weights are zero, and smaller
    where more are (ReMoE, Wang et al. 2025, adaptive L1 regularization)."""

    kind: Literal["sparsity"] = "sparsity"
    start: float = 1e-8
    factor: float = 1.2

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in (("start", 0), ("factor", 1)):
            if not least < getattr(self, name) < math.inf:
                raise RecipeError(
                    f"coefficient.{name} is {getattr(self, name)}; it must be larger than {least}."
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """In training an expert takes at most ceil(factor k T / E) of the T real tokens that a layer
    sees in a pass, or its part of them where experts are to be loaded differently; a slot beyond
    stays empty, and its weight is lost (GShard, Lepikhin et al. 2021; Switch, Fedus et al. 2022).
    At inference there is no limit, so that a token's output does not depend on its neighbors."""

    kind: Literal["first", "best"] = "first"
    """Those that are kept: the first ones in the order of the batch, so that no token's place
    depends on a later one; or those of the largest weights."""
    factor: float = 1.25
    coefficient: ByDropRate | None = None
    """Lets the layer's balance losses follow its share of dropped slots."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.factor < math.inf:
            raise RecipeError(f"select.capacity.factor is {self.factor}; it must be positive.")


for option in (Bias, Hold):
    add_kind(option)
