"""`sparsecraft compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from sparsecraft.cli.console import Command, Say
from sparsecraft.cli.options import Based, Paths, check_out


@dataclass(frozen=True, kw_only=True)
class CompareCommand(Command, Based):
    """Several models on the same rows: loss with intervals, parameters, FLOPs, memory, speed."""

    models: Positional[Annotated[tuple[str, ...], arg(metavar="FOLDER FOLDER [FOLDER ...]")]]
    """Checkpoints, or names of dense models or mixtures; the first is the baseline."""
    data: Paths
    """Files to take the held-out loss on."""
    out: Path
    """Folder for report.html, metrics.json and the figure."""
    limit: int | None = None
    """Rows of each file at most."""
    max_length: int | None = None
    """Longer rows are dropped and counted."""


def run(command: CompareCommand, say: Say) -> None:
    """Measure one model after the other, print the tables, write the page."""
    from rich.console import Console

    from sparsecraft.evaluation.comparison.compare import compare
    from sparsecraft.evaluation.comparison.page import drawing, sentences, tables, write_page

    check_out(command.out)
    metrics = compare(
        command.models,
        command.data,
        base=command.base,
        max_length=command.max_length,
        limit=command.limit,
    )
    console = Console()
    if not console.is_terminal:  # a file has no edge to wrap at
        console.width = 200
    for table in tables(metrics, console.width):
        console.print(table)
        say("")
    for line in [*sentences(metrics), *(f"Note: {note}" for note in metrics["notes"])]:
        say(line)
    machine = metrics["models"][0]["machine"]
    say(f"Tokens/s: one pass over these rows (prefill), beside whatever else ran, on {machine}")
    written = write_page(metrics, drawing(metrics), command.out)
    say(f"Written to {command.out}: {', '.join(written)}")
