"""Routers that a stage puts in the place of others: what changes, what stays, and the way back."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import sparsecraft as sc
from sparsecraft.errors import RecipeError, SurgeryError
from sparsecraft.recipe import Linear, Normal, Residual, RouterSpec, Sequence, Soft, TopK
from sparsecraft.recipe.formats import from_json, to_json
from sparsecraft.recipe.stages import Stage
from sparsecraft.surgery.exchange import exchange_routers
from sparsecraft.training.staging import staged
from tests.cases import RECIPES, K, batch, dense, logits, randomize_new

FIVE = pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "t5", "bert", "phi3"])


def converted(family: str = "llama") -> torch.nn.Module:
    model = dense(family)
    sc.convert(model, RECIPES["attentive"].make())
    randomize_new(model)
    return model


def test_a_recipe_whose_routers_change_is_written_and_read():
    recipe = RECIPES["attentive"].make()
    assert from_json(to_json(recipe)) == recipe
    changed = sc.override(recipe, {"stages.1.router.select.k": 3, "stages.1.router.temperature": 2})
    assert changed.stages[1].router.select == TopK(3) and changed.edits == recipe.edits
    after = changed.with_router_of(changed.stages[1])
    assert after.edits[0].router == changed.stages[1].router
    assert [s.name for s in after.stages] == ["gate"] and after.stages[0].router is None
    assert from_json(to_json(after)) == after


def test_the_claim_of_an_exact_start_goes_with_weights_that_sum_to_one():
    parted = sc.recipes.attentive(4)
    assert parted.exact_at_start
    after = parted.with_router_of(parted.stages[1])
    assert not after.exact_at_start, "copies that are parted are the dense network in their mean"
    assert not sc.convert(dense("llama"), after).certificate.exact
    alike = sc.recipes.attentive(4, pairs=None)
    assert alike.with_router_of(alike.stages[1]).exact_at_start
    raw = sc.override(alike, {"stages.1.router.select.renormalize": False})
    assert not raw.with_router_of(raw.stages[1]).exact_at_start


@FIVE
def test_experts_stay_and_routers_are_new_and_alone_train(family, tmp_path):
    model = converted(family)
    record = model.sparsecraft
    experts = {n: p.clone() for n, p in model.named_parameters() if ".router." not in n}
    exchange_routers(model, record.recipe.stages[1], seed=3)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in experts.items())
    trained = {name for name, p in now.items() if p.requires_grad}
    assert trained == {n for n in now if n.endswith("router.scorer.weight")} == now.keys() - experts
    assert all(layer.router.spec.select == TopK(K) for layer in record.layers)
    found = logits(model, batch(family))
    sc.save(model, tmp_path / "out", overwrite=True)
    again = sc.load(tmp_path / "out")
    assert torch.equal(logits(again, batch(family)), found)
    assert again.sparsecraft.recipe == record.recipe
    sc.revert(model)
    assert torch.equal(logits(model, batch(family)), logits(dense(family), batch(family)))


def test_the_seed_alone_decides_and_random_numbers_are_left_alone():
    rows, state = [], torch.get_rng_state()
    for seed in (0, 0, 1):
        model = converted()
        state = torch.get_rng_state()
        exchange_routers(model, model.sparsecraft.recipe.stages[1], seed)
        assert torch.equal(torch.get_rng_state(), state)
        rows.append([layer.router.scorer.weight for layer in model.sparsecraft.layers])
    assert all(torch.equal(a, b) for a, b in zip(rows[0], rows[1], strict=True))
    assert not torch.equal(rows[0][0], rows[2][0]) and not torch.equal(rows[0][0], rows[0][1])


def test_afterwards_it_is_an_upcycled_model(tmp_path):
    model = converted()
    exchange_routers(model, model.sparsecraft.recipe.stages[1])
    other = dense("llama")
    twin = sc.override(RECIPES["upcycling"].make(), {"edits.0.experts.differ.pairs": 4})
    sc.convert(other, twin, certify=False)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, batch("llama")), logits(model, batch("llama")))
    assert sc.count(model).active == sc.count(other).active < sc.count(model).total
    sc.extend(model, dense("llama"), rows="reset", unrelated=True)
    assert model.sparsecraft.recipe.edits[0].experts.num_experts == 5


def test_a_stage_that_fails_gives_the_routers_back():
    model = converted()
    record, before = model.sparsecraft, logits(model, batch("llama"))
    recipe, routers = record.recipe, [layer.router for layer in record.layers]
    with pytest.raises(KeyboardInterrupt), staged(model, recipe.stages[1]):
        assert logits(model, batch("llama")).ne(before).any()
        raise KeyboardInterrupt
    assert record.recipe is recipe
    assert [layer.router for layer in record.layers] == routers
    assert [item.source for item in record.plan] == [recipe.edits[0]] * 2
    assert torch.equal(logits(model, batch("llama")), before)
    again = copy.deepcopy(recipe)
    with staged(model, again.stages[1]):
        pass
    assert record.recipe == recipe.with_router_of(recipe.stages[1])


def test_what_cannot_be_exchanged_is_refused():
    model = converted()
    with pytest.raises(RecipeError, match="'experts' puts in no router"):
        exchange_routers(model, model.sparsecraft.recipe.stages[0])
    with pytest.raises(SurgeryError, match="dense"):
        exchange_routers(dense("llama"), RECIPES["attentive"].make().stages[1])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Stage(router=RouterSpec(decides=Sequence(), select=Soft())), "by 'sequence'"),
        (lambda: Stage(router=RouterSpec(reads="output")), "reads 'output'"),
        (lambda: Stage(router=RouterSpec(scorer=Residual())), "has a 'residual' scorer"),
        (
            lambda: sc.override(RECIPES["lora"].make(), {"stages.0.router": "router"}),
            "no edit has one",
        ),
        (
            lambda: sc.override(RECIPES["moefication"].make(), {"stages.0.router": "router"}),
            "router",
        ),
        (
            lambda: sc.override(RECIPES["attentive"].make(), {"stages.1.router.select.k": 9}),
            "top_k is 9 with num_experts=4",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, words):
    with pytest.raises(RecipeError, match=words):
        make()


@pytest.mark.parametrize("name", ["molora", "moepp", "camelidae", "upcycling"])
def test_any_recipe_of_whole_experts_may_exchange_its_routers(name, tmp_path):
    """Also one whose routers go on from each other."""
    recipe = RECIPES[name].make()
    to = RouterSpec(scorer=Linear(start=Normal(0.02)), select=TopK(1))
    later = Stage(name="sparse", trains=("router",), router=to)
    model = dense("llama")
    sc.convert(model, dataclasses.replace(recipe, stages=(*recipe.stages, later)))
    randomize_new(model)
    exchange_routers(model, later)
    with sc.trace(model) as routing:
        found = logits(model, batch("llama"))
    assert {r.indices_TK.shape[1] for r in routing.values()} == {1}
    sc.save(model, tmp_path / "out", overwrite=True)
    assert torch.equal(logits(sc.load(tmp_path / "out"), batch("llama")), found)


def test_numbers_of_experts_by_layer_stay_and_those_of_the_old_routers_go(tmp_path):
    recipe = sc.recipes.attentive([2, 4], 2, dim=[4, 8])
    model = dense("llama")
    sc.convert(model, recipe)
    assert [len(layer.router.scorer.key) for layer in model.sparsecraft.layers] == [4, 8]
    exchange_routers(model, recipe.stages[1])
    rows = [len(layer.router.scorer.weight) for layer in model.sparsecraft.layers]
    assert rows == [2, 4]
    found = logits(model, batch("llama"))
    sc.save(model, tmp_path / "out", overwrite=True)
    assert torch.equal(logits(sc.load(tmp_path / "out"), batch("llama")), found)
