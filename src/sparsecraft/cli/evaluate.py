"""The command `eval`."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from sparsecraft.cli.budget import Budget, set_for
from sparsecraft.cli.console import quiet, say
from sparsecraft.cli.options import Paths
from sparsecraft.errors import DataError


def evaluate(
    folder: Positional[str],
    data: Paths = (),
    choice: Paths = (),
    tasks: Paths = (),
    json: Path | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    budget: Budget | None = None,
) -> None:
    """Held-out loss, rank classification and lm-eval tasks of a checkpoint or a dense model.

    Args:
        folder: checkpoint, or the name of a dense model.
        data: files to take the held-out loss on, each by itself.
        choice: files of rows prompt, choices, answer, template.
        tasks: names of lm-eval tasks.
        json: write all results to this file.
        limit: rows of each file at most.
        max_length: longer rows are dropped and counted.
        budget: share of experts of a split model to run, or `recipe`; otherwise as saved.
    """
    import json as json_module

    from rich.console import Console

    from sparsecraft.checkpoint.load import load_any
    from sparsecraft.evaluation.held_out import evaluate as evaluate_model
    from sparsecraft.evaluation.report import result_tables

    quiet()
    if json and not (json.absolute().parent.is_dir() and not json.is_dir()):
        raise DataError(f"--json {json} cannot be written; name a file in an existing folder.")
    if not (data or choice or tasks):
        raise DataError("There is nothing to evaluate on; pass --data, --choice or --tasks.")
    model, tokenizer = load_any(folder)
    set_for(model, budget)
    results = evaluate_model(
        model, data or None, choices=choice, tasks=tasks, tokenizer=tokenizer,
        max_length=max_length, limit=limit,
    )  # fmt: skip
    for table in result_tables(results):
        Console().print(table)
    for key, value in results.get("routing", {}).items():
        say(f"{key}: {value:.3f}")
    if json:
        json.write_text(json_module.dumps(results, indent=2, default=str, allow_nan=False) + "\n")
