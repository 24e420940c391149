"""`sparsecraft eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsecraft.cli.console import Command, Say
from sparsecraft.cli.options import Based, Budget, Fast, Folder, Paths, make_fast, set_for
from sparsecraft.errors import DataError


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(Command, Based, Fast):
    """Held-out loss, rank classification and lm-eval tasks of a checkpoint or a dense model."""

    folder: Folder
    """Checkpoint, or the name of a dense model."""
    data: Paths = ()
    """Files to take the held-out loss on, each by itself."""
    choice: Paths = ()
    """Files of rows prompt, choices, answer, template."""
    tasks: Paths = ()
    """Names of lm-eval tasks."""
    json: Path | None = None
    """Write all results to this file."""
    limit: int | None = None
    """Rows of each file at most."""
    max_length: int | None = None
    """Longer rows are dropped and counted."""
    budget: Budget | None = None
    """Share of experts of a split model to run, or `recipe`; otherwise as saved."""


def run(command: EvaluateCommand, say: Say) -> None:
    """Load, measure, print tables, and write the file that `--json` names."""
    import json

    from rich.console import Console

    from sparsecraft.checkpoint.load import load_any
    from sparsecraft.evaluation.held_out import evaluate
    from sparsecraft.evaluation.lm_eval import check_tasks
    from sparsecraft.evaluation.report import result_tables

    out = command.json
    if out and not (out.absolute().parent.is_dir() and not out.is_dir()):
        raise DataError(f"--json {out} cannot be written; name a file in an existing folder.")
    if not (command.data or command.choice or command.tasks):
        raise DataError("There is nothing to evaluate on; pass --data, --choice or --tasks.")
    check_tasks(command.tasks)
    model, tokenizer = load_any(command.folder, command.base)
    set_for(model, command.budget)
    make_fast(model, command.fast)
    results = evaluate(
        model,
        command.data or None,
        choices=command.choice,
        tasks=command.tasks,
        tokenizer=tokenizer,
        max_length=command.max_length,
        limit=command.limit,
    )
    for table in result_tables(results):
        Console().print(table)
    for key, value in results.get("routing", {}).items():
        say(f"{key}: {value:.3f}")
    if out:
        out.write_text(json.dumps(results, indent=2, default=str, allow_nan=False) + "\n")
