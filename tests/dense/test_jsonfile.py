"""Files that others wrote: what is refused of them, before it costs anything."""

from __future__ import annotations

import json
import os
import socket

import pytest

from sparsecraft.dense.jsonfile import LIMITS, MEASURED, MOST_BYTES, read_bytes, read_object
from sparsecraft.errors import CheckpointError, DataError

FINE = [
    ('{"a": [1, 2.5, null, "\\u00e9"], "b": {"c": true}}', LIMITS),
    ('{"limit": [0.0, Infinity]}', LIMITS),
    ('{"length": 1000000000000000019884624838656}', LIMITS),
    ('{"loss": NaN}', MEASURED),
    ('{"emoji": "\\ud83d\\ude00"}', LIMITS),
    ('{"a": ' + "[" * 60 + "]" * 60 + "}", LIMITS),
]
REFUSED = {
    "empty": b"",
    "deep": b"[" * 100_000,
    "a little deep": b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}",
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a key twice": b'{"a": 1, "a": 2}',
    "a key twice inside": b'{"a": [{"b": 1, "c": 2, "b": 3}]}',
    "NaN": b'{"a": NaN}',
    "a long number": b'{"a": ' + b"9" * 41 + b"}",
    "a very long number": b'{"a": ' + b"9" * 5000 + b"}",
    "half a character": b'{"a": "\\ud83d"}',
    "no object": b"[1]",
    "two": b"{} {}",
}


@pytest.mark.parametrize(("text", "special"), FINE)
def test_what_python_reads_is_read(tmp_path, text, special):
    (tmp_path / "a.json").write_text(text)
    found = read_object(tmp_path / "a.json", CheckpointError, special)
    assert str(found) == str(json.loads(text))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(tmp_path, name):
    (tmp_path / "a.json").write_bytes(REFUSED[name])
    with pytest.raises(DataError, match=r"a\.json"):
        read_object(tmp_path / "a.json", DataError)


def _pipe(path):
    os.mkfifo(path)


def _socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def _sparse(path):
    with path.open("wb") as file:
        file.truncate(10**12)


MADE = {
    "pipe": _pipe,
    "socket": _socket,
    "folder": lambda path: path.mkdir(),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "symbolic": lambda path: path.symlink_to(path),
    "bytes": _sparse,
}


@pytest.mark.parametrize("what", MADE)
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    path = tmp_path.relative_to(tmp_path) / "a.json"
    MADE[what](path if what == "socket" else tmp_path / "a.json")
    with pytest.raises(CheckpointError, match=what):
        read_bytes(tmp_path / "a.json", CheckpointError)


def test_a_file_of_the_most_bytes_is_read(tmp_path):
    with (tmp_path / "a").open("wb") as file:
        file.truncate(MOST_BYTES)
    assert len(read_bytes(tmp_path / "a", CheckpointError)) == MOST_BYTES
