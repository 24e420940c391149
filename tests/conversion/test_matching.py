"""Parameter matching: the baseline is the one of nearest size, and its count is the real one."""

from __future__ import annotations

import logging

import pytest
import torch

import sparsecraft as sc
from sparsecraft.cli.main import main
from sparsecraft.cli.recipe import read_recipe
from sparsecraft.conversion.matching import match, match_params, trainable
from sparsecraft.errors import RecipeError
from tests import tiny
from tests.cases import FAMILIES, RECIPES, E, dense


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_count_without_weights_is_that_of_the_conversion(family, recipe):
    model = dense(family)
    counted = trainable(RECIPES[recipe].make(), model)
    assert not hasattr(model, "sparsecraft")
    assert counted == sc.convert(model, RECIPES[recipe].make(), certify=False).cost.trainable


@pytest.mark.parametrize(
    ("family", "baseline"),
    [(family, name) for family in FAMILIES for name in ("camel", "adapter")]
    + [("llama", name) for name in ("lora", "molora", "hydralora", "mixlora", "camelidae")],
)
def test_no_other_size_is_nearer(family, baseline):
    function, target = getattr(sc.recipes, baseline), sc.recipes.camelidae(E, adapter_dim=48)
    model, arguments = (
        dense(family),
        {"lora_rank": 2} if baseline in ("adapter", "camelidae") else {},
    )
    found = match(function, target, model, **arguments)
    assert found.target == trainable(target, model) == pytest.approx(found.trainable / found.ratio)
    gaps = [
        abs(trainable(function(**arguments, **{found.parameter: size}), model) - found.target)
        for size in (max(1, found.size - 1), found.size, found.size + 1)
    ]
    assert gaps[1] == min(gaps)
    assert sc.convert(model, found.recipe, certify=False).cost.trainable == found.trainable


def test_a_recipe_matches_itself(caplog):
    model, target = dense("llama"), sc.recipes.camelidae(E, adapter_dim=24, lora_rank=3)
    with caplog.at_level(logging.INFO, "sparsecraft"):
        recipe = match_params(sc.recipes.camelidae, target, model, num_experts=E, lora_rank=3)
    assert recipe == target and "ratio 1.000" in caplog.text
    assert next(model.parameters()).device == torch.device("cpu")


def test_what_stage_one_trains_is_what_counts():
    model = dense("llama")
    frozen_routers = sc.override(sc.recipes.mov(E), {"stages.0.trains": ["experts"]})
    assert trainable(frozen_routers, model) < trainable(sc.recipes.mov(E), model)
    whole = sc.count(model).total
    assert trainable(sc.recipes.upcycling(num_experts=2), model) > whole
    nf4 = sc.recipes.camel(lora_rank=3, quantize="nf4")
    assert trainable(nf4, model) == trainable(sc.recipes.camel(lora_rank=3), model)


def test_the_smallest_size_may_still_be_too_large():
    found = match(sc.recipes.adapter, sc.recipes.ia3(), dense("llama"))
    assert found.size == 1 and found.ratio > 1.05
    assert "even the smallest adapter_dim is more than 1.05 times" in str(found)


def test_recipes_without_a_size_are_refused():
    for name in ("mov", "ia3", "upcycling"):
        with pytest.raises(RecipeError, match="has no size to be matched"):
            match_params(getattr(sc.recipes, name), sc.recipes.lora(), dense("llama"))
    with pytest.raises(RecipeError, match="both set the size of 'lora'"):
        match_params(sc.recipes.lora, sc.recipes.mov(), dense("llama"), rank=8)


def test_recipes_are_read_from_one_word():
    assert read_recipe("mov") == sc.recipes.mov()
    text = "molora:num_experts=5,rank=4,alpha=8,top_k=2,variant=released"
    wanted = sc.recipes.molora(5, 4, alpha=8.0, top_k=2, variant="released")
    assert read_recipe(text) == wanted
    assert read_recipe("hydralora:attention=true") == sc.recipes.hydralora(attention=True)
    for text, said in (("mvo", "'mov'"), ("mov:rank=2", "Known: noise"), ("mov:noise", "'noise'")):
        with pytest.raises(RecipeError, match=said):
            read_recipe(text)


def test_the_command_prints_both_counts_and_their_ratio(capsys, tmp_path):
    base = tiny.save_dense(tmp_path / "dense")

    def run(recipe: str, *options: str) -> tuple[int, str]:
        where = ["--model", base, "--out", str(tmp_path / "out"), "--overwrite"]
        status = main(["convert", recipe, *where, *options])
        captured = capsys.readouterr()
        return status, captured.err if status else captured.out

    target = "molora:num_experts=5,rank=4"
    status, text = run("lora", "--match-params", target, "--alpha", "8")
    assert status == 0, text
    recipe, cost = (
        sc.load(tmp_path / "out").sparsecraft.recipe,
        sc.count(sc.load(tmp_path / "out")),
    )
    wanted = trainable(read_recipe(target), base)
    assert f"trains {cost.trainable:,} parameters, the target {wanted:,}: ratio" in text
    assert recipe.edits[0].experts.rank > 20 and recipe.edits[0].experts.alpha == 8
    assert abs(cost.trainable / wanted - 1) < 0.05
    assert (
        run("adapter", "--match-params", "camelidae:adapter_dim=8,lora_rank=0", "--lora-rank", "0")[
            0
        ]
        == 0
    )
    assert "has no size" in run("mov", "--match-params", "ia3")[1]
    assert "both set the size" in run("lora", "--match-params", "mov", "--rank", "8")[1]
    assert "Did you mean 'molora'" in run("lora", "--match-params", "moloraa")[1]
