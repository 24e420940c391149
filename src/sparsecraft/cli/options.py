"""Options that several verbs share."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from sparsecraft.errors import DataError

log = logging.getLogger("sparsecraft")

Folder = Positional[Annotated[str, arg(metavar="FOLDER")]]
Paths = tuple[str, ...]
# A share of the experts, or the rule of the model's recipe.
Budget = float | Literal["recipe"]


@dataclass(frozen=True, kw_only=True)
class Based:
    """What every verb takes that reads a checkpoint."""

    base: str | None = None
    """Folder or name of the dense model that it stands on, if that has moved."""


@dataclass(frozen=True, kw_only=True)
class Fast:
    """What every verb takes that only asks a model."""

    fast: bool = False
    """Give the model its form for inference first: what can be merged or stacked is."""


def make_fast(model: Any, asked: bool) -> None:
    """Give a converted model its form for inference, if a command asked for it, and log what that
    was."""
    if not asked:
        return
    from sparsecraft.conversion.fast import fast
    from sparsecraft.surgery.record import is_converted

    dense = "--fast: the model is dense, and has no other form."
    log.info(fast(model) if is_converted(model) else dense)


def set_for(model: Any, budget: Budget | None) -> None:
    """Set the budget that a command was given, if it was."""
    from sparsecraft.surgery.budget import set_budget, warn_untrained

    if budget is not None:
        set_budget(model, None if budget == "recipe" else budget)
        warn_untrained(model)


def check_out(out: Path) -> None:
    """Refuse a file where a folder is to be written.

    Raises:
        DataError: so it is.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file; name a folder.")
