"""Router saturation in the log: what of the routers' choices stays."""

from __future__ import annotations

import pytest
import torch

import sparsecraft as sc
from sparsecraft.moe.routing import Routing
from sparsecraft.training import saturation
from sparsecraft.training.saturation import Saturation
from tests import tiny
from tests.training.test_train import FAST, converted, interrupted, parameters


@pytest.fixture
def rows(tmp_path) -> str:
    return tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows())


def logged(model) -> list[dict]:
    return [line for line in model.sparsecraft.report["training"][0]["log"] if "loss" in line]


def looked(model) -> dict[int, dict[str, float]]:
    """Step -> what was found there."""
    lines = {line["step"]: line for line in logged(model)}
    found = {
        step: {key: value for key, value in line.items() if key.startswith("saturation")}
        for step, line in lines.items()
    }
    return {step: values for step, values in found.items() if values}


def test_shares_by_hand():
    indices_TK = torch.tensor([[0, 1], [2, 3], [1, 0]])
    before = Routing(torch.full((3, 2), 0.5), indices_TK, torch.zeros(3, 4))
    now = Routing(torch.full((3, 2), 0.5), torch.tensor([[1, 2], [3, 2], [4, 0]]), before.logits_TE)
    kept = saturation._shared(saturation._chosen(before, None), saturation._chosen(now, None))
    assert kept == pytest.approx((1 + 2 + 1) / 6)
    mask_T = torch.tensor([False, True, True])
    chosen = [saturation._chosen(routing, mask_T) for routing in (before, now)]
    assert saturation._shared(*chosen) == pytest.approx(3 / 4)
    soft_TE = torch.tensor([[0.1, 0.6, 0.2, 0.1]])
    experts_TE = torch.arange(4)[None]
    soft = Routing(soft_TE, experts_TE, soft_TE.log(), in_order=True, soft=True)
    assert saturation._chosen(soft, None).tolist() == [[False, True, False, False]]
    even_TE = torch.full((1, 4), 0.25)
    tied = Routing(even_TE, experts_TE, even_TE.log(), in_order=True, soft=True)
    assert saturation._chosen(tied, None).sum() == 1


def test_it_is_looked_every_ten_steps_and_at_the_end_and_changes_nothing(
    tmp_path, rows, monkeypatch
):
    options = FAST | {"steps": 24, "tokenizer": tiny.tokenizer()}
    model = converted()
    sc.train(model, rows, tmp_path / "one", **options)
    found = looked(model)
    assert list(found) == [12, 24]  # of lines at 1, 3, 6, ...
    for values in found.values():
        own = [value for key, value in values.items() if key != "saturation"]
        assert len(own) == 2 and all(0 <= value <= 1 for value in own)
        assert values["saturation"] == pytest.approx(sum(own) / 2)
    monkeypatch.setattr(Saturation, "_choices", lambda self: {})
    other = converted()
    sc.train(other, rows, tmp_path / "other", **options)
    assert not looked(other)
    for name, value in parameters(model).items():
        assert torch.equal(value, other.get_parameter(name)), name
    assert [line["loss"] for line in logged(model)] == [line["loss"] for line in logged(other)]


def test_routers_that_do_not_learn_stay(tmp_path, rows):
    model = converted()
    for layer in model.sparsecraft.layers:
        if layer.router is not None:
            layer.router.scorer.weight.data.zero_()
            layer.router.scorer.weight.data[:, 0] = torch.arange(4.0)
    still = {"learning_rate": 1e-12}
    sc.train(model, rows, tmp_path / "out", tokenizer=tiny.tokenizer(), **FAST | still)
    assert looked(model)[12]["saturation"] == 1


def test_a_run_that_is_resumed_looks_as_it_would_have(tmp_path, rows, monkeypatch):
    options = interrupted(tmp_path, rows, monkeypatch)
    whole = converted()
    sc.train(whole, rows, tmp_path / "whole", tokenizer=tiny.tokenizer(), **options)
    resumed = converted()
    sc.train(resumed, rows, tmp_path / "out", tokenizer=tiny.tokenizer(), resume=True, **options)
    assert looked(resumed) == looked(whole) and len(looked(whole)) > 1


@pytest.mark.parametrize("recipe", ["camel", "mov", "lte", "upcycling", "moepp"])
def test_of_every_kind_of_router(recipe, tmp_path, rows):
    model = tiny.llama()
    experts = {"lte": (4,), "upcycling": (4, 4), "moepp": (4, 2)}.get(recipe, ())
    made = getattr(sc.recipes, recipe)(*experts)
    sc.convert(model, made)
    sc.train(model, rows, tmp_path / "out", tokenizer=tiny.tokenizer(), **FAST)
    runs = model.sparsecraft.report["training"]
    found = [line["saturation"] for run in runs for line in run["log"] if "saturation" in line]
    assert bool(found) == (recipe != "camel")
    assert all(0 <= value <= 1 for value in found)


def test_where_memory_runs_out_nothing_is_said_and_training_goes_on(
    tmp_path, rows, monkeypatch, caplog
):
    look, calls = Saturation._rows, []

    def short_of_memory(self):
        calls.append(self)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return look(self)

    monkeypatch.setattr(Saturation, "_rows", short_of_memory)
    model = converted()
    sc.train(model, rows, tmp_path / "out", tokenizer=tiny.tokenizer(), **FAST)
    assert len(calls) == 2 and not looked(model) and len(logged(model)) > 3
    assert "memory ran out" in caplog.text
