"""The state of an interrupted training run: is it complete, and is it of the same run?"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import xxhash
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn

from sparsecraft.checkpoint.integrity import digest_of_file, signed
from sparsecraft.checkpoint.jsonfile import json_digest, read_json, write_json
from sparsecraft.dense.digests import combine
from sparsecraft.dense.jsonfile import MEASURED
from sparsecraft.errors import CheckpointError, SparsecraftError
from sparsecraft.recipe.formats import from_json, to_json, upgraded
from sparsecraft.surgery.record import conversion_of
from sparsecraft.training.options import TrainOptions

RUN_RECORD = "run.json"
MICRO_BATCH = "micro_batch chosen"  # in that record

# The record of a state: bytes and digest of every other file in it, written last.
DIGESTS = "digests.json"
UNREAD = (DIGESTS, "README.md")

# A state is written in this order.
STATE_FILES = ("moe.safetensors", "digest", "optimizer.pt", "scheduler.pt", "trainer_state.json")

# What may differ between a run and its continuation: how it is shown and kept, and what memory it
# takes, which may be why it ended.
MEMORY = ("micro_batch", "activation_checkpointing")
FREE = ("save_every", "log_every", "trackers", "progress", "fit_tokens", *MEMORY)


def last_state(folder: Path) -> Path | None:
    """The newest training state in a stage's folder that is complete and as it was written."""
    return looked_through(folder)[0]


def looked_through(folder: Path) -> tuple[Path | None, list[str]]:
    """The last state, and of each newer one that is not as it was written the files."""
    lost: list[str] = []
    for state in _states(folder):
        if not (changed := _damaged(state)):
            return state, lost
        lost.append(f"{', '.join(changed)} in {state}")
    return None, lost


def _damaged(state: Path) -> list[str]:
    """The files of a state that are not as they were written, as far as its record knows."""
    if not (state / DIGESTS).is_file():
        return []  # of an older version
    try:
        record = read_json(state / DIGESTS)
    except CheckpointError:
        return [DIGESTS]
    if signed(record) != record or not isinstance(known := record.get("files"), dict):
        return [DIGESTS]
    sizes, now = record.get("bytes", {}), _files(state)
    return sorted(
        name
        for name in known.keys() | now.keys()
        if name not in now
        or sizes.get(name) not in (None, now[name].stat().st_size)
        or known.get(name) != digest_of_file(now[name])
    )


def keep_alone(state: Path) -> None:
    """Write the record of a state that has just been written, then remove the older ones."""
    files = _files(state)
    digests = {name: digest_of_file(path) for name, path in files.items()}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    write_json(state / DIGESTS, signed({"files": digests, "bytes": sizes}))
    for other in state.parent.glob("checkpoint-*"):
        if other != state:
            shutil.rmtree(other, ignore_errors=True)


def _files(state: Path) -> dict[str, Path]:
    """Name -> path of every file that is in a state, also in folders below it."""
    files = (path for path in sorted(state.rglob("*")) if path.is_file())
    names = {path.relative_to(state).as_posix(): path for path in files}
    return {name: path for name, path in names.items() if name not in UNREAD}


