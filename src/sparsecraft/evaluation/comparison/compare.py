"""compare(): several models beside each other, on the same rows."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsecraft.checkpoint.preview import Preview, preview
from sparsecraft.data.files import Place
from sparsecraft.data.prepare import TASKS
from sparsecraft.data.rows import Unused, read_rows
from sparsecraft.dense.memory import enough_memory
from sparsecraft.errors import DataError, SparsecraftError
from sparsecraft.evaluation.comparison.intervals import Losses, difference
from sparsecraft.evaluation.comparison.measuring import Measured, Rows, measure
from sparsecraft.evaluation.held_out import check_limit, length_of, task_of

log = logging.getLogger("sparsecraft")

FIRST_ROWS = 8  # of each file, by which tokenizers are compared before weights are read
FEW = 20  # documents, of which percentiles give intervals that are too short
ALL = "all rows"


@enough_memory("Comparison", "lower --max-length (max_length=...), or compare smaller models")
def compare(
    models: Sequence[str | Path],
    data: str | Path | Sequence[str | Path],
    *,
    base: str | None = None,
    max_length: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Measure models on the same rows, one after the other in memory.

    Args:
        models: checkpoint folders, or names of dense models and of mixtures of transformers, as
            `load_any` takes them; the first is the baseline of all differences.
        data: files of rows, as `evaluate` takes them.
        base: as in `load`, for those of the models that stand on one.
        max_length: longer rows are dropped, and counted; None is 1024, or the smallest number of
            positions of the models if that is less.
        limit: rows of each file at most.

    Returns:
        `task`, `max_length`; `files`: file, and `all rows` -> rows, labels, dropped; `models`: of
        each its name, `loss` (file, and `all rows` -> nats per label), `accuracy` (of classifiers),
        `difference` (the same -> `intervals.difference`; None of the first), the fields of
        `cost.Cost`, `bytes` of the weights, `peak_bytes` (on a GPU), `tokens_per_second`, and
        `experts`, `experts_per_token`: the numbers that its layers have; `notes`: what the figures
        do not say; `interrupted`: by Ctrl-C, and only some of the models are there.

    Raises:
        SparsecraftError: fewer than two models, one of them twice, or of different tasks.
        CheckpointError, HubError: a model that cannot be loaded.
        DataError: rows that are malformed, or not the same ones for all models.
        KeyboardInterrupt: before two models were measured.
    """
    check_limit(limit)
    names, files = _names(models), _files(data)
    seen = _previews(names, base)
    rows = Rows(
        files, _task(seen), min(length_of(p.dense, max_length) for p in seen.values()), limit
    )
    _check_first_rows(seen, rows)
    bases = {name: found.base for name, found in seen.items()}
    del seen
    found = _measured(bases, rows)
    metrics = {"task": rows.task, "max_length": rows.max_length, "files": _counts(found[0], rows)}
    metrics["models"] = [_figures(measured, found[0], rows.task) for measured in found]
    metrics["interrupted"] = len(found) < len(names)
    return metrics | {"notes": notes(metrics, found[0], names[len(found) :])}


# ------------------------------------------------------------------ before any weight is read
def _names(models: Sequence[str | Path]) -> list[str]:
    names = [str(model) for model in ([models] if isinstance(models, (str, Path)) else models)]
    if len(names) < 2:
        raise SparsecraftError(
            "A comparison needs two or more models, the first of which is the baseline; "
            f"there {'is one' if names else 'are none'}."
        )
    return names


def _files(data: Any) -> list[str]:
    files = [str(path) for path in ([data] if isinstance(data, (str, Path)) else data)]
    if not files:
        raise DataError("There are no rows to measure on; pass data=FILE.")
    if twice := [file for file in files if files.count(file) > 1]:
        raise DataError(f"data holds {twice[0]} twice; name each file once.")
    return files


def _previews(names: list[str], base: str | None) -> dict[str, Preview]:
    """Of every model, so that what cannot be loaded is said before others are measured."""
    found: dict[str, Preview] = {}
    for name in names:
        seen = preview(name, base)
        same = [n for n, other in found.items() if other.folder.samefile(seen.folder)]
        if same:
            raise SparsecraftError(
                f"{name} and {same[0]} are the same folder; name each model once."
            )
        if seen.tokenizer is None:
            raise DataError(f"{name} has no tokenizer to read the rows with; save one beside it.")
        found[name] = seen
    if base is not None and not any(seen.base for seen in found.values()):
        raise SparsecraftError(f"None of these models stands on a base; drop {base!r}.")
    return found


def _task(seen: dict[str, Preview]) -> str:
    tasks = {name: task_of(found.dense) for name, found in seen.items()}
    first, task = next(iter(tasks.items()))
    for name, other in tasks.items():
        if other != task:
            raise SparsecraftError(
                f"{first} and {name} are models of different tasks ({task}, {other}), whose losses "
                "are of different things; compare models of one task."
            )
    return task


