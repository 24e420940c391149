"""The commands `inspect` and `methods`."""

from __future__ import annotations

from tyro.conf import Positional

from sparsecraft.cli.console import quiet, say


def methods() -> None:
    """Show every recipe: paper, placement, experts, router, and whether it starts exactly."""
    from sparsecraft import recipes
    from sparsecraft.recipe.words import facts

    for name in recipes.__all__:
        recipe = recipes.by_name(name)()
        say(f"{name}: {recipe.title}")
        for fact, value in facts(recipe).items():
            say(f"  {fact:<16}{value}")


def show(folder: Positional[str]) -> None:
    """What a checkpoint is: parameters, exactness, base, training, routing.

    Args:
        folder: checkpoint of a converted model.
    """
    from sparsecraft.evaluation.report import describe

    quiet()
    say("\n".join(describe(folder)))
