"""A folder of ours that anyone may change is read with a warning once somebody has."""

from __future__ import annotations

import logging

import pytest

from sparsecraft.cli.main import main
from tests import tiny


@pytest.fixture
def made(tmp_path):
    base = str(tiny.save_dense(tmp_path / "base"))
    convert = ["convert", "upcycling", "--num-experts", "2", "--model", base]
    assert main([*convert, "--out", str(tmp_path / "up")]) == 0
    assert main(["convert", "lora", "--model", base, "--out", str(tmp_path / "lora")]) == 0
    export = ["export", str(tmp_path / "up"), "--to", "mixtral", "--out", str(tmp_path / "export")]
    assert main(export) == 0
    assert main(["merge", str(tmp_path / "lora"), "--out", str(tmp_path / "merge")]) == 0
    return tmp_path


@pytest.mark.parametrize("kind", ["export", "merge"])
def test_a_flipped_bit_is_said(made, kind, caplog, capsys):
    folder = made / kind
    reads = [
        ["generate", str(folder), "--prompt", "say red", "--max-new-tokens", "2"],
        ["convert", "lora", "--model", str(folder), "--out", str(made / "again"), "--overwrite"],
    ]
    for argv in reads:
        with caplog.at_level(logging.WARNING, logger="sparsecraft"):
            assert main(argv) == 0
        assert "model.safetensors" not in caplog.text
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    for argv in reads:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="sparsecraft"):
            assert main(argv) == 0
        assert "model.safetensors has changed" in caplog.text and "accept-edits" in caplog.text
    capsys.readouterr()
    assert main(["inspect", str(folder), "--accept-edits"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    caplog.clear()
    assert main(reads[0]) == 0
    assert "has changed" not in caplog.text