def _check_first_rows(seen: dict[str, Preview], rows: Rows) -> None:
    """Refuse tokenizers that encode the first rows of a file differently."""
    for file in rows.files:
        placed = list(islice(read_rows(file, "test", Unused()), FIRST_ROWS))
        encoded = {name: _encoded(placed, p.tokenizer, rows.task) for name, p in seen.items()}
        first = next(iter(encoded))
        for name, found in encoded.items():
            if found != encoded[first]:
                raise _other_rows(first, name, file)


def _encoded(placed: list[tuple[Place, dict]], tokenizer: Any, task: str) -> list:
    found = []
    for place, row in placed:
        try:
            found.append(TASKS[task](row, tokenizer))
        except DataError as error:
            raise DataError(f"{place}: {error}.") from None
    return found


def _other_rows(first: str, name: str, file: str) -> DataError:
    return DataError(
        f"{first} and {name} read {file} as different tokens: their tokenizers or chat templates "
        "differ, so that nats per label are not comparable. Compare models of one tokenizer, or "
        "by the accuracies of sparsecraft eval --choice."
    )


# ------------------------------------------------------------------ one model after the other
def _measured(bases: dict[str, str | None], rows: Rows) -> list[Measured]:
    """What was measured by the time that Ctrl-C came, of two models at least."""
    found: list[Measured] = []
    try:
        for number, (name, base) in enumerate(bases.items(), 1):
            log.info(f"Model {number} of {len(bases)}: {name}")
            try:
                measured = measure(name, base, rows, found[0] if found else None)
            except DataError:  # of the rows
                raise
            except SparsecraftError as error:
                raise type(error)(f"{name}: {error}") from error
            if measured is None:
                raise _other_rows(next(iter(bases)), name, "the rows")
            found.append(measured)
            _free()
    except KeyboardInterrupt:
        if len(found) < 2:
            log.warning(f"{len(found)} models were measured: too few to compare.")
            raise
    return found


def _free() -> None:
    """Give back the memory of a model that is gone, its circles of references too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------ what it amounts to
def _with_all(counted: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """File, and all of several -> (3, R)."""
    return {**counted, ALL: np.concatenate(list(counted.values()), 1)}


def _counts(first: Measured, rows: Rows) -> dict[str, dict[str, int]]:
    dropped = {
        file: counts["too_long"] + counts["no_trainable_token"]
        for file, counts in first.counts.items()
    }
    dropped[ALL] = sum(dropped.values())
    return {
        file: {"rows": found.shape[1], "labels": int(found[1].sum()), "dropped": dropped[file]}
        for file, found in _with_all(first.counted).items()
    }


def _figures(measured: Measured, first: Measured, task: str) -> dict[str, Any]:
    figures = {"loss": {}, "difference": None if measured is first else {}}
    if task == "label":
        figures["accuracy"] = {}
    counted = _with_all(measured.counted)
    for file, (nats_R, labels_R, right_R) in counted.items():
        figures["loss"][file] = float(nats_R.sum() / labels_R.sum())
        if task == "label":
            figures["accuracy"][file] = float(right_R.sum() / labels_R.sum())
        if measured is not first:
            files = measured.counted if file == ALL else [file]
            figures["difference"][file] = difference([_losses(measured, first, f) for f in files])
    return measured.figures | figures


def _losses(measured: Measured, first: Measured, file: str) -> Losses:
    nats_R, labels_R, _ = measured.counted[file]
    return nats_R, first.counted[file][0], labels_R


def notes(metrics: dict[str, Any], first: Measured, left: list[str]) -> list[str]:
    """What the figures do not say, in sentences.

    Args:
        left: names of models that were not measured.
    """
    said, models = [], metrics["models"]
    files = {file: counts for file, counts in metrics["files"].items() if file != ALL}
    if left:
        said.append(f"Interrupted, and not measured: {', '.join(left)}.")
    for file, counts in files.items():
        if counts["dropped"]:
            said.append(
                f"{counts['dropped']} rows of {file} exceed {metrics['max_length']} tokens "
                "or have nothing to predict, and were left out for all models."
            )
        if first.counts[file]["examples"] + counts["dropped"] > first.counts[file]["rows"]:
            said.append(
                f"Long texts of {file} were cut in pieces, each of which counts as a document: "
                "pieces of one text are alike, so that intervals are too short."
            )
        if counts["rows"] < FEW:
            said.append(f"{file} keeps few rows ({counts['rows']}): its intervals are too short.")
    if len(types := sorted({model["dtype"] for model in models})) > 1:
        said.append(
            f"Weights are of different types ({', '.join(types)}), which memory and speed follow."
        )
    if models[0]["tokens_per_second"] is None:
        said.append("The rows fill one batch, which warms up: there are no tokens per second.")
    return said
