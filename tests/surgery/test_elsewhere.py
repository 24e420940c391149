"""What moves outside of sc.train is in the report of the folder, and in what `inspect` says."""

from __future__ import annotations

import pytest
import torch

import sparsecraft as sc
from sparsecraft.checkpoint.jsonfile import read_json
from sparsecraft.cli.main import main
from sparsecraft.evaluation.report import describe
from tests import tiny
from tests.training.test_train import FAST, recipe


@pytest.fixture
def model(tmp_path):
    found = sc.hub.load_dense(tiny.save_dense(tmp_path / "base"))
    sc.convert(found, recipe())
    return found


def loop(model, steps: int = 2) -> None:
    """A user's own training."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    for _ in range(steps):
        ids = torch.randint(3, 90, (2, 12))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def last_lines(folder) -> str:
    return "\n".join(describe(folder))


def test_a_loop_of_the_users_is_told(model, tmp_path, capsys):
    sc.save(model, tmp_path / "start")
    assert "Not trained yet." in last_lines(tmp_path / "start")
    assert "elsewhere" not in read_json(tmp_path / "start" / "report.json")
    loop(model)
    sc.save(model, tmp_path / "out")
    found = read_json(tmp_path / "out" / "report.json")["elsewhere"]
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    assert 0.8 * trained <= found["moved"] <= trained and found["since"] == "the conversion"
    assert main(["inspect", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "have moved since the conversion, in a loop" in said and "Not trained yet" not in said


def test_what_is_loaded_is_taken_as_it_is(model, tmp_path):
    loop(model)
    sc.save(model, tmp_path / "out")
    loaded = sc.load(tmp_path / "out")
    sc.save(loaded, tmp_path / "again")
    found = [read_json(tmp_path / name / "report.json")["elsewhere"] for name in ("out", "again")]
    assert found[0] == found[1]
    loop(loaded)
    loaded.save_pretrained(tmp_path / "third")
    assert "moved since it was loaded" in last_lines(tmp_path / "third")


def test_before_and_after_a_training_of_ours(model, tmp_path):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows())
    options = {"tokenizer": tiny.tokenizer(), "overwrite": True, **FAST}
    sc.train(model, rows, tmp_path / "out", **options)
    assert "Not by sc.train" not in last_lines(tmp_path / "out")
    loop(model)
    sc.save(model, tmp_path / "then")
    said = last_lines(tmp_path / "then")
    assert said.index("Trained (") < said.index("moved since the last change above")
    other = sc.load(tmp_path / "out")
    loop(other)
    sc.train(other, rows, tmp_path / "two", **options)
    said = last_lines(tmp_path / "two")
    assert said.index("Trained (") < said.index("moved since it was loaded") < said.rindex("Traine")


def test_casts_new_rows_and_are_no_training(model, tmp_path):
    model.resize_token_embeddings(330)
    sc.save(model, tmp_path / "resized")
    sc.save(model.bfloat16(), tmp_path / "cast")
    for name in ("cast", "resized"):
        assert "Not trained yet." in last_lines(tmp_path / name)
