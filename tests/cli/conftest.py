"""Small models, and the command line as a function: `run` succeeds, `fails` says one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

import sparsecraft as sc
from sparsecraft.cli.main import main
from tests import tiny

SMALL = ["--num-experts", "4", "--adapter-dim", "16", "--lora-rank", "4"]


@pytest.fixture(scope="session")
def dense(tmp_path_factory) -> str:
    return tiny.save_dense(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="session")
def converted(dense, tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("converted") / "camelid")
    assert main(["convert", "camelidae", "--model", dense, "--out", out, *SMALL]) == 0
    return out


@pytest.fixture(scope="session")
def routed(tmp_path_factory) -> Path:
    """A checkpoint of a split model whose routers pass for trained."""
    from tests.surgery.test_budget import RECIPES, made

    model = tiny.llama()
    sc.convert(model, RECIPES["d2dmoe"](), certify=False)
    out = tmp_path_factory.mktemp("routed") / "split"
    return sc.save(made(model), out, tokenizer=tiny.tokenizer())


@pytest.fixture
def rows(tmp_path) -> str:
    """A file of forty chats."""
    return tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows(40))


@pytest.fixture
def run(capsys):
    def run(*arguments: object) -> str:
        status = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return captured.out

    capsys.readouterr()
    return run


@pytest.fixture
def fails(capsys):
    def fails(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(a) for a in arguments]) == 1
        captured = capsys.readouterr()
        sentence = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(sentence) == 1 and "Traceback" not in captured.err
        return sentence[0]

    return fails
