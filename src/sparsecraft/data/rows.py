"""Chat, text and choice files -> canonical rows, each fault with its file and line."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecraft.data.files import TOO_DEEP, Place, data_path, objects, read
from sparsecraft.data.shapes import SHAPES, canonical
from sparsecraft.data.turns import is_empty, unicode
from sparsecraft.errors import DataError

if TYPE_CHECKING:
    import datasets

log = logging.getLogger("sparsecraft")

CHOICE_SHAPE = "{prompt, choices, answer}"
CHOICE_KEYS = ("prompt", "choices", "answer", "template", "task")


class Unused:
    """Fields that rows hold and nothing uses: file -> field -> rows, named once for each file."""

    def __init__(self) -> None:
        self.found: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def add(self, place: Place, fields: Iterable[str]) -> None:
        names = set(fields)
        if names:
            self.found[place.file].update(names)

    def counts(self) -> dict[str, dict[str, int]]:
        """The same as plain dicts; a warning for each file."""
        for file, fields in self.found.items():
            named = ", ".join(f"{field} ({rows})" for field, rows in sorted(fields.items()))
            log.warning("%s: fields that are not used, and in how many rows: %s", file, named)
        return {file: dict(sorted(fields.items())) for file, fields in self.found.items()}


def load_rows(source: str | Path, split: str = "train") -> datasets.Dataset:
    """Canonical rows: `messages`, `text`, or `text` and `label`.

    `source` is a .json, .jsonl, .parquet or .txt file (one document each), any of them .gz, a
    folder of such files, or a dataset name on the hub. `split` picks the split on the hub and, in
    a folder where a file name carries a split word (`math.train.jsonl`), the files of that split; a
    file without such a word is then for training. A single file is read whole. No row is dropped:
    row n is the n-th of the source. Fields that no row shape knows are named in a warning.

    Raises DataError, with file and line (row for parquet and JSON arrays), for what is missing,
    empty or malformed.
    """
    unused = Unused()
    rows = collect((row for _, row in read_rows(source, split, unused)), row_features())
    unused.counts()
    return rows


def read_rows(
    source: str | Path, split: str, unused: Unused
) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The same one by one, each with its place; fields that are not used are added to `unused`."""
    return _checked(objects(source, split), canonical, SHAPES, unused)


def load_choices(path: str | Path) -> list[dict]:
    """Rank-classification rows: {prompt, choices, answer, template?, task?}, `answer` an index.

    A .jsonl, .json or .parquet file, each also .gz. Raises DataError with file and line.
    """
    unused = Unused()
    rows = [row for _, row in _checked(read(data_path(path)), _choice, CHOICE_SHAPE, unused)]
    unused.counts()
    return rows


def _choice(row: Any, unused: list[str]) -> dict:
    """The row itself; DataError says what is wrong with it."""
    row = row if isinstance(row, dict) else {}
    prompt, choices, answer = (row.get(key) for key in ("prompt", "choices", "answer"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"the prompt is {prompt!r:.40}, not text")
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f"the choices are {choices!r:.40}, not a list of two or more")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise DataError(f"one of the choices {choices!r:.60} is not text")
    if len(set(choices)) < len(choices):
        twice = next(choice for choice in choices if choices.count(choice) > 1)
        raise DataError(f"two of the choices are {twice!r:.40}; which of them wins is chance")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise DataError(f"the answer is {answer!r:.40}, not an index into {len(choices)} choices")
    for text in (prompt, *choices, row.get("template"), row.get("task")):
        if isinstance(text, str):
            unicode(text)
    unused += [key for key, value in row.items() if key not in CHOICE_KEYS and not is_empty(value)]
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
    """Column types of canonical rows: what a chat template is given keeps its own shape."""
    from datasets import Json, List, Value

    given = dict.fromkeys(("tools", "documents", "chat_template_kwargs"), Json())
    columns = {"messages": List(Json()), "text": Value("string"), "label": Value("int64")}
    return columns | given | {"train": Value("bool")}


def _checked(
    placed: Iterable[tuple[Place, Any]],
    check: Callable[[Any, list[str]], dict],
    known: str,
    unused: Unused,
) -> Iterator[tuple[Place, dict]]:
    """What `check` makes of every row; its faults get their place and the `known` shapes."""
    for place, row in placed:
        fields: list[str] = []
        try:
            checked = check(row, fields)
        except DataError as err:
            raise DataError(f"{place}: {err}. Known row shapes: {known}.") from None
        except RecursionError:  # a nested value that the reader could hold, but no message show
            raise DataError(f"{place}: {TOO_DEEP}. Known row shapes: {known}.") from None
        unused.add(place, fields)
        yield place, checked
