"""The command line, run as a user runs it: results on standard output, errors in one sentence."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import sparsecraft as sc
from sparsecraft.cli.main import VERBS, main
from tests import tiny

ROOT = Path(__file__).parents[2]


def test_train_says_what_the_recipe_left_out(run, tmp_path, rows):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=len(tiny.tokenizer()), hidden_size=32, intermediate_size=32, pad_token_id=0,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    sizes = ("--num-experts", "2", "--rank", "2")
    start, out = tmp_path / "start", tmp_path / "out"
    text = run("convert", "molora", "--model", tmp_path / "base", *sizes, "--out", start)
    (left,) = [line for line in text.splitlines() if line.startswith("Left out, ")]
    options = ("--steps", "1", "--batch-size", "4", "--max-length", "64", "--no-progress")
    assert left in run("train", start, "--data", rows, "--out", out, *options).splitlines()


def test_train_evaluate_inspect_generate(run, converted, tmp_path, rows):
    out = tmp_path / "sft"
    text = run(
        "train", converted, "--data", rows, rows, "--weights", "2", "1", "--out", out,
        "--steps", "6", "--batch-size", "4", "--max-length", "64", "--learning-rate", "1e-2",
        "--no-progress",
    )  # fmt: skip
    assert text.startswith("6 steps, mean loss") and f"Saved and read back: {out}" in text
    assert re.search(r"in \d+ of \d+ layers, an error of \d", text)  # and its power
    text = run("eval", out, "--data", rows, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert f"{found['loss'][rows]['loss']:.4f}" in text and "load_entropy" in text
    text = run("inspect", out)
    cost = sc.count(sc.load(out))
    for name in ("total", "new", "trainable", "active"):
        assert f"{getattr(cost, name):,}" in text
    assert "claimed exact" in text and "6 steps" in text and "load entropy" in text
    answer = run("generate", out, "--prompt", "say red", "--max-new-tokens", "5")
    streamed = run("generate", out, "--prompt", "say red", "--max-new-tokens", "5", "--stream")
    assert answer.strip() == streamed.strip()


def test_bad_input_is_one_sentence_and_writes_nothing(fails, dense, converted, tmp_path, rows):
    out = tmp_path / "out"
    base = ("--model", dense, "--out", out)
    assert "Did you mean 'camelidae'" in fails("convert", "camelida", *base)
    assert "one of adapter" in fails("convert", *base)
    assert "--top-k is 9 with --num-experts 8" in fails(
        "convert", "camelidae", *base, "--top-k", "9"
    )
    said = fails("convert", "camelidae", *base, "--set", "router.temprature=1")
    assert "temperature" in said
    assert "no '='" in fails("convert", "camelidae", *base, "--set", "router.temperature")
    assert "mlp" in fails("convert", "camelidae", *base, "--paths", "model.layer.*.mlp")
    assert "matches none" in fails("convert", "camelidae", *base, "--paths", "nowhere")
    missing = tmp_path / "missing"
    assert "missing" in fails("convert", "camelidae", "--model", missing, "--out", out)
    said = fails("convert", "camelidae", "--model", dense, "--out", converted)
    assert "exists already" in said
    said = fails("train", dense, "--data", rows, "--out", out)
    assert "no sparsecraft checkpoint" in said
    assert "no.jsonl" in fails("train", converted, "--data", tmp_path / "no.jsonl", "--out", out)
    assert "nothing to evaluate" in fails("eval", converted)
    assert "Did you mean 'train'" in fails("trian")
    assert not out.exists()


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_help_lists_the_verbs(run, argv):
    text = run(*argv)
    assert text.startswith("usage: sparsecraft VERB")
    for verb, (_, about) in VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(about)}$", text, re.MULTILINE)


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "sparsecraft", "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == sc.__version__


def readme_commands() -> list[list[str]]:
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.partition("#")[0] for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("sparsecraft ")]


def test_the_readme_shows_commands():
    assert {command[0] for command in readme_commands()} >= {"convert", "train", "eval", "generate"}


@pytest.mark.parametrize("command", readme_commands(), ids=" ".join)
def test_readme_commands_parse(command, capsys):
    verb, *arguments = command
    assert verb in VERBS
    help_of = [verb, arguments[0], "--help"] if verb == "convert" else [verb, "--help"]
    try:
        main(help_of)
    except SystemExit as ended:
        assert ended.code == 0
    text = capsys.readouterr().out
    for word in arguments:
        if word.startswith("--"):
            assert word in text, f"sparsecraft {verb} has no option {word}"
