"""Files that others wrote, JSON above all: regular ones, of bounded size and depth, read by one
function.

A pipe is never waited for and a device never read; what Python's reader passes in silence, a key
that stands twice or a NaN, is refused.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from sparsecraft.errors import SparsecraftError, first_line

MOST_BYTES = 48 * 2**20  # of one file: the index of 300,000 tensors, a long training's history
MOST_DEPTH = 64
MOST_DIGITS = 40  # tokenizers write 10^30 for "no limit"

# Numbers that Python writes and JSON does not know: configurations hold infinite limits (Mamba 2),
# and measurements anything.
LIMITS = ("Infinity", "-Infinity")
MEASURED = (*LIMITS, "NaN")

_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def read_object(
    path: Path, error: type[SparsecraftError], special: Collection[str] = LIMITS
) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        special: of `MEASURED`, those that it may hold.

    Raises:
        SparsecraftError: of the given kind; it is missing, no regular file, too large, not UTF-8,
            no JSON, nested too deeply, or no object.
    """
    content = read_bytes(path, error)
    try:
        text = content.decode()
        data = parse(text, error, special)
        if _HALF_PAIR.search(text):
            json.dumps(data, ensure_ascii=False).encode()  # a ValueError for half a character
    except (ValueError, RecursionError) as fault:
        raise error(
            f"{path} cannot be read, it is not JSON ({first_line(fault):.200}); save it again."
        ) from None
    except SparsecraftError as fault:
        raise error(f"{path} cannot be read: {fault}.") from None
    if not isinstance(data, dict):
        raise error(f"{path} holds {shown(data)}, no JSON object; save it again.")
    return data


def parse(
    content: str | bytes, error: type[SparsecraftError], special: Collection[str] = ()
) -> Any:
    """JSON without what Python reads in silence.

    Args:
        special: of `MEASURED`, those that it may hold; none makes of it strict JSON.

    Raises:
        SparsecraftError: of the given kind; a key stands twice, or a number is none of JSON or
            too large.
        ValueError, RecursionError: it is no JSON, or nested too deeply.
    """
    if isinstance(content, bytes):
        content = content.decode(json.detect_encoding(content))
    data = decoder(error, special).decode(content)
    if content.count("[") + content.count("{") > MOST_DEPTH and _depth(data) > MOST_DEPTH:
        raise RecursionError(f"nested deeper than {MOST_DEPTH} levels")
    return data


def decoder(error: type[SparsecraftError], special: Collection[str] = ()) -> json.JSONDecoder:
    """What `parse` reads with; it does not ask for depth."""
    return json.JSONDecoder(
        object_pairs_hook=partial(_object, error),
        parse_constant=partial(_constant, error, special),
        parse_int=partial(_integer, error),
        parse_float=float if special else partial(_float, error),
    )


def read_bytes(path: Path, error: type[SparsecraftError], most: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file.

    Raises:
        SparsecraftError: of the given kind; it is missing, no regular file, or larger than `most`.
    """
    check_regular(path, error, most)
    try:
        # A pipe that has taken the file's place meanwhile is not waited for.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            content = file.read(most + 1)
    except OSError as fault:
        raise error(f"{path} cannot be read ({fault}).") from None
    if len(content) > most:
        raise error(f"{path} is larger than {most:,} bytes and was not read.")
    return content


def check_regular(path: Path, error: type[SparsecraftError], most: int | None = None) -> None:
    """Refuse what is no regular file, a link that leads nowhere or round in a circle included.

    Raises:
        SparsecraftError: of the given kind; so it is, or it is larger than `most`.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as fault:
        raise error(f"{path} cannot be read ({fault}).") from None
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path} is {kind_of(found.st_mode)} and no regular file; take it away.")
    if most is not None and found.st_size > most:
        raise error(
            f"{path} is {found.st_size:,} bytes; a file of its name has at most {most:,}, and it "
            "was not read."
        )


def kind_of(mode: int) -> str:
    """What a file is that is no regular one, in words."""
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def shown(value: Any) -> str:
    """A value from a file, as short as a sentence wants it."""
    try:
        return f"{value!r:.40}"
    except (RecursionError, ValueError):
        return f"a {type(value).__name__} too large to show"


def _object(error: type[SparsecraftError], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise error(f"the key {twice!r:.80} stands twice in one object; keep one of the two")
    return found


def _constant(error: type[SparsecraftError], special: Collection[str], name: str) -> float:
    if name not in special:
        raise error(f"{name} is no number of JSON; write null or leave the field out")
    return float(name)


def _integer(error: type[SparsecraftError], digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise error(f"the number {digits:.20}... has {len(digits)} digits, more than a file needs")
    return int(digits)


def _float(error: type[SparsecraftError], digits: str) -> float:
    found = float(digits)
    if found in (float("inf"), float("-inf")):
        raise error(f"the number {digits:.20} is too large; write null or leave the field out")
    return found


def _depth(data: Any) -> int:
    level, depth = [data], 0
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [
            inner for item in level for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return depth
