"""Chat and text files -> canonical rows, each fault with its file and line.

Files are read here rather than by `datasets.load_dataset`: that reader cannot name the line at
fault, and turns a column of date-like strings into timestamps.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecraft.errors import DataError

if TYPE_CHECKING:
    import datasets

log = logging.getLogger("sparsecraft")

EXTENSIONS = (".json", ".jsonl", ".parquet", ".txt")
SHAPES = (
    "{messages: [{role, content}]}, {conversations: [{from, value}]}, {prompt, completion}, "
    "{instruction, input?, output, system?}, {instruction?, conversation: [{input, output}]}, "
    "{text}, {text, label}"
)
SHAREGPT = {"human": "user", "gpt": "assistant"}  # its other roles bear the usual names
ROLES = ("system", "developer", "user", "assistant", "tool")


def load_rows(source: str | Path, split: str = "train") -> datasets.Dataset:
    """Canonical rows: `messages` (list of {role, content}), `text`, or `text` and `label`.

    `source` is a .json, .jsonl, .parquet or .txt file (one document each), any of them .gz, a
    folder of such files, or a dataset name on the hub. `split` picks the split on the hub and, in
    a folder whose file names carry split words (`math.train.jsonl`), the files of that split; a
    single file is read whole. No row is dropped: row n is the n-th of the source. Columns that
    belong to no known row shape are ignored.

    Raises DataError, with file and line (row for parquet and JSON arrays), for what is missing,
    empty or malformed.
    """
    path = Path(source).expanduser()
    if path.exists():
        placed = (item for file in _files(path, split) for item in _read(file))
    else:
        placed = _read_hub(str(source), split)
    return collect(_canonical_rows(placed), row_features())


def load_choices(path: str | Path) -> list[dict]:
    """Rank-classification rows: {prompt, choices, answer, template?, task?}, `answer` an index.

    A .jsonl, .json or .parquet file, each also .gz. Raises DataError with file and line.
    """
    rows = []
    for place, row in _read(Path(path).expanduser()):
        row = row if isinstance(row, dict) else {}
        prompt, choices, answer = (row.get(key) for key in ("prompt", "choices", "answer"))
        fault = None
        if not isinstance(prompt, str) or not prompt.strip():
            fault = f"the prompt is {prompt!r:.40}, not text"
        elif not isinstance(choices, list) or len(choices) < 2:
            fault = f"the choices are {choices!r:.40}, not a list of two or more"
        elif not all(isinstance(choice, str) and choice.strip() for choice in choices):
            fault = f"one of the choices {choices!r:.60} is not text"
        elif type(answer) is not int or not 0 <= answer < len(choices):
            fault = f"the answer is {answer!r}, not an index into {len(choices)} choices"
        if fault:
            raise DataError(f"{place}: {fault}. Known: {{prompt, choices, answer}}.")
        rows.append(row)
    return rows


def collect(rows: Iterable[dict], features: dict, chunk: int = 10_000) -> datasets.Dataset:
    """An in-memory Dataset of `rows`, built by chunks so that Python objects never pile up.

    A column that no row fills is left out; a cell that its row lacks is None.
    """
    from datasets import Dataset, Features, concatenate_datasets

    rows, parts, used = iter(rows), [], set()
    features = Features(features)
    while batch := list(islice(rows, chunk)):
        used.update(*batch)
        columns = {key: [row.get(key) for row in batch] for key in features}
        parts.append(Dataset.from_dict(columns, features=features))
    if not parts:
        return Dataset.from_dict({key: [] for key in features}, features=features)
    return concatenate_datasets(parts).select_columns([key for key in features if key in used])


def row_features() -> dict:
    """Column types of canonical rows."""
    from datasets import List, Value

    turn = {"role": Value("string"), "content": Value("string")}
    return {"messages": List(turn), "text": Value("string"), "label": Value("int64")}


def _canonical_rows(placed: Iterable[tuple[str, Any]]) -> Iterator[dict]:
    for place, row in placed:
        try:
            yield _canonical(row)
        except DataError as err:
            raise DataError(f"{place}: {err}. Known row shapes: {SHAPES}.") from None


def _files(path: Path, split: str) -> list[Path]:
    """The data files of a folder that belong to `split`, or the one file."""
    if path.is_file():
        return [path]
    files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    known = [p for p in files if _extension(p) in EXTENSIONS]
    for file in sorted(set(files) - set(known)):
        log.warning("%s: ignored, its extension is not one of %s", file, ", ".join(EXTENSIONS))
    words = {p: re.findall(r"train|valid|test|heldout|eval|dev", p.name.lower()) for p in known}
    if any(words.values()):
        chosen = [p for p in known if split.removesuffix("ation") in words[p]]
        for file in sorted(set(known) - set(chosen)):
            log.info("%s: not of the split %r", file, split)
        known = chosen
    if not known:
        names = ", ".join(p.name for p in files) or "nothing"
        raise DataError(
            f"{path}: no data file of the split {split!r} (found {names}; "
            f"known extensions: {', '.join(EXTENSIONS)}, each also .gz)."
        )
    return known


def _extension(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (place, object): the place is file and line, or file and row where no line exists."""
    extension, empty = _extension(path), True
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    if extension not in EXTENSIONS:
        raise DataError(f"{path}: unknown extension {extension!r}; known: {', '.join(EXTENSIONS)}.")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for place, row in {".parquet": _read_parquet, ".txt": _read_text}.get(
                extension, _read_json
            )(file, extension):
                empty = False
                yield f"{path}, {place}", row
    except (OSError, EOFError, zlib.error, ValueError) as err:  # ValueError: Arrow's, JSON's
        raise DataError(f"{path}: cannot be read as {extension}: {err}") from err
    except DataError as err:
        raise DataError(f"{path}, {err}") from None
    if empty:
        raise DataError(f"{path}: holds no rows.")


