"""Options that several verbs share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

Folder = Positional[Annotated[str, arg(metavar="FOLDER")]]
Paths = tuple[str, ...]
# A share of the experts, or the rule of the model's recipe.
Budget = float | Literal["recipe"]


@dataclass(frozen=True, kw_only=True)
class Based:
    """What every verb takes that reads a checkpoint."""

    base: str | None = None
    """Folder or name of the dense model that it stands on, if that has moved."""


def set_for(model: Any, budget: Budget | None) -> None:
    """Set the budget that a command was given, if it was."""
    from sparsecraft.surgery.budget import set_budget, warn_untrained

    if budget is not None:
        set_budget(model, None if budget == "recipe" else budget)
        warn_untrained(model)
