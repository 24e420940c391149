"""`--base`: every verb that reads a checkpoint finds a base that has moved."""

from __future__ import annotations

import dataclasses
import importlib
import shutil

import pytest

import sparsecraft as sc
from sparsecraft.cli.main import VERBS, main
from sparsecraft.cli.options import Based
from tests import tiny

# Verb -> what it needs beside a checkpoint's folder; OUT and ROWS are filled in.
READING = {
    "train": "--data ROWS --out OUT --steps 1 --max-length 64",
    "eval": "--data ROWS",
    "analyze": "--data ROWS --out OUT",
    "compare": "OUT --data ROWS --out OUT",
    "generate": "--prompt x --max-new-tokens 1",
    "chat": "",
    "inspect": "",
    "export": "--dry-run",
    "extend": "--expert OUT --data ROWS --old-data ROWS --out OUT",
    "remove": "--expert 0 --out OUT",
    "merge": "--out OUT",
    "calibrate": "--data ROWS --out OUT",
    "sweep": "--data ROWS --out OUT",
}


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> tuple[str, str]:
    """A checkpoint, and where its base is now."""
    home = tmp_path_factory.mktemp("moved")
    model = sc.hub.load_dense(tiny.save_dense(home / "base"))
    sc.convert(model, sc.recipes.molora(num_experts=2, rank=2))
    sc.save(model, home / "moe")
    return str(home / "moe"), str(shutil.move(home / "base", home / "elsewhere"))


def test_every_verb_that_reads_a_checkpoint_takes_a_base():
    for verb, (place, _) in VERBS.items():
        file, _, name = place.partition(":")
        command = getattr(importlib.import_module(f"sparsecraft.cli.{file}"), name)
        named = {field.name for field in dataclasses.fields(command)}
        if verb in READING:
            assert issubclass(command, Based) or (verb == "extend" and "base" in named)
        else:
            assert "folder" not in named or verb == "import", verb


@pytest.mark.parametrize("verb", READING)
def test_a_base_that_has_moved_is_found(moved, tmp_path, rows, fails, capsys, monkeypatch, verb):
    checkpoint, base = moved
    monkeypatch.setattr("builtins.input", lambda _: "")
    words = READING[verb].replace("ROWS", rows).replace("OUT", str(tmp_path / "out")).split()
    said = fails(verb, checkpoint, *words)
    assert said.endswith("If it has moved, load the checkpoint with --base.")
    main([verb, checkpoint, *words, "--base", base])
    assert "The base of" not in capsys.readouterr().err  # some are for other recipes


def test_a_dense_model_takes_no_base(moved, fails):
    assert "stands on no base; drop 'x'" in fails(
        "generate", moved[1], "--prompt", "x", "--base", "x"
    )
