"""A short run of what `make fuzz` does at length, and faults that it must see."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsecraft.dense.jsonfile import read_object
from sparsecraft.dense.safefile import SafeFile
from sparsecraft.errors import CheckpointError, DataError
from tests.fuzz import folders
from tests.fuzz.__main__ import faults_of
from tests.fuzz.child import Seen, watch
from tests.fuzz.mutations import BYTES, CODE, JSON, SAFE, mutate

QUICK = settings(
    deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON_DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    folders.make(root / "made")
    return root


class Drawn:
    """hypothesis as what picks."""

    def __init__(self, data: st.DataObject):
        self._data = data

    def choice(self, options):
        return options[self.randrange(len(options))]

    def randrange(self, end: int) -> int:
        return self._data.draw(st.integers(0, end - 1))


@settings(QUICK, max_examples=60)
@given(content=st.binary(max_size=40) | JSON_DATA.map(lambda d: json.dumps(d).encode()))
def test_any_bytes_are_an_object_or_one_sentence(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    try:
        assert isinstance(read_object(tmp_path / "a.json", DataError), dict)
    except DataError as error:
        assert "a.json" in str(error)


@settings(QUICK, max_examples=15)
@given(data=st.data())
def test_an_edited_safetensors_file_is_read_or_one_sentence(made, tmp_path, data):
    path, choose = tmp_path / "moe.safetensors", Drawn(data)
    shutil.copy(made / "made" / "checkpoint" / "moe.safetensors", path)
    choose.choice([*SAFE * 3, *BYTES])(path, choose)
    try:
        for _, tensor in SafeFile.open(path, CheckpointError):
            assert tensor.untyped_storage().nbytes() >= tensor.nbytes
    except CheckpointError as error:
        assert "moe.safetensors" in str(error)


@settings(QUICK, max_examples=10)
@given(data=st.data())
def test_an_edited_folder_is_read_or_refused(made, data):
    choose = Drawn(data)
    kind = choose.choice(folders.KINDS)
    scratch = made / "work" / str(time.monotonic_ns()) / "x"
    shutil.copytree(made / "made" / kind.name, scratch)
    said = mutate(scratch, choose, signed=kind.signed)
    seen = watch(kind.read, scratch, scratch, limit=120)
    shutil.rmtree(scratch)
    assert not faults_of(seen, own=False, wanted=None), (kind.name, said)


def test_a_folder_that_is_not_edited_has_no_fault(made, tmp_path):
    shutil.copytree(made / "made" / "checkpoint", tmp_path / "x")
    seen = [watch(folders.load, tmp_path / "x", tmp_path) for _ in range(2)]
    assert seen[0].end == "read" and not faults_of(seen[1], own=True, wanted=seen[0].logits)
    assert faults_of(seen[1], own=True, wanted="other") == ["other logits from a folder of ours"]


def test_an_edit_is_the_same_for_the_same_number(made, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(made / "made" / "base", tmp_path / name)
    said = [mutate(tmp_path / name, random.Random(7)) for name in ("a", "b")]
    assert said[0] == said[1] and JSON


def _runs_code(folder):
    exec(compile(CODE.partition("open")[0], str(folder / "evil.py"), "exec"))


def _writes_outside(folder):
    (folder.parents[1] / "outside").write_text("x")


PLANTED = {
    "foreign": lambda folder: {}["x"],
    "died": lambda folder: os._exit(3),
    "slow": lambda folder: time.sleep(60),
    "code ran: os.system": lambda folder: os.system("true"),
    "code ran: subprocess": lambda folder: subprocess.run(["true"], check=False),
    "code ran: exec": _runs_code,
    "wrote ": _writes_outside,
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_seen(tmp_path, fault):
    scratch = tmp_path / "a" / "b"
    scratch.mkdir(parents=True)

    def read(folder):
        PLANTED[fault](folder)

    seen = watch(read, scratch, scratch, limit=2 if fault == "slow" else 30)
    assert any(found.startswith(fault) for found in faults_of(seen, own=False, wanted=None))


def test_memory_that_is_taken_is_seen():
    assert faults_of(Seen("read", memory=3 * 2**30), own=False, wanted=None) == ["took 3.0 GB"]
