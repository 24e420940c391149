"""`sparsecraft export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsecraft.cli.console import Command, Say
from sparsecraft.cli.options import Based, Folder
from sparsecraft.errors import ExportError


@dataclass(frozen=True, kw_only=True)
class ExportCommand(Command, Based):
    """Write a checkpoint in a standard architecture that loads without sparsecraft."""

    folder: Folder
    """Checkpoint of a converted model."""
    to: str | None = None
    """mixtral, granite, qwen2_moe, qwen3_moe; or peft for the folder of a PEFT adapter."""
    out: Path | None = None
    """Folder to write."""
    dry_run: bool = False
    """Say which targets are exact, and what engines make of them; write nothing."""
    materialize: bool = False
    """Make experts that share tensors (mpoe) full networks first."""
    overwrite: bool = False
    """Replace an existing export once the new one is complete."""


def run(command: ExportCommand, say: Say) -> None:
    """Load and export, or with `--dry-run` say what each target would be."""
    from sparsecraft.checkpoint.load import load
    from sparsecraft.checkpoint.replacing import claimed
    from sparsecraft.interop.exporting import check_name, export, plan
    from sparsecraft.interop.materialize import materialize

    if command.dry_run:
        if command.to is not None:
            check_name(command.to)
        model = load(command.folder, command.base)
        if command.materialize:
            materialize(model)
        for prospect in plan(model):
            if command.to in (None, prospect.target):
                say(str(prospect))
        return
    if command.to is None or command.out is None:
        raise ExportError("export needs --to TARGET and --out DIR, or --dry-run.")
    with claimed(command.out, command.overwrite):
        model = load(command.folder, command.base)
        if command.materialize:
            say(f"Full networks: {materialize(model)}.")
        record = export(model, command.to, command.out, overwrite=command.overwrite)
        say(
            f"{command.out}: {record['parameters']:,} parameters as {command.to}; "
            f"{record['tensors']} tensors written and read back; {record['measured']}."
        )
        for warning in record.get("lint", ()):
            say(f"  {warning}")
