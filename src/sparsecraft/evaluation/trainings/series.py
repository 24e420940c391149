"""The log of a training run as series over its steps.

S log lines of all stages, one after the other.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sparsecraft.checkpoint.integrity import REPORT
from sparsecraft.checkpoint.jsonfile import read_json
from sparsecraft.checkpoint.manifest import MANIFEST
from sparsecraft.dense.door import guarded
from sparsecraft.dense.jsonfile import MEASURED
from sparsecraft.errors import CheckpointError

PREFIX, LOG, STATE = "checkpoint-", "log_history", "trainer_state.json"


def training_series(folder: str | Path) -> dict[str, Any]:
    """What the log of a checkpoint's training says, or of a training that is under way, by the
    states beside its folder.

    Returns:
        `stages`: name and steps of each; `steps`: of each log line, counted through all stages;
        `series`: key -> S values, None where a line has none; `layers`: measure -> layer -> as
        `series`; `running`: whether the training has not written its checkpoint yet.

    Raises:
        CheckpointError: the folder has no training, or its files cannot be read.
    """
    folder = Path(folder).expanduser().resolve()
    running = not (folder / MANIFEST).is_file()
    with guarded(folder, CheckpointError):
        stages = _under_way(folder) if running else _done(folder)
        stages = [(name, lines) for name, log in stages if (lines := _with_loss(log))]
    if not stages:
        raise CheckpointError(
            f"{folder} holds no log of a training by steps. Pass a checkpoint that `sparsecraft "
            "train` wrote, or one that it is writing with --save-every."
        )
    return _series(stages) | {"running": running}


def _done(folder: Path) -> list[tuple[str, list[dict]]]:
    report = read_json(folder / REPORT, MEASURED)
    return [(run["stage"], run.get("log", [])) for run in report.get("training", [])]


def _under_way(folder: Path) -> list[tuple[str, list[dict]]]:
    """The log up to the last state of each stage."""
    found = []
    for stage in sorted(folder.with_name(f"{folder.name}.training").glob("*-*")):
        named = [p for p in stage.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
        states = sorted(named, key=lambda path: -int(path.name.removeprefix(PREFIX)))
        log = next(filter(None, map(_log_of, states)), None)
        if log:
            found.append((stage.name.partition("-")[2], log))
    return found


def _log_of(state: Path) -> list[dict] | None:
    """None of a state that is being written, or taken away, meanwhile."""
    try:
        return read_json(state / STATE, MEASURED)[LOG]
    except (CheckpointError, KeyError, OSError):
        return None


def _with_loss(log: list[dict]) -> list[dict]:
    return [line for line in log if "loss" in line]


def _series(stages: list[tuple[str, list[dict]]]) -> dict[str, Any]:
    steps, rows, spans, begun = [], [], [], 0
    for name, lines in stages:
        steps += [begun + line["step"] for line in lines]
        rows += lines
        spans.append({"stage": name, "begun": begun, "steps": lines[-1]["step"]})
        begun += lines[-1]["step"]
    series: dict[str, list] = {}
    layers: dict[str, dict[str, list]] = {}
    for key in dict.fromkeys(key for line in rows for key in line):
        values = [_number(line.get(key)) for line in rows]
        kind, _, layer = key.partition("/")
        if layer:
            layers.setdefault(kind, {})[layer] = values
        elif key not in ("step", "epoch"):
            series[key] = values
    return {"stages": spans, "steps": steps, "series": series, "layers": layers}


def _number(value: Any) -> float | None:
    """None of what JSON has no number for."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None
