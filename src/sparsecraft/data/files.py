"""Files, folders and hub datasets -> their objects, each with the file and line that it stands at.

Files are read here rather than by `datasets.load_dataset`: that reader cannot name the line at
fault, and turns a column of date-like strings into timestamps.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from sparsecraft.dense.jsonfile import decoder, parse
from sparsecraft.errors import DataError, first_line

log = logging.getLogger("sparsecraft")

EXTENSIONS = (".json", ".jsonl", ".parquet", ".txt")
MOST_LINE, MOST_WHOLE = 1 << 26, 1 << 29  # bytes of a row, and of a file that is read as a whole
MOST_PACKED, SMALL = 200, 1 << 26  # a .gz holds at most this multiple of its bytes, and these
MOST_PADDING = 1 << 20  # and is read at most so far beyond twice what it has given
TOO_DEEP = "the JSON is nested too deeply to be read; flatten it"
# Words of a file name that name its split, each with the split it stands for.
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "test": "test",
    "heldout": "heldout",
    "eval": "eval",
    "dev": "dev",
}


class Place(NamedTuple):
    """Where an object was read: `line` is "line 3", or "row 3" where no line exists."""

    file: str
    line: str

    def __str__(self) -> str:
        return f"{self.file}, {self.line}"


def objects(source: str | Path, split: str) -> Iterator[tuple[Place, Any]]:
    """The objects of a file, of the files of a folder that belong to `split`, or of the hub."""
    path = data_path(source)
    if not path.exists():
        yield from _read_hub(str(source), split)
        return
    for file in _files(path, split):
        yield from read(file)


def data_path(source: str | Path) -> Path:
    if not str(source).strip():
        raise DataError(f"The data path is {str(source)!r}; name a file, a folder or a dataset.")
    return Path(source).expanduser()


def _files(path: Path, split: str) -> list[Path]:
    """The data files of a folder that belong to `split`, or the one file."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: neither a regular file nor a folder; write its rows to a file.")
    files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    known = [p for p in files if _extension(p) in EXTENSIONS]
    for file in sorted(set(files) - set(known)):
        log.warning("%s: ignored, its extension is not one of %s", file, ", ".join(EXTENSIONS))
    splits = {p: _splits(p.name) for p in known}
    if any(splits.values()):
        wanted = SPLIT_WORDS.get(split, split)
        known = [p for p in known if wanted in (splits[p] or {"train"})]
        if left_out := ", ".join(p.name for p in splits if p not in known):
            log.warning("%s: left out, not of the split %r: %s", path, split, left_out)
    if not known:
        names = ", ".join(p.name for p in files) or "nothing"
        raise DataError(
            f"{path}: no data file of the split {split!r} (found {names}; "
            f"known extensions: {', '.join(EXTENSIONS)}, each also .gz)."
        )
    return known


def _splits(name: str) -> set[str]:
    """The splits that the whole words of a file name name: `constraints` holds no `train`."""
    words = re.split(r"[^a-z]+", re.sub(r"held[-_ ]out", "heldout", name.lower()))
    return {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}


