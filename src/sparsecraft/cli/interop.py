"""The commands `export` and `import`. Torch-free until they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from sparsecraft.errors import ExportError


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write a checkpoint in a standard architecture that loads without sparsecraft."""

    folder: Positional[str]
    """Checkpoint of a converted model."""
    to: str | None = None
    """mixtral, granite, qwen2_moe, qwen3_moe; or peft for the folder of a PEFT adapter."""
    out: Path | None = None
    """Folder to write."""
    dry_run: bool = False
    """Say which targets are exact, and what engines make of them; write nothing."""
    overwrite: bool = False
    """Replace an existing export once the new one is complete."""


def run_export(command: ExportCommand, say: Callable[[str], None]) -> None:
    from sparsecraft.checkpoint.folder import check_free
    from sparsecraft.checkpoint.load import load
    from sparsecraft.interop.exporting import check_name, export, plan

    if command.dry_run:
        if command.to is not None:
            check_name(command.to)
        for prospect in plan(load(command.folder)):
            if command.to in (None, prospect.target):
                say(str(prospect))
        return
    if command.to is None or command.out is None:
        raise ExportError("export needs --to TARGET and --out DIR, or --dry-run.")
    check_free(command.out, command.overwrite)
    model = load(command.folder)
    record = export(model, command.to, command.out, overwrite=command.overwrite)
    say(
        f"{command.out}: {record['parameters']:,} parameters as {command.to}; read back, "
        f"max |logit difference| {record['difference']:.1e} at scale {record['scale']:.1f}."
    )
    for warning in record.get("lint", ()):
        say(f"  {warning}")


@dataclass(frozen=True, kw_only=True)
class ImportCommand:
    """Read a standard mixture that was made elsewhere, and save it as a converted model."""

    source: Positional[str]
    """Folder or hub id of a Mixtral, Qwen-MoE or Granite mixture, or one of MixtureKit."""
    out: Path
    """Checkpoint folder to write; it needs no base."""
    overwrite: bool = False
    """Replace an existing folder once the new one is complete."""


def run_import(command: ImportCommand, say: Callable[[str], None]) -> None:
    from sparsecraft.checkpoint.folder import check_free
    from sparsecraft.checkpoint.save import save
    from sparsecraft.evaluation.report import cost_lines, edit_lines
    from sparsecraft.interop.importing import import_moe
    from sparsecraft.moe import cost

    check_free(command.out, command.overwrite)
    model = import_moe(command.source)
    save(model, command.out, overwrite=command.overwrite)
    recipe = model.sparsecraft.recipe
    say("\n".join([f"{recipe.paper}.", *edit_lines(recipe), *cost_lines(cost.count(model))]))
    say(f"Saved and read back: {command.out}")
