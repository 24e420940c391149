"""The log of a training as series, figures and a page."""

from __future__ import annotations

import json

import pytest

import sparsecraft as sc
from sparsecraft.errors import CheckpointError
from sparsecraft.evaluation.trainings.page import drawings, layer_rows, stage_rows, write_page
from sparsecraft.evaluation.trainings.series import training_series
from sparsecraft.training.progress import ProgressBar
from tests import tiny

LAYER = "model.layers.{}.mlp"


def line(step: int, loss: float, *entropies: float, **more: float) -> dict:
    by_layer = {f"load_entropy/{LAYER.format(i)}": value for i, value in enumerate(entropies)}
    return {"step": step, "epoch": 1.0, "loss": loss} | by_layer | more


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of two stages, of which the first has no routing."""
    (tmp_path / "recipe.json").write_text("{}")
    runs = [
        {"stage": "warm", "log": [line(1, 3.0), line(4, 2.5), {"step": 4, "train_loss": 2.6}]},
        {
            "stage": "hard",
            "log": [
                line(1, 2.4, 0.5, 0.75, switch_loss=1.5),
                line(3, float("nan"), 1.0, 0.25, switch_loss=1.25),
            ],
        },
    ]
    (tmp_path / "report.json").write_text(json.dumps({"training": runs}))
    return tmp_path


def test_series_by_hand(folder):
    found = training_series(folder)
    assert found["stages"] == [
        {"stage": "warm", "begun": 0, "steps": 4},
        {"stage": "hard", "begun": 4, "steps": 3},
    ]
    assert found["steps"] == [1, 4, 5, 7] and not found["running"]
    assert found["series"] == {
        "loss": [3.0, 2.5, 2.4, None],
        "switch_loss": [None, None, 1.5, 1.25],
    }
    assert found["layers"]["load_entropy"][LAYER.format(1)] == [None, None, 0.75, 0.25]
    assert [row["last loss"] for row in stage_rows(found)] == [2.5, None]
    (first, second) = layer_rows(found)
    assert (first["load entropy, first"], first["load entropy, last"]) == (0.5, 1.0)
    assert second["layer"] == "1.mlp"


def test_figures_say_the_numbers(folder, tmp_path):
    found = training_series(folder)
    drawn = {drawing.name: drawing for drawing in drawings(found)}
    assert "From 3.000 to 2.400 nats over 7 steps" in drawn["loss"].says
    assert "switch loss 1.25" in drawn["loss"].says
    assert "load entropy 0.625 (0.25 to 1)" in drawn["routers"].says
    assert "1.mlp, at 0.250" in drawn["evenness"].says
    written = write_page(found, list(drawn.values()), tmp_path / "page", "A title <b>")
    page = (tmp_path / "page" / "report.html").read_text()
    assert page.count("<img ") == len(drawn) == 3 and "A title &lt;b&gt;" in page
    assert {"metrics.json", "loss.png"} <= set(written)


def test_a_model_without_routers(tmp_path):
    (tmp_path / "recipe.json").write_text("{}")
    runs = [{"stage": "train", "log": [line(1, 3.0), line(2, 2.0)]}]
    (tmp_path / "report.json").write_text(json.dumps({"training": runs}))
    found = training_series(tmp_path)
    drawn = drawings(found)
    assert [drawing.name for drawing in drawn] == ["loss"]
    write_page(found, drawn, tmp_path / "page", "T")
    assert "No router decided anything" in (tmp_path / "page" / "report.html").read_text()


def test_a_training_that_is_under_way(tmp_path, monkeypatch):
    model = tiny.llama()
    sc.convert(model, sc.recipes.upcycling(4, 2))
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows())
    out = tmp_path / "run"

    class Stop(Exception):
        pass

    options = {"steps": 12, "batch_size": 4, "log_every": 2, "save_every": 4, "progress": False}

    def at_nine(self, args, state, control, **kwargs):
        if state.global_step == 9:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(ProgressBar, "on_step_end", at_nine)
        sc.train(model, rows, out, tokenizer=tiny.tokenizer(), **options)
    found = training_series(out)
    assert found["running"] and found["steps"] == [1, 2, 4, 6, 8]
    assert set(found["layers"]) >= {"load_entropy", "dead_experts", "saturation"}
    monkeypatch.chdir(tmp_path)
    assert training_series("run") == found
    states = tmp_path / "run.training" / "0-train"
    (states / "checkpoint-9").mkdir()  # being written
    (states / "checkpoint-9" / "trainer_state.json").write_text("{")
    (states / "checkpoint-tmp").mkdir()
    assert training_series(out) == found


def test_a_log_without_a_finite_number(tmp_path):
    (tmp_path / "recipe.json").write_text("{}")
    nan = float("nan")
    runs = [{"stage": "train", "log": [line(1, nan, nan), line(2, nan, nan)]}]
    (tmp_path / "report.json").write_text(json.dumps({"training": runs}))
    found = training_series(tmp_path)
    drawn = drawings(found)
    assert [drawing.name for drawing in drawn] == ["loss"] and "nan" in drawn[0].says
    assert write_page(found, drawn, tmp_path / "page", "T")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "holds no log"),
        ({"recipe.json": "{}", "report.json": "{}"}, "holds no log"),
        ({"recipe.json": "{}", "report.json": "["}, "report.json"),
        ({"recipe.json": "{}"}, "report.json"),
        ({"recipe.json": "{}", "report.json": '{"training": [{"log": 3}]}'}, "cannot be read"),
    ],
)
def test_bad_input(files, says, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=says):
        training_series(tmp_path)
