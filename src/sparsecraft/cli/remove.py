"""`sparsecraft remove`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsecraft.cli.console import Command, Say
from sparsecraft.cli.options import Based, Folder


@dataclass(frozen=True, kw_only=True)
class RemoveCommand(Command, Based):
    """Take one expert out of every layer."""

    folder: Folder
    """Checkpoint of a converted model whose experts are whole networks."""
    expert: int
    """Its number, from 0, in the order of the sources and of what was added."""
    out: Path
    """Checkpoint folder to write."""
    overwrite: bool = False
    """Replace an existing folder once the new one is complete."""


def run(command: RemoveCommand, say: Say) -> None:
    """Load, remove, save, say what is left."""
    from sparsecraft.checkpoint.load import load
    from sparsecraft.checkpoint.replacing import claimed
    from sparsecraft.checkpoint.save import save
    from sparsecraft.conversion.extension.remove import remove
    from sparsecraft.evaluation.report import edit_lines
    from sparsecraft.surgery.record import conversion_of

    with claimed(command.out, command.overwrite):
        model = load(command.folder, command.base)
        remove(model, command.expert)
        save(model, command.out, overwrite=command.overwrite)
        recipe = conversion_of(model).recipe
        say("\n".join([f"Expert {command.expert} was removed.", *edit_lines(recipe)]))
        say(f"Saved and read back: {command.out}")
