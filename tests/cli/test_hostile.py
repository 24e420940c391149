"""On the command line: seeds, trackers and links that go round in a circle are one sentence."""

from __future__ import annotations

import pytest

from sparsecraft.cli.main import main
from tests import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    base = tiny.save_dense(root / "base")
    method = ["molora", "--num-experts", "2", "--rank", "2", "--no-certify"]
    assert main(["convert", *method, "--model", base, "--out", str(root / "moe")]) == 0
    return root, tiny.write_rows(root / "chat.jsonl", tiny.chat_rows())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--seed", "99999999999"], "--seed is 99999999999"),
        (["--trackers", "nope"], "'nope', which transformers does not know"),
        (["--trackers", "wandbb"], "Did you mean 'wandb'"),
        (["--trackers", "swanlab"], "'swanlab', whose package is not installed"),
    ],
)
def test_training_by_what_is_not_there(made, tmp_path, capsys, asked, said):
    root, data = made
    words = ["train", str(root / "moe"), "--data", data, "--out", str(tmp_path / "out")]
    assert main([*words, "--steps", "1", *asked]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["convert", "train", "merge", "export"])
def test_a_link_that_goes_round_in_a_circle(made, tmp_path, capsys, verb):
    root, data = made
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    words = {
        "convert": ["lora", "--model", str(root / "base")],
        "train": [str(root / "moe"), "--data", data],
        "merge": [str(root / "moe")],
        "export": [str(root / "moe"), "--to", "peft"],
    }
    assert main([verb, *words[verb], "--out", str(tmp_path / "loop")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "loop" in error and error.count("\n") == 1


def test_a_seed_that_no_generator_takes(made, capsys):
    root, _ = made
    assert main(["generate", str(root / "moe"), "--prompt", "hi", "--seed", "99999999999"]) == 1
    assert "--seed is 99999999999" in capsys.readouterr().err
