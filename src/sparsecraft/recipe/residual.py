"""A scorer that goes on from the logits of the layer before (MoE++). Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsecraft.errors import RecipeError
from sparsecraft.recipe.kinds import add_kind
from sparsecraft.recipe.numbers import check_whole
from sparsecraft.recipe.scorers import Normal, ScorerSpec, Start
from sparsecraft.recipe.typed import check_types


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual(ScorerSpec):
    """G(x^j) = W^j x^j + W_g^j G(x^(j-1)), with the logits G of the layer before in the same pass;
    the first layer of a stack has W^j x^j alone (MoE++, Eq. 5-6)."""

    kind: Literal["residual"] = "residual"
    start: Start = Normal()
    """Of W^j; W_g^j starts at zero."""
    hidden: int | None = None
    """In the place of W^j, B tanh(A x) with as many neurons for each expert (MoE++'s code: 8)."""
    reads_previous = True

    def __post_init__(self) -> None:
        check_types(self)
        if self.hidden is not None:
            check_whole("scorer.hidden", self.hidden)
        if self.start.reads:
            raise RecipeError(
                f"scorer.start is {self.start.kind!r} for a residual scorer, whose logits are not "
                "those of its rows alone; give start='normal'."
            )


add_kind(Residual)