def _states(folder: Path) -> list[Path]:
    """The states in a stage's folder that are complete, or were once, the newest first.

    In a run that keeps digests these are written last, and make a state complete.
    """
    numbered = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    states = sorted(numbered, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    run = folder / RUN_RECORD
    digested = run.is_file() and "digests" in _read_run(run)
    return [s for s in states if (s / DIGESTS).is_file() or (not digested and _complete(s))]


def check_folder(folder: Path, resume: bool, stages: tuple[str, ...] = ()) -> None:
    """Refuse to resume where there is nothing, and to start over what was interrupted."""
    begun = [s for s in folder.glob("*") if s.is_dir() and _states(s)]
    if resume:
        _check_any(folder, [looked_through(stage) for stage in begun])
        _check_stages(folder, stages)
    if not resume and begun:
        raise SparsecraftError(
            f"{folder} holds the state of an interrupted run; resume it, or delete the folder."
        )
    if folder.exists() and not folder.is_dir():
        raise SparsecraftError(f"{folder} is a file; training keeps its state there. Move it away.")


def _check_any(folder: Path, found: list[tuple[Path | None, list[str]]]) -> None:
    """Refuse to resume where nothing is left to go on from."""
    if any(state for state, _ in found):
        return
    if lost := [words for _, each in found for words in each]:
        raise SparsecraftError(
            f"There is nothing to resume: {'; '.join(lost)} is not as it was written, and no other "
            f"state is left; delete {folder} and train anew."
        )
    raise SparsecraftError(
        f"There is nothing to resume: {folder} holds no complete training state. "
        "Train without resume, with save_every for states to come back to."
    )


def _check_stages(folder: Path, stages: tuple[str, ...]) -> None:
    """Refuse to go on with other stages than the interrupted run was asked for.

    Raises:
        SparsecraftError: they are others; nothing of its state is lost.
    """
    for path in folder.glob(f"*/{RUN_RECORD}"):
        before = _read_run(path).get("stages", [])
        if before != list(stages):
            asked = f"--stages {' '.join(before)}" if before else "all stages, without --stages"
            raise SparsecraftError(
                f"The interrupted run in {folder} was asked for {asked}; resume it so, or delete "
                "the folder and start anew."
            )


def _complete(state: Path) -> bool:
    if not all((state / name).is_file() for name in STATE_FILES) or not [*state.glob("rng_state*")]:
        return False
    try:
        read_json(state / "trainer_state.json", MEASURED)
    except CheckpointError:
        return False
    return True


def describe(model: nn.Module, settings: TrainOptions, rows: Dataset) -> dict[str, Any]:
    """What a run and its continuation must share: recipe, settings, data, dense model, and experts
    that were added later.

    The tensors that train are not compared: a state brings them all. Nor are the processes: a step
    is of the same rows, whatever their number.
    """
    kept = {k: v for k, v in dataclasses.asdict(settings).items() if k not in FREE}
    record = conversion_of(model)
    return {
        "recipe": json.loads(json.dumps(to_json(record.recipe))),
        **json.loads(json.dumps(kept)),
        "data": _rows_digest(rows),
        "dense model": combine({name: hash for name, (_, hash) in record.digests.items()}),
        "extensions": [
            {key: entry.get(key) for key in ("expert", "digest", "mixed", "rows", "removed")}
            for entry in record.report.get("extensions", [])
        ],
    }


def note_micro_batch(folder: Path, rows: int) -> None:
    """Keep how many rows at a time a run takes, for one that goes on with it and leaves it open."""
    path = folder / RUN_RECORD
    write_json(path, signed(_read_run(path) | {MICRO_BATCH: rows}))


def noted_micro_batch(folder: Path) -> int | None:
    """How many it took last; None of older versions."""
    path = folder / RUN_RECORD
    return _read_run(path).get(MICRO_BATCH) if path.is_file() else None


def check_alike(described: dict[str, Any]) -> None:
    """Refuse processes that were started on different runs; all of them call this.

    Raises:
        SparsecraftError: in all processes. Gradients would be averaged over other rows, settings
            or models than one process has, and nothing else would tell.
    """
    first, *others = gather_object([described])
    for number, other in enumerate(others, 1):
        if unequal := sorted(key for key in first if other[key] != first[key]):
            raise SparsecraftError(
                f"Process {number} was started on another run than process 0: {', '.join(unequal)} "
                "differ. Give all processes the same options and the same copies of the files."
            )


def read_as(model: nn.Module) -> str | None:
    """The digest that format 1 kept of a model's recipe, in the format in which it was read; None
    if the model was not loaded, or has another recipe now."""
    record = conversion_of(model)
    if record.written is None or from_json(record.written) != record.recipe:
        return None
    return json_digest(record.written)


def _rows_digest(rows: Dataset) -> str:
    """One hash over all token ids and labels, in order, without a Python object for each."""
    state = xxhash.xxh3_128()
    for table in rows.with_format("arrow").iter(batch_size=1000):
        for name in ("input_ids", "labels"):
            column = table.column(name).combine_chunks()
            if pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
                state.update(column.value_lengths().to_numpy(zero_copy_only=False))
                column = column.flatten()
            state.update(column.to_numpy(zero_copy_only=False))
    return f"xxh3_128:{state.hexdigest()}"


def check_same_run(
    folder: Path, run: dict[str, Any], resume: bool, read_as: str | None = None
) -> None:
    """Compare with the interrupted run, or write down this one.

    Args:
        run: what `describe` gives.
        read_as: the digest of this run's recipe as it was read, of whatever format.

    Raises:
        SparsecraftError: the continuation would not be of the same run; the field is named.
    """
    path = folder / RUN_RECORD
    if not resume or not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, signed(run | {"digests": True}))
        return
    before = _in_this_format(_read_run(path), run, read_as)
    for key, value in run.items():
        if before.get(key) != value:
            plain = key in ("recipe", "data", "dense model", "extensions")
            had = f"another {key}" if plain else f"{key}={before.get(key)!r}"
            raise SparsecraftError(
                f"The interrupted run in {folder} had {had}; resume with the same arguments, or "
                "delete the folder and start anew."
            )


def _read_run(path: Path) -> dict[str, Any]:
    """The record of a run, as it was written.

    Raises:
        CheckpointError: it was changed since.
    """
    run = read_json(path)
    if {"digest", "digests"} & run.keys() and signed(run) != run:
        raise CheckpointError(
            f"{path} is not as it was written, so that the run cannot be compared with it; delete "
            f"that file to resume with the same arguments all the same, or {path.parent.parent} to "
            "train anew."
        )
    return run


def _in_this_format(
    before: dict[str, Any], run: dict[str, Any], read_as: str | None
) -> dict[str, Any]:
    """The record of an interrupted run, its recipe as it is written now."""
    recipe = before.get("recipe")
    if isinstance(recipe, dict):
        return before | {"recipe": json.loads(json.dumps(upgraded(recipe)))}
    # Format 1 kept a digest of the recipe's own JSON, from which nothing can be upgraded.
    return before | {"recipe": run["recipe"]} if recipe and recipe == read_as else before
