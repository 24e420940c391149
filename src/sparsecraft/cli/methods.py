"""`sparsecraft methods`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsecraft.cli.console import Command, Say


@dataclass(frozen=True, kw_only=True)
class MethodsCommand(Command):
    """Show every recipe: paper, placement, experts, router, and whether it starts exactly."""

    light: ClassVar[bool] = True


def run(command: MethodsCommand, say: Say) -> None:
    """Print each recipe with its defaults."""
    from sparsecraft import recipes
    from sparsecraft.recipe.words import facts

    for name in recipes.__all__:
        recipe = recipes.by_name(name)()
        say(f"{name}: {recipe.title}")
        for fact, value in facts(recipe).items():
            say(f"  {fact:<16}{value}")
