"""`sparsecraft merge`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparsecraft.cli.console import Command, Say
from sparsecraft.cli.options import Based, Budget, Folder, Paths, set_for


@dataclass(frozen=True, kw_only=True)
class MergeCommand(Command, Based):
    """Merge the experts of a checkpoint into dense weights, or into one adapter."""

    folder: Folder
    """Checkpoint of a converted model."""
    out: Path
    """Folder to write; of a plain transformers model where no layer is left."""
    how: Literal["exact", "fixed", "average"] = "exact"
    """Exact; fixed, with the routing frozen to `--weights`; average, an approximation."""
    weights: str | None = None
    """For fixed: 0.5,0.3,0.2 for the experts of every layer, or `measured` on the data."""
    data: Paths = ()
    """Held-out files; their loss before and after is printed."""
    partial: bool = False
    """Merge what can be merged and keep the other layers, instead of refusing."""
    budget: Budget | None = None
    """Of a split model before the merge: 1.0, its dense function, is what can be merged."""
    overwrite: bool = False
    """Replace an existing folder once the new one is complete."""


def run(command: MergeCommand, say: Say) -> None:
    """Load, merge, write, report."""
    from sparsecraft.checkpoint.load import load_any
    from sparsecraft.checkpoint.replacing import claimed
    from sparsecraft.conversion.merging.merge import merge, read_weights
    from sparsecraft.conversion.merging.write import write_merged

    weights = read_weights(command.weights)
    with claimed(command.out, command.overwrite):
        model, tokenizer = load_any(command.folder, command.base)
        set_for(model, command.budget)
        report = merge(
            model,
            command.how,
            weights=weights,
            data=command.data or None,
            tokenizer=tokenizer,
            partial=command.partial,
        )
        found = write_merged(
            model, command.out, report, source=command.folder, overwrite=command.overwrite
        )
        say(f"{report}\nSaved and read back: {command.out}" + (f"; {found}." if found else ""))
