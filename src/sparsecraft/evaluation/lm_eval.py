"""Tasks of lm-eval on a model in memory."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sparsecraft.data.sentences import Prompts
from sparsecraft.errors import DataError, SparsecraftError, first_line


def run_lm_eval(model: nn.Module, tokenizer: Any, tasks: Sequence[str], limit: int | None) -> dict:
    """Task -> its metrics, by `lm_eval.simple_evaluate`.

    Raises:
        DataError: lm-eval knows no such task, or could not run it.
        SparsecraftError: it is not installed, or the model's routers need more than it gives.
    """
    if Prompts.of(model) is not None:
        raise SparsecraftError(
            "lm-eval's tasks give no sentence to the model's routers, which decide by one; pass "
            "choice files instead."
        )
    check_tasks(tasks)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer)
    try:
        found = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit)
    except Exception as error:  # a task runs code of its own and fetches data
        why = first_line(error)
        raise DataError(
            f"lm-eval could not run {', '.join(tasks)} ({type(error).__name__}: {why})."
        ) from error
    return {  # a metric that does not apply is NaN there, which JSON does not have
        task: {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in m.items()
        }
        for task, m in found["results"].items()
    }


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse what lm-eval does not know, before a model is loaded for it.

    Raises:
        DataError: no task, group or tag of that name, and no file of one.
        SparsecraftError: lm-eval is not installed.
    """
    if not tasks:
        return
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise SparsecraftError(
            "lm-eval tasks need lm-eval: pip install 'sparsecraft[eval]'."
        ) from None
    manager = TaskManager()
    for task in tasks:
        if not (manager.match_tasks([task]) or Path(task).exists()):
            near = ", ".join(difflib.get_close_matches(task, manager.all_tasks, n=3)) or "none"
            raise DataError(
                f"lm-eval has no task {task!r} (near it: {near}); `lm-eval ls tasks` lists all."
            )
