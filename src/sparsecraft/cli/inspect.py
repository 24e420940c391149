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


def run(command: InspectCommand, say: Say) -> None:
    """Print the checkpoint's report."""
    from sparsecraft.evaluation.report import describe

    say("\n".join(describe(command.folder, command.base)))
