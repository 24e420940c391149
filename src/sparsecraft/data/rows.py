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
from collections.abc import Callable, Iterable, Iterator
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
TOO_DEEP = "the JSON is nested too deeply to be read; flatten it"
CHOICE_SHAPE = "{prompt, choices, answer}"
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


def load_rows(source: str | Path, split: str = "train") -> datasets.Dataset:
    """Canonical rows: `messages` (list of {role, content}), `text`, or `text` and `label`.

    `source` is a .json, .jsonl, .parquet or .txt file (one document each), any of them .gz, a
    folder of such files, or a dataset name on the hub. `split` picks the split on the hub and, in
    a folder where a file name carries a split word (`math.train.jsonl`), the files of that split; a
    file without such a word is then for training. A single file is read whole. No row is dropped:
    row n is the n-th of the source. Columns that belong to no known row shape are ignored.

    Raises DataError, with file and line (row for parquet and JSON arrays), for what is missing,
    empty or malformed.
    """
    path = _path(source)
    if path.exists():
        placed = (item for file in _files(path, split) for item in _read(file))
    else:
        placed = _read_hub(str(source), split)
    return collect(_checked(placed, _canonical, SHAPES), row_features())


def load_choices(path: str | Path) -> list[dict]:
    """Rank-classification rows: {prompt, choices, answer, template?, task?}, `answer` an index.

    A .jsonl, .json or .parquet file, each also .gz. Raises DataError with file and line.
    """
    return list(_checked(_read(_path(path)), _choice, CHOICE_SHAPE))


def _choice(row: Any) -> dict:
    """The row itself; DataError says what is wrong with it."""
    row = row if isinstance(row, dict) else {}
    prompt, choices, answer = (row.get(key) for key in ("prompt", "choices", "answer"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"the prompt is {prompt!r:.40}, not text")
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f"the choices are {choices!r:.40}, not a list of two or more")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise DataError(f"one of the choices {choices!r:.60} is not text")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise DataError(f"the answer is {answer!r:.40}, not an index into {len(choices)} choices")
    for text in (prompt, *choices, row.get("template"), row.get("task")):
        if isinstance(text, str):
            _unicode(text)
    return row


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


def _checked(
    placed: Iterable[tuple[str, Any]], check: Callable[[Any], dict], known: str
) -> Iterator[dict]:
    """What `check` makes of every row; its faults get their place and the `known` shapes."""
    for place, row in placed:
        try:
            checked = check(row)
        except DataError as err:
            raise DataError(f"{place}: {err}. Known row shapes: {known}.") from None
        except RecursionError:  # a nested value that the reader could hold, but no message show
            raise DataError(f"{place}: {TOO_DEEP}. Known row shapes: {known}.") from None
        yield checked


def _path(source: str | Path) -> Path:
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
        except RecursionError:
            raise DataError(f"line {_deepest_line(content)}: {TOO_DEEP}.") from None
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
            except RecursionError:
                raise DataError(f"line {number}: {TOO_DEEP}: {line[:60]!r}") from None
            yield f"line {number}", row


def _deepest_line(content: bytes) -> int:
    """The line of JSON where most brackets are open; strings, which may hold some, are passed."""
    depth, line, deepest = 0, 1, (0, 1)
    for token in re.findall(rb'"(?:[^"\\]|\\.)*"|[\[\]{}\n]', content):
        line += token == b"\n"
        depth += (token in (b"[", b"{")) - (token in (b"]", b"}"))
        if depth > deepest[0]:
            deepest = depth, line
    return deepest[1]


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
        # type, not isinstance: True is an int. Labels are stored in 64 bits.
        if label is not None and (type(label) is not int or not 0 <= label < 2**63):
            raise DataError(f"the label is {label!r:.40}; labels are whole numbers from 0")
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
        checked.append({"role": role, "content": _unicode(content)})
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
    return _unicode(row[key])


def _unicode(text: str) -> str:
    """`text`, refused if it holds half of a surrogate pair: no tokenizer and no file takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as err:
        found, at = text[err.start], err.start
        raise DataError(
            f"the lone surrogate {found!r} stands at character {at} of a text; remove it"
        ) from None
    return text
