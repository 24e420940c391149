"""`sparsecraft import`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from sparsecraft.cli.console import Command, Say

Source = Positional[Annotated[str, arg(metavar="SOURCE")]]


@dataclass(frozen=True, kw_only=True)
class ImportCommand(Command):
    """Read a standard mixture that was made elsewhere, and save it as a converted model."""

    source: Source
    """Folder or hub id of a Mixtral, Qwen-MoE or Granite mixture, or one of MixtureKit."""
    out: Path
    """Checkpoint folder to write; it needs no base."""
    overwrite: bool = False
    """Replace an existing folder once the new one is complete."""


def run(command: ImportCommand, say: Say) -> None:
    """Read, save, say what it is."""
    from sparsecraft.checkpoint.replacing import claimed
    from sparsecraft.checkpoint.save import save
    from sparsecraft.evaluation.report import cost_lines, edit_lines
    from sparsecraft.interop.importing import import_moe
    from sparsecraft.moe import cost
    from sparsecraft.surgery.record import conversion_of

    with claimed(command.out, command.overwrite):
        model = import_moe(command.source)
        save(model, command.out, overwrite=command.overwrite)
        recipe = conversion_of(model).recipe
        found = conversion_of(model).report["import"]
        say(f"{found['used']} of {found['tensors']} tensors of the mixture have their place.")
        if measured := found.get("measured"):
            say(f"Beside the mixture: {measured}.")
        say("\n".join([f"{recipe.paper}.", *edit_lines(recipe), *cost_lines(cost.count(model))]))
        say(f"Saved and read back: {command.out}")