def _read_parquet(file, extension: str) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"row {number}", row


def _read_text(file, extension: str) -> Iterator[tuple[str, Any]]:
    text = file.read().decode("utf-8-sig")
    if text.strip():
        yield "line 1", {"text": text}


def _read_json(file, extension: str) -> Iterator[tuple[str, Any]]:
    """One object a line; a .json file may also hold one array, or one object over many lines."""
    if extension == ".json":
        content = file.read()
        try:
            value = json.loads(content) if content.strip() else []
        except json.JSONDecodeError as err:
            if err.msg != "Extra data":
                raise DataError(f"line {err.lineno}: not JSON ({err.msg})") from None
            file = content.splitlines()  # several values after each other: one a line
        else:
            rows = value if isinstance(value, list) else [value]
            yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
            return
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as err:
                raise DataError(f"line {number}: not JSON ({err}): {line[:60]!r}") from None
            yield f"line {number}", row


def _read_hub(name: str, split: str) -> Iterator[tuple[str, Any]]:
    """Rows of a hub dataset; what looks like a path never reaches for the network."""
    pathlike = _extension(Path(name)) in EXTENSIONS
    if pathlike or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise DataError(f"{name}: no such file or folder.")
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as err:  # the hub client raises a dozen kinds
        reason = (str(err).splitlines() or [""])[0]
        raise DataError(
            f"{name}: no such file or folder here, and the hub gave no dataset of that name with "
            f"split {split!r} ({type(err).__name__}: {reason})."
        ) from err
    yield from ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))


def _canonical(row: Any) -> dict:
    """One row in canonical form; DataError says what is wrong with it."""
    if not isinstance(row, dict):
        raise DataError(f"found {type(row).__name__} {str(row)[:40]!r} where an object belongs")
    have = {key: value for key, value in row.items() if value is not None}
    if "messages" in have:
        return {"messages": _messages(have["messages"])}
    if "conversations" in have:
        turns = [_object(turn) for turn in _list(have["conversations"])]
        return {"messages": _messages([_from_sharegpt(turn) for turn in turns])}
    if have.get("corpus"):  # PESC's row: a plain document, or turns under one instruction
        return {"text": _string(have, "corpus")}
    if "conversation" in have:
        turns = [_object(turn) for turn in _list(have["conversation"])]
        return {"messages": _system(have, "instruction") + [m for t in turns for m in _pair(t)]}
    if {"prompt", "completion"} <= have.keys():
        if isinstance(have["prompt"], list):
            return {"messages": _messages([*have["prompt"], *_list(have["completion"])])}
        return {"messages": _pair({"input": have["prompt"], "output": have["completion"]})}
    if {"instruction", "output"} <= have.keys():
        parts = (_string(have, "instruction"), str(have.get("input", "")))
        user = "\n\n".join(part for part in parts if part.strip())
        pair = _pair({"input": user, "output": have["output"]})
        return {"messages": _system(have, "system") + pair}
    if "text" in have:
        label = have.get("label")
        if label is not None and (isinstance(label, bool) or not isinstance(label, int)):
            raise DataError(f"the label is {label!r}; labels are whole numbers from 0")
        # An empty text is legal (text corpora hold blank lines): it counts as untrainable later.
        return {"text": _string(have, "text", empty=True)} | (
            {} if label is None else {"label": label}
        )
    keys = ", ".join(k if k in have else f"{k} (null)" for k in row) or "no keys"
    raise DataError(f"unknown row shape with {keys}")


def _from_sharegpt(turn: dict) -> dict:
    role = turn.get("from")
    return {"role": SHAREGPT.get(role, role), "content": turn.get("value")}


def _system(row: dict, key: str) -> list[dict]:
    content = row.get(key)
    return _messages([{"role": "system", "content": content}]) if content else []


def _pair(turn: dict) -> list[dict]:
    roles = {"user": turn.get("input"), "assistant": turn.get("output")}
    return _messages([{"role": role, "content": content} for role, content in roles.items()])


def _messages(messages: Any) -> list[dict]:
    checked = []
    for number, message in enumerate(_list(messages), 1):
        role, content = _object(message).get("role"), message.get("content")
        if role not in ROLES:
            known = ", ".join([*ROLES, *SHAREGPT])
            raise DataError(f"message {number} has the role {role!r}; known: {known}")
        if not isinstance(content, str) or (role == "assistant" and not content.strip()):
            raise DataError(f"message {number} ({role}) has the content {content!r}")
        checked.append({"role": role, "content": content})
    return checked


def _object(value: Any) -> dict:
    if not isinstance(value, dict):
        raise DataError(f"found {value!r:.40} where a message belongs")
    return value


def _list(value: Any) -> list:
    if not isinstance(value, list) or not value:
        raise DataError(f"found {value!r:.40} where a non-empty list of messages belongs")
    return value


def _string(row: dict, key: str, empty: bool = False) -> str:
    if not isinstance(row[key], str) or not (empty or row[key].strip()):
        raise DataError(f"{key!r} is {row[key]!r:.40}, not text")
    return row[key]
