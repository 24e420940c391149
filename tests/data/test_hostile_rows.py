"""Data files that no one's rows fill: one sentence with the place, and little memory."""

from __future__ import annotations

import gzip
import os

import pytest

from sparsecraft.data import files
from sparsecraft.data.rows import Unused, read_rows
from sparsecraft.errors import DataError

LINES = {
    "deep": b"[" * 100_000,
    "a deep row": b'{"text": ' + b"[" * 80 + b"]" * 80 + b"}",
    "deep tools": b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", '
    b'"content": "b"}], "tools": "%s"}' % (b"[" * 99_999),
    "a large number": b'{"text": "a", "label": %s}' % (b"9" * 30),
    "a very large number": b'{"text": "a", "label": %s}' % (b"9" * 5000),
    "an infinite number": b'{"text": "a", "score": 1e999}',
    "half a character": b'{"text": "\\ud800"}',
    "no UTF-8": b'{"text": "\xff"}',
    "zeros": bytes(5000),
}


def read(path) -> list:
    return list(read_rows(path, "train", Unused()))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ending", [".jsonl", ".json"])
@pytest.mark.parametrize("name", LINES)
def test_a_row_that_is_none_is_one_sentence(tmp_path, name, ending, packed):
    path = tmp_path / f"rows{ending}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(LINES[name]) if packed else LINES[name])
    with pytest.raises(DataError, match="rows"):
        read(path)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".txt"])
def test_what_unpacks_to_more_than_rows_is_not_unpacked(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(files, "SMALL", 1 << 16)
    monkeypatch.setattr(files, "MOST_PACKED", 20)
    path = tmp_path / f"bomb{ending}.gz"
    path.write_bytes(gzip.compress(b" " * 10_000_000))
    with pytest.raises(DataError, match=r"bomb.*unpacked"):
        read(path)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".txt"])
def test_a_file_of_holes_is_not_read_to_its_end(tmp_path, ending):
    path = tmp_path / f"holes{ending}"
    path.write_bytes(b'{"text": "a"}\n')
    os.truncate(path, 10**12)
    with pytest.raises(DataError, match=r"holes.*(longer|larger) than"):
        read(path)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".txt", ".parquet"])
@pytest.mark.parametrize("behind", [b"", b"x"])
def test_zeros_behind_a_packed_file_are_not_read_to_their_end(tmp_path, ending, behind):
    path = tmp_path / f"padded{ending}.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    os.truncate(path, 10**12)
    with path.open("ab") as file:
        file.write(behind)
    with pytest.raises(DataError, match=r"padded.*packed"):
        read(path)


def test_a_little_padding_behind_a_packed_file_is_none_of_its_rows(tmp_path):
    path = tmp_path / "padded.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n') + bytes(10_240))
    assert len(read(path)) == 1


def test_packed_parquet_is_read(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "rows.parquet")
    packed = tmp_path / "rows.parquet.gz"
    packed.write_bytes(gzip.compress((tmp_path / "rows.parquet").read_bytes()))
    assert len(read(packed)) == len(read(tmp_path / "rows.parquet")) == 2
