"""`sparsecraft analyze`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsecraft.cli.console import Command, Say
from sparsecraft.cli.options import Based, Budget, Folder, Paths, check_out, set_for
from sparsecraft.errors import DataError


@dataclass(frozen=True, kw_only=True)
class AnalyzeCommand(Command, Based):
    """What experts or neurons do, beside what chance gives, or what a training did: one page."""

    folder: Folder
    """Checkpoint, or the name of a mixture of transformers."""
    data: Paths = ()
    """Files of rows; each is a domain. Not with --training."""
    out: Path
    """Folder for report.html, metrics.json and the figures."""
    limit: int | None = None
    """Rows of each file at most."""
    max_length: int | None = None
    """Longer rows are dropped and counted."""
    budget: Budget | None = None
    """Share of experts of a split model to run, or `recipe`; otherwise as saved."""
    twin: bool = True
    """Do the same to a twin with random routers, or with --neurons random weights."""
    drop: bool = True
    """See what the model loses without each expert, or without the neurons of each domain."""
    text: str | None = None
    """A text to show token by token, with the first expert of each."""
    neurons: bool = False
    """Look at the neurons of a dense model: are they of a domain?"""
    score: str = "abs"
    """With --neurons: how they are ranked, by abs, freq, sqrt, std, rms or mean."""
    training: bool = False
    """Show the log of the checkpoint's training over its steps; also of one that is under way, by
    the states that --save-every leaves."""
    reference: str | None = None
    """With --neurons: rows that every domain is compared with; otherwise with all others."""


def run(command: AnalyzeCommand, say: Say) -> None:
    """Count, write the page, and say the main figures."""
    _check(command)
    if command.training:
        drawn, written = _at_training(command)
    else:
        from sparsecraft.checkpoint.load import load_any

        model, tokenizer = load_any(command.folder, command.base)
        set_for(model, command.budget)
        look = _at_neurons if command.neurons else _at_experts
        drawn, written = look(command, model, tokenizer, say)
    for drawing in drawn:
        say(f"{drawing.title}: {drawing.says}")
    say(f"Written to {command.out}: {', '.join(written)}")


def _check(command: AnalyzeCommand) -> None:
    check_out(command.out)
    if command.neurons and command.text is not None:
        raise DataError("--text shows experts; leave it out beside --neurons.")
    if command.training and (command.data or command.neurons or command.text is not None):
        raise DataError(
            "--training reads the log of a training; leave out --data, --neurons and --text."
        )
    if not (command.training or command.data):
        raise DataError("There is nothing to count; pass --data, or --training for the log.")


def _at_training(command: AnalyzeCommand) -> tuple[list, list[str]]:
    from sparsecraft.evaluation.trainings.page import drawings, write_page
    from sparsecraft.evaluation.trainings.series import training_series

    metrics = training_series(command.folder)
    title = f"The training of {Path(command.folder).name}"
    drawn = drawings(metrics)
    return drawn, write_page(metrics, drawn, command.out, title)


def _at_experts(
    command: AnalyzeCommand, model: Any, tokenizer: Any, say: Say
) -> tuple[list, list[str]]:
    from sparsecraft.evaluation.analysis.analyze import analyze
    from sparsecraft.evaluation.analysis.figures import drawings
    from sparsecraft.evaluation.analysis.page import write_page

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
    for note in metrics["notes"]:
        say(f"Note: {note}")
    title = f"The experts of {Path(command.folder).name}"
    drawn = drawings(metrics)
    return drawn, write_page(metrics, drawn, command.out, title)


def _at_neurons(
    command: AnalyzeCommand, model: Any, tokenizer: Any, say: Say
) -> tuple[list, list[str]]:
    from sparsecraft.evaluation.neurons.neurons import Ranking, analyze_neurons
    from sparsecraft.evaluation.neurons.page import drawings, write_page

    parts = {"twin": command.twin, "pruning": command.drop}
    metrics = analyze_neurons(
        model,
        command.data,
        tokenizer=tokenizer,
        ranking=Ranking(command.score, command.reference),
        max_length=command.max_length,
        limit=command.limit,
        parts=[part for part, asked in parts.items() if asked],
    )
    title = f"The neurons of {Path(command.folder).name}"
    drawn = drawings(metrics)
    return drawn, write_page(metrics, drawn, command.out, title)
