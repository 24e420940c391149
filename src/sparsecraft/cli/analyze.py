"""`sparsecraft analyze`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsecraft.cli.console import Command, Say
from sparsecraft.cli.options import Based, Budget, Folder, Paths, set_for
from sparsecraft.errors import DataError


@dataclass(frozen=True, kw_only=True)
class AnalyzeCommand(Command, Based):
    """What the experts of a model do, on what, beside what chance gives: one page."""

    folder: Folder
    """Checkpoint, or the name of a mixture of transformers."""
    data: Paths
    """Files of rows; each is a domain."""
    out: Path
    """Folder for report.html, metrics.json and the figures."""
    limit: int | None = None
    """Rows of each file at most."""
    max_length: int | None = None
    """Longer rows are dropped and counted."""
    budget: Budget | None = None
    """Share of experts of a split model to run, or `recipe`; otherwise as saved."""
    twin: bool = True
    """Run the data once more with routers that know nothing."""
    drop: bool = True
    """See what the loss gains without each expert, on a part of the data."""
    text: str | None = None
    """A text to show token by token, with the first expert of each."""


def run(command: AnalyzeCommand, say: Say) -> None:
    """Count, write the page, and say the main figures."""
    from sparsecraft.checkpoint.load import load_any
    from sparsecraft.evaluation.analysis.analyze import analyze
    from sparsecraft.evaluation.analysis.figures import drawings
    from sparsecraft.evaluation.analysis.page import write_report

    if command.out.exists() and not command.out.is_dir():
        raise DataError(f"--out {command.out} is a file; name a folder.")
    model, tokenizer = load_any(command.folder, command.base)
    set_for(model, command.budget)
    metrics = analyze(
        model,
        command.data,
        tokenizer=tokenizer,
        max_length=command.max_length,
        limit=command.limit,
        twin=command.twin,
        drop=command.drop,
        text=command.text,
    )
    for drawing in drawings(metrics):
        say(f"{drawing.title}: {drawing.says}")
    for note in metrics["notes"]:
        say(f"Note: {note}")
    title = f"The experts of {Path(command.folder).name}"
    written = write_report(metrics, command.out, title)
    say(f"Written to {command.out}: {', '.join(written)}")
