"""`sparsecraft inspect`."""

from __future__ import annotations

from dataclasses import dataclass

from sparsecraft.cli.console import Command, Say
from sparsecraft.cli.options import Based, Folder


@dataclass(frozen=True, kw_only=True)
class InspectCommand(Command, Based):
    """What a checkpoint is: parameters, exactness, base, training, routing."""

    folder: Folder
    """Checkpoint of a converted model."""
    accept_edits: bool = False
    """Accept what was edited by hand, also in a PEFT folder or an export: check that it loads, and
    write its digests anew."""


def run(command: InspectCommand, say: Say) -> None:
    """Print the checkpoint's report, or what has been accepted."""
    if command.accept_edits:
        _accept(command, say)
        return
    from sparsecraft.evaluation.report import describe

    say("\n".join(describe(command.folder, command.base)))


def _accept(command: InspectCommand, say: Say) -> None:
    from sparsecraft.checkpoint.edits import accept_edits

    found = accept_edits(command.folder, command.base)
    lines = [f"Accepted: {name} {how}." for name, how in found.items()]
    say("\n".join(lines) or "Nothing was edited since the folder was written.")
