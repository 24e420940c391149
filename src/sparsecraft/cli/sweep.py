"""`sparsecraft sweep`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsecraft.cli.console import Command, Say
from sparsecraft.cli.options import Based, Folder, Paths


@dataclass(frozen=True, kw_only=True)
class SweepCommand(Command, Based):
    """Draw score and latency of a split model against its FLOPs, over budgets."""

    folder: Folder
    """Checkpoint of a split model whose routers are trained."""
    data: Paths
    """Files to score it on."""
    out: Path
    """Folder for sweep.png, sweep.csv and sweep.md."""
    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Budgets; the dense function is measured in any case."""
    batch_sizes: tuple[int, ...] = (1, 16)
    """Of the passes that are timed."""
    latency: bool = True
    """Time passes."""
    calibration_data: Paths = ()
    """Files to find thresholds on; otherwise the first quarter of the rows of `--data`."""
    max_tokens: int | None = 16_384
    """Tokens to score, and as many to calibrate on, at most; None is all."""
    max_length: int | None = None
    """Longer rows are dropped."""
    context: int = 128
    """Tokens before the one that is timed."""
    rounds: int = 20
    """Times that each pass is timed."""


def run(command: SweepCommand, say: Say) -> None:
    """Measure every budget, print the table, write the files."""
    from rich.console import Console

    from sparsecraft.checkpoint.load import load_any
    from sparsecraft.evaluation.budget.sweep import sweep

    model, tokenizer = load_any(command.folder, command.base)
    found = sweep(
        model,
        command.data,
        tokenizer=tokenizer,
        out=command.out,
        shares=command.shares,
        batch_sizes=command.batch_sizes if command.latency else (),
        calibration_data=command.calibration_data or None,
        max_tokens=command.max_tokens,
        max_length=command.max_length,
        context=command.context,
        rounds=command.rounds,
    )
    Console(width=max(Console().width, 100)).print(found.table())
    for note in found.notes:
        say(note)
    say(f"Written: {command.out / 'sweep.png'}, sweep.csv, sweep.md")
