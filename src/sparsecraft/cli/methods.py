"""`sparsecraft methods`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsecraft.cli.console import Command, Say


@dataclass(frozen=True, kw_only=True)
class MethodsCommand(Command):
    """Show every recipe: paper, placement, experts, router, and whether it starts exactly."""

    light: ClassVar[bool] = True

    markdown: bool = False
    """Print the README's table in Markdown."""


def run(command: MethodsCommand, say: Say) -> None:
    """Print each recipe with its defaults."""
    from sparsecraft import recipes
    from sparsecraft.recipe.words import facts, in_table

    if command.markdown:
        say(in_table({name: recipes.by_name(name) for name in recipes.__all__}))
        return
    for name in recipes.__all__:
        recipe = recipes.by_name(name)()
        say(f"{name}: {recipe.title}")
        for fact, value in facts(recipe).items():
            say(f"  {fact:<16}{value}")
