"""Feed-forward experts beside ones that compute nothing (MoE++, Jin et al. 2025). Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsecraft.errors import RecipeError
from sparsecraft.recipe.experts import ExpertsSpec, stands
from sparsecraft.recipe.kinds import add_kind
from sparsecraft.recipe.numbers import check_whole, is_number
from sparsecraft.recipe.typed import check_types

MOST_TAU = 1e12  # beyond, float32 has no shares of both kinds


@dataclass(frozen=True, kw_only=True, slots=True)
class HeterogeneousSpec(ExpertsSpec):
    """Full feed-forward experts, and behind them zero-computation experts: constant ones,
    E(x) = a_1 x + a_2 v with a = softmax(W x); copies, E(x) = x; and zeros, E(x) = 0."""

    places = stands(replace=("ffn",), beside=("ffn",))
    dense_weights = True
    words = ("network or zero-computation expert", "networks and zero-computation experts")

    kind: Literal["heterogeneous"] = "heterogeneous"
    num_experts: int = 12
    """Of all kinds; those that are none of the following are feed-forward networks."""
    constant: int = 2
    copy: int = 1
    zero: int = 1
    tau: float = 0.75
    """A feed-forward expert is meant to get tau times the tokens of a zero-computation expert."""
    zero_weight: Literal["lost", "shared"] = "lost"
    """The weight of a zero expert is lost, or the weights of the token's other experts are scaled
    to sum to one (MoE++'s code)."""

    def __post_init__(self) -> None:
        check_types(self)
        check_whole("num_experts", self.num_experts)
        for name in ("constant", "copy", "zero"):
            if getattr(self, name) < 0:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be a number from 0.")
        if self.networks < 1:
            raise RecipeError(
                f"num_experts is {self.num_experts} with constant={self.constant}, "
                f"copy={self.copy} and zero={self.zero}; one at least must be a feed-forward "
                "network."
            )
        if not (is_number(self.tau) and 1 / MOST_TAU <= self.tau <= MOST_TAU):
            raise RecipeError(
                f"tau is {self.tau}; it must be positive and at most {MOST_TAU:g} (the paper: 0.1 "
                "to 1; 0.75)."
            )

    @property
    def networks(self) -> int:
        return self.num_experts - self.free

    @property
    def free(self) -> int:
        return self.constant + self.copy + self.zero

    @property
    def load(self) -> tuple[float, ...]:
        total = self.tau * self.networks + self.free
        return (self.tau / total,) * self.networks + (1 / total,) * self.free


add_kind(HeterogeneousSpec)
