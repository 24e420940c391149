"""A run that one engine began is gone on with by another, and ends as if it had been one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.scale.launching import Launch
from tests.training import engines
from tests.training.test_cut import assert_same_run

ENGINES = ("ddp", "fsdp2")


def launched(engine: str, folder: Path, verb: str) -> None:
    launch = Launch(engine, engine, [], processes=2)
    command = [*launch.command("tests.training.engines"), str(folder), verb]
    done = subprocess.run(command, env=launch.variables(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    return engines.train(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A folder of each engine, where a run was stopped behind its fourth step."""
    root = tmp_path_factory.mktemp("begun")
    for engine in ENGINES:
        (root / engine).mkdir()
        launched(engine, root / engine, "begin")
    return root


def steps_of(run: dict) -> dict:
    """Without Trainer's own mean, which is of the steps since it went on, and without the routers'
    saturation, which is looked at wherever a state is written."""
    lines = [entry for entry in run["log"] if "loss" in entry]
    kept = [
        {key: value for key, value in line.items() if not key.startswith("saturation")}
        for line in lines
    ]
    return run | {"log": kept}


@pytest.mark.parametrize(("first", "second"), [("ddp", "one"), ("ddp", "fsdp2"), ("fsdp2", "ddp")])
def test_any_engine_goes_on_with_any_others_run(first, second, whole, begun, tmp_path):
    assert [p.name for p in (begun / first).glob("*.training/*/checkpoint-*")] == ["checkpoint-4"]
    shutil.copytree(begun / first, tmp_path, dirs_exist_ok=True)
    if second == "one":
        found = engines.go_on(tmp_path)
    else:
        launched(second, tmp_path, "go-on")
        found = torch.load(tmp_path / "found.pt")
    assert_same_run(steps_of(whole), steps_of(found))
