"""Stages of which a later one puts in another router: run in one call, one by one, interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sparsecraft as sc
from sparsecraft.cli.main import main
from sparsecraft.errors import SparsecraftError
from sparsecraft.recipe.balancing import Bias, Capacity
from sparsecraft.training.progress import ProgressBar
from tests import tiny

FAST = {"steps": 4, "batch_size": 4, "max_length": 64, "progress": False}


class Interrupted(Exception):
    pass


def converted() -> torch.nn.Module:
    model = tiny.llama()
    sc.convert(model, sc.recipes.attentive(4, 2, dim=8, similarity_coef=0.1))
    return model


@pytest.fixture
def rows(tmp_path) -> str:
    return tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows())


def train(model, rows: str, out: Path, **options):
    return sc.train(model, rows, out, tokenizer=tiny.tokenizer(), **FAST | options)


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_two_stages_in_one_call_are_those_of_two_calls(tmp_path, rows):
    model = converted()
    report = train(model, rows, tmp_path / "both")
    assert list(report.moved) == ["experts", "gate"]
    assert report.moved["gate"] == {"should": 2, "moved": 2, "unmoved": {}}

    first = converted()
    train(first, rows, tmp_path / "experts", stages=("experts",))
    before = parameters(first)
    train(tmp_path / "experts", rows, tmp_path / "gate", stages=("gate",))
    second = sc.load(tmp_path / "gate")
    assert same(parameters(second), parameters(model))
    new = [name for name in parameters(second) if name not in before]
    assert new == [f"model.layers.{n}.mlp.router.scorer.weight" for n in (0, 1)]
    assert all(torch.equal(p, before[n]) for n, p in parameters(second).items() if n not in new)

    recipe = second.sparsecraft.recipe
    assert [stage.name for stage in recipe.stages] == ["gate"]
    history = [entry["stage"] for entry in second.sparsecraft.report["training"]]
    assert history == ["experts", "gate"]
    with pytest.raises(SparsecraftError, match="no stage 'experts'"):
        train(second, rows, tmp_path / "again", stages=("experts",))
    train(second, rows, tmp_path / "more")  # goes on with the router that it has
    assert not same(parameters(second), parameters(model))
    sc.export(second, "mixtral", tmp_path / "mixtral")


@pytest.mark.parametrize("stage", ["experts", "gate"])
def test_a_run_that_was_interrupted_in_either_stage_goes_on_exactly(
    tmp_path, rows, monkeypatch, stage
):
    """In the second one the model that resumes has the first one's routers."""
    whole = converted()
    train(whole, rows, tmp_path / "whole")

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.output_dir.endswith(stage):
            raise Interrupted

    model, options = converted(), {"save_every": 2}
    before = model.sparsecraft.recipe
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(ProgressBar, "on_step_end", interrupt)
        train(model, rows, tmp_path / "out", **options)
    assert model.sparsecraft.recipe is before and not model.sparsecraft.report.get("training")
    assert all(layer.router.spec.reads == "experts" for layer in model.sparsecraft.layers)
    resumed = converted()
    train(resumed, rows, tmp_path / "out", resume=True, **options)
    assert same(parameters(resumed), parameters(whole))
    assert resumed.sparsecraft.recipe == whole.sparsecraft.recipe


def test_the_new_routers_have_what_states_and_masks_they_ask_for(tmp_path, rows):
    """A bias that moves with steps, and a capacity, which asks the batch for its padding."""
    select = {"balance": Bias(rate=0.5), "capacity": Capacity(factor=0.5)}
    model = tiny.llama()
    changes = {f"stages.1.router.select.{name}": value for name, value in select.items()}
    sc.convert(model, sc.override(sc.recipes.attentive(4, 2, dim=8), changes))
    assert not model.sparsecraft.own_loss.step.layers
    train(model, rows, tmp_path / "out", steps=3)  # behind an even number it may be back at zero
    assert model.sparsecraft.own_loss.step.layers
    again = sc.load(tmp_path / "out")
    for found, loaded in zip(model.sparsecraft.layers, again.sparsecraft.layers, strict=True):
        assert found.batches is not None and found.router.balance.values_E.any()
        assert torch.equal(found.router.balance.values_E, loaded.router.balance.values_E)


def test_activation_checkpointing_and_micro_batches_train_both_stages(tmp_path, rows):
    model = converted()
    options = {"activation_checkpointing": True, "micro_batch": 2}
    assert train(model, rows, tmp_path / "out", **options).loss < 10
    log = model.sparsecraft.report["training"][0]["log"]
    assert any("sample_similarity_loss" in entry for entry in log)
    assert any("importance_loss" in entry for entry in log)


def test_all_of_it_from_a_command_line(tmp_path, rows, capsys):
    base, model = tiny.save_dense(tmp_path / "dense"), str(tmp_path / "model")
    flags = ["--num-experts", "3", "--top-k", "1", "--dim", "8", "--importance-coef", "0.4"]
    assert main(["convert", "attentive", "--model", base, "--out", model, *flags]) == 0
    assert "exact at start" in capsys.readouterr().out
    short = ["--data", rows, "--steps", "2", "--batch-size", "4", "--max-length", "64"]
    for stage, start in (("experts", model), ("gate", str(tmp_path / "experts"))):
        out = str(tmp_path / stage)
        assert main(["train", start, "--out", out, "--stages", stage, *short]) == 0
    assert main(["inspect", str(tmp_path / "gate")]) == 0
    text = capsys.readouterr().out
    assert "linear, top-1 renormalized" in text and "attentive" in text
    assert main(["export", str(tmp_path / "gate"), "--dry-run"]) == 0
    assert "mixtral: exact" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "experts"), "--dry-run"]) == 0
    assert "--stages gate" in capsys.readouterr().out
