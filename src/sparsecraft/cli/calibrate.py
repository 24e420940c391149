"""`sparsecraft calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsecraft.cli.console import Command, Say
from sparsecraft.cli.options import Based, Folder, Paths


@dataclass(frozen=True, kw_only=True)
class CalibrateCommand(Command, Based):
    """Find the threshold, or number of experts, for a share of the FLOPs, and save it."""

    folder: Folder
    """Checkpoint of a split model whose routers are trained."""
    data: Paths
    """Files to measure on, not those that it is judged by."""
    target_flops: tuple[float, ...] = (0.5,)
    """FLOPs of the split networks, routers included, over dense; of several the first is set."""
    out: Path | None = None
    """Write to this folder; otherwise the checkpoint itself is written again."""
    max_tokens: int | None = 16_384
    """Tokens of the data that are read at most; None is all."""
    max_length: int | None = None
    """Longer rows are dropped."""
    overwrite: bool = False
    """Replace an existing `--out` once the new one is complete."""


def run(command: CalibrateCommand, say: Say) -> None:
    """Load, measure, set the budget, save."""
    from sparsecraft.checkpoint.load import load_any
    from sparsecraft.checkpoint.replacing import claimed
    from sparsecraft.checkpoint.save import save
    from sparsecraft.evaluation.budget.calibration import calibrate

    out = command.folder if command.out is None else command.out
    overwrite = command.overwrite or command.out is None
    with claimed(out, overwrite):
        model, tokenizer = load_any(command.folder, command.base)
        found = calibrate(
            model,
            command.data,
            target_flops=command.target_flops,
            tokenizer=tokenizer,
            max_tokens=command.max_tokens,
            max_length=command.max_length,
        )
        say(str(found))
        save(model, out, overwrite=overwrite)
        say(f"Budget {found.settings[0].share:.3f} set, saved and read back: {out}")
