"""JSON files: written whole or not at all, read with an error that names the file, digested."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import xxhash

from sparsecraft.checkpoint.renames import flush_one
from sparsecraft.dense.jsonfile import LIMITS, read_object
from sparsecraft.errors import CheckpointError


def json_digest(data: Any) -> str:
    """xxh3_128 of plain JSON data, whatever the order of its keys."""
    return f"xxh3_128:{xxhash.xxh3_128(json.dumps(data, sort_keys=True).encode()).hexdigest()}"


def write_json(path: Path, data: Any) -> None:
    """Write plain JSON data under a temporary name, then rename it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(data, indent=2) + "\n")
    flush_one(temporary)
    temporary.replace(path)


def read_json(path: Path, special: Collection[str] = LIMITS) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Args:
        special: of `MEASURED`, the numbers that JSON does not know and that it may hold.

    Raises:
        CheckpointError: see `read_object`.
    """
    return read_object(path, CheckpointError, special)


def differences(then: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, value then, value now) of whatever differs in two JSON values."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in {**then, **now}:
            yield from differences(then.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif then != now:
        yield path, then, now