def _extension(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def read(path: Path) -> Iterator[tuple[Place, Any]]:
    """The objects of one file."""
    extension, empty = _extension(path), True
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    if extension not in EXTENSIONS:
        raise DataError(f"{path}: unknown extension {extension!r}; known: {', '.join(EXTENSIONS)}.")
    reader = {".parquet": _read_parquet, ".txt": _read_text}.get(extension, _read_json)
    try:
        with _opened(path) as file:
            for line, row in reader(file, extension):
                empty = False
                yield Place(str(path), line), row
    except (OSError, EOFError, zlib.error, ValueError) as err:  # ValueError: Arrow's, JSON's
        raise DataError(f"{path}: cannot be read as {extension}: {err}") from err
    except DataError as err:
        raise DataError(f"{path}, {err}") from None
    if empty:
        raise DataError(f"{path}: holds no rows.")


def _opened(path: Path) -> IO[bytes]:
    if path.suffix != ".gz":
        return path.open("rb")
    return io.BufferedReader(_Unpacked(path))


class _Packed(io.FileIO):
    """A .gz file, read no further than its rows can have filled: gzip passes over zeros and empty
    members behind its data, however many."""

    most = 0

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > self.most:
            raise DataError("more bytes packed than unpacked, which no rows are; pack it anew.")
        return super().read(size)


class _Unpacked(io.RawIOBase):
    """What a .gz file holds, up to the size that rows can have grown to."""

    def __init__(self, path: Path):
        self._packed = _Packed(path)
        self._file = gzip.GzipFile(fileobj=self._packed)
        self._most = MOST_PACKED * path.stat().st_size + SMALL

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._packed.most = 2 * self._file.tell() + MOST_PADDING
        piece = self._file.read(min(len(buffer), MOST_PADDING // 2))
        if self._file.tell() > self._most:
            raise DataError(
                f"more than {MOST_PACKED} times as large unpacked as packed, which no rows are; "
                "unpack it first."
            )
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self._file.close()
        self._packed.close()
        super().close()


def _read_parquet(file, extension: str) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(_seekable(file)).iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"row {number}", _without_nulls(row)


def _seekable(file: IO[bytes]) -> IO[bytes]:
    if file.seekable():
        return file
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115
    shutil.copyfileobj(file, unpacked)
    return unpacked


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """The row without the nulls that Arrow puts into a structure for keys that others have: a call
    of one tool would have the arguments of all."""
    return {key: _filled(value) for key, value in row.items()}


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner) for key, inner in value.items() if inner is not None}
    return [_filled(inner) for inner in value] if isinstance(value, list) else value


def _read_text(file, extension: str) -> Iterator[tuple[str, Any]]:
    text = _whole(file).decode("utf-8-sig")
    if text.strip():
        yield "line 1", {"text": text}


def _whole(file: IO[bytes]) -> bytes:
    content = file.read(MOST_WHOLE + 1)
    if len(content) > MOST_WHOLE:
        raise DataError(f"line 1: larger than {MOST_WHOLE:,} bytes; write its rows as .jsonl.")
    return content


# ------------------------------------------------------------------ JSON
def _read_json(file, extension: str) -> Iterator[tuple[str, Any]]:
    """One object a line; a .json file may also hold one array, or one object over many lines."""
    if extension == ".json":
        content = _whole(file)
        try:
            value = parse(content, DataError) if content.strip() else []
        except json.JSONDecodeError as err:
            if err.msg != "Extra data":
                raise DataError(f"line {err.lineno}: not JSON ({err.msg})") from None
            file = io.BytesIO(content)  # several values after each other: one a line
        except RecursionError:
            raise DataError(f"line {_deepest_line(content)}: {TOO_DEEP}.") from None
        except DataError as err:
            raise DataError(f"{_row_at_fault(content)}: {err}.") from None
        else:
            rows = value if isinstance(value, list) else [value]
            yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
            return
    for number, line in enumerate(iter(lambda: file.readline(MOST_LINE + 1), b""), 1):
        if len(line) > MOST_LINE:
            raise DataError(f"line {number}: longer than {MOST_LINE:,} bytes; write a row a line.")
        if line.strip():
            try:
                row = parse(line, DataError)
            except ValueError as err:
                raise DataError(f"line {number}: not JSON ({err}): {line[:60]!r}") from None
            except RecursionError:
                raise DataError(f"line {number}: {TOO_DEEP}: {line[:60]!r}") from None
            except DataError as err:
                raise DataError(f"line {number}: {err}.") from None
            yield f"line {number}", row


def _row_at_fault(content: bytes) -> str:
    """Where `parse` refuses a document: the row of an array."""
    text = content.decode("utf-8-sig").strip()
    strict = decoder(DataError)
    number, at = 0, text.startswith("[")
    try:
        while True:
            number += 1
            at = strict.raw_decode(text, re.compile(r"[\s,]*").match(text, at).end())[1]
    except DataError:
        return f"row {number}"


def _deepest_line(content: bytes) -> int:
    """The line of JSON where most brackets are open; strings, which may hold some, are passed."""
    depth, line, deepest = 0, 1, (0, 1)
    for token in re.findall(rb'"(?:[^"\\]|\\.)*"|[\[\]{}\n]', content):
        line += token == b"\n"
        depth += (token in (b"[", b"{")) - (token in (b"]", b"}"))
        if depth > deepest[0]:
            deepest = depth, line
    return deepest[1]


def _read_hub(name: str, split: str) -> Iterator[tuple[Place, Any]]:
    """Rows of a hub dataset; what looks like a path never reaches for the network."""
    pathlike = _extension(Path(name)) in EXTENSIONS
    if pathlike or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise DataError(f"{name}: no such file or folder.")
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as err:  # the hub client raises a dozen kinds
        reason = first_line(err)
        raise DataError(
            f"{name}: no such file or folder here, and the hub gave no dataset of that name with "
            f"split {split!r} ({type(err).__name__}: {reason})."
        ) from err
    for number, row in enumerate(rows, 1):
        yield Place(name, f"row {number}"), _without_nulls(row)
