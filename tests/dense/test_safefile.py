"""Safetensors read into memory: equal to the library's, and apart from the file from then on."""

from __future__ import annotations

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsecraft.dense.safefile import DTYPES, MOST_TENSORS, SafeFile
from sparsecraft.errors import CheckpointError

WHOLE = {
    "a": torch.randn(7, 5),
    "b": torch.randn(3).bfloat16(),
    "c": torch.tensor(3),
    "d": torch.zeros(0, 4),
    "e": torch.tensor([True, False]),
    "f": torch.randn(9).to(torch.float8_e4m3fn),
}


@pytest.fixture
def path(tmp_path):
    save_file(WHOLE, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_it_reads_what_the_library_reads(path):
    file, theirs = SafeFile.open(path, CheckpointError), load_file(path)
    assert set(file.entries) == set(theirs)
    for name, tensor in file:
        assert tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape
        assert torch.equal(tensor.float(), theirs[name].float())
        assert file.entries[name].is_floating == tensor.is_floating_point()


def test_every_type_that_torch_has_is_read(tmp_path):
    for word, dtype in DTYPES.items():
        save_file({"x": torch.zeros(3, dtype=dtype)}, tmp_path / "x.safetensors")
        file = SafeFile.open(tmp_path / "x.safetensors", CheckpointError)
        assert file.entries["x"].word == word and file.read("x").dtype == dtype


def test_what_is_written_over_it_later_changes_no_tensor(path):
    tensor = SafeFile.open(path, CheckpointError).read("a")
    before = tensor.clone()
    with path.open("r+b") as file:
        file.write(b"\xff" * os.path.getsize(path))
    os.truncate(path, 10)
    assert torch.equal(tensor, before)


def test_another_file_in_its_place_is_seen(path):
    file = SafeFile.open(path, CheckpointError)
    save_file({"a": torch.randn(6, 5)}, path)
    with pytest.raises(CheckpointError, match="changed since"):
        file.read("a")
    save_file(WHOLE, path)
    assert torch.equal(file.read("a"), WHOLE["a"])


def _write(path, header, data=b""):
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"x": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}, b"1234"),
        ({"x": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}, b""),
        ({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"),
        ({"x": {"dtype": "ZZ", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}, b"1234"),
        ([1], b""),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, data):
    _write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read"):
        SafeFile.open(tmp_path / "x.safetensors", CheckpointError)


def test_more_tensors_than_any_model_has_are_refused(tmp_path):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    _write(tmp_path / "x.safetensors", {f"{i}": entry for i in range(MOST_TENSORS + 1)})
    with pytest.raises(CheckpointError, match="more tensors than one file"):
        SafeFile.open(tmp_path / "x.safetensors", CheckpointError)
