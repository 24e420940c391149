"""Loads and balance losses of every kind of routing: counts of slots, or of weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import sparsecraft as sc
from sparsecraft.evaluation.routing import first_choices_E
from sparsecraft.moe.losses import LOSSES, switch_balance, switch_balance_unnormalized
from sparsecraft.moe.routers.selectors import soft, top_k
from sparsecraft.moe.routing import Routing
from tests import cases, tiny

BALANCES = ("switch", "switch_unnormalized", "btx")


def softly(logits_TE: torch.Tensor) -> Routing:
    return Routing(*soft(logits_TE), logits_TE, sums_to_one=True, in_order=True, soft=True)


def routing_of(model, **inputs) -> Routing:
    """What the first routed layer decides."""
    with sc.trace(model) as routing:
        model(**inputs)
    return next(iter(routing.values()))


def test_the_load_of_a_soft_routing_is_its_weights_share():
    logits_TE = torch.tensor([[4.0, 0, 0], [4, 0, 0], [0, 4, 0], [0, 0, 9]])
    mask_T = torch.tensor([True, True, True, False])
    routing = softly(logits_TE)
    assert torch.allclose(routing.load_E(), logits_TE.softmax(-1).mean(0))
    assert torch.allclose(routing.load_E(mask_T), logits_TE[:3].softmax(-1).mean(0))
    assert first_choices_E(routing, mask_T).tolist() == [2, 1, 0]


ALL_EXPERTS = {
    "soft": lambda: sc.recipes.molora(4),
    "slots": lambda: sc.recipes.smola(4, mixing="slots"),
    "all of top-k": lambda: sc.recipes.camelidae(4, top_k=4, adapter_dim=8, lora_rank=0),
}


@pytest.mark.parametrize("recipe", ALL_EXPERTS.values(), ids=ALL_EXPERTS)
def test_models_that_use_all_experts_have_loads_that_move(recipe):
    model, ids = tiny.llama(), torch.arange(3, 33).reshape(2, 15)
    sc.convert(model, recipe(), certify=False)
    cases.randomize_new(model)
    routing = routing_of(model, input_ids=ids)
    wanted_E = routing.weights_TE().mean(0)
    assert torch.allclose(routing.load_E(), wanted_E, atol=1e-6)
    assert routing.load_E().sum() == pytest.approx(1) and (wanted_E - 0.25).abs().max() > 1e-3


@pytest.mark.parametrize("name", BALANCES)
def test_balance_of_a_soft_routing_is_one_plus_the_squared_variation_of_importance(name):
    logits_TE = torch.randn(40, 5)
    importance_E = logits_TE.softmax(-1).mean(0)
    variation = (importance_E.std(correction=0) / importance_E.mean()).item()
    per_token = 5 if name == "switch_unnormalized" else 1  # all five experts are a token's slots
    found = LOSSES[name](softly(logits_TE), None).item()
    assert found == pytest.approx(per_token * (1 + variation**2), rel=1e-5)
    collapsed_TE = torch.tensor([[50.0, 0, 0, 0, 0]]).repeat(8, 1)
    assert LOSSES[name](softly(collapsed_TE), None).item() == pytest.approx(5 * per_token)
    even = LOSSES[name](softly(torch.zeros(8, 5)), None).item()
    assert even == pytest.approx(per_token)


@pytest.mark.parametrize("name", BALANCES)
def test_balance_of_a_soft_routing_pushes_it_apart(name):
    logits_TE = torch.zeros(16, 4)
    logits_TE[:, 0] = 1.0
    logits_TE.requires_grad_()
    LOSSES[name](softly(logits_TE), None).backward()
    assert (logits_TE.grad[:, 0] > 0).all() and (logits_TE.grad[:, 1:] < 0).all()


def test_dropped_tokens_are_no_load_and_keep_balance_at_one():
    """Of capacity or a threshold: index E. Even load is one, however many slots are filled."""
    logits_TE = torch.eye(4).repeat(2, 1) * 20
    weights_TK, indices_TK = top_k(logits_TE, 2, renormalize=True)
    indices_TK[:, 1] = 4
    indices_TK[4:, 0] = 4  # the second four tokens have no expert at all
    routing = Routing(weights_TK, indices_TK, logits_TE)
    assert routing.load_E().tolist() == [0.25] * 4
    assert switch_balance(routing).item() == pytest.approx(1, abs=1e-5)
    assert switch_balance_unnormalized(routing).item() == pytest.approx(0.5, abs=1e-5)
    none = Routing(weights_TK, torch.full_like(indices_TK, 4), logits_TE)
    assert none.load_E().tolist() == [0] * 4 and switch_balance(none) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_no_token_at_all_is_no_loss(name):
    logits_TE = torch.randn(6, 4, requires_grad=True)
    pre_TF = torch.randn(6, 8, requires_grad=True)
    routing = Routing(*top_k(logits_TE, 2, renormalize=True), logits_TE, pre_TF=pre_TF, k=2)
    routing = replace(routing, inputs_TD=torch.randn(6, 3))
    if name == "pesc_released":
        pytest.skip("masks nothing, as its code")
    loss = LOSSES[name](routing, torch.zeros(6, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    for leaf in (logits_TE, pre_TF):
        assert leaf.grad is None or not leaf.grad.any()


@pytest.mark.parametrize("name", LOSSES)
def test_tokens_of_another_modality_do_not_count(name):
    if name == "pesc_released":
        pytest.skip("masks nothing, as its code")
    logits_TE, pre_TF = torch.randn(12, 4), torch.randn(12, 8)
    acts_T = torch.arange(12) % 3 == 0
    inputs_TD = torch.randn(12, 3)
    whole = Routing(*top_k(logits_TE, 2, renormalize=True), logits_TE, pre_TF=pre_TF, k=2)
    whole = replace(whole, inputs_TD=inputs_TD)
    kept_TE = logits_TE[acts_T]
    part = Routing(*top_k(kept_TE, 2, renormalize=True), kept_TE, pre_TF=pre_TF[acts_T], k=2)
    part = replace(part, inputs_TD=inputs_TD[acts_T])
    found = whole.only(acts_T.reshape(3, 4))
    assert LOSSES[name](found, None).item() == pytest.approx(LOSSES[name](part, None).item())
    assert torch.allclose(found.load_E(), part.load_E())
    assert torch.equal(first_choices_E(found), first_choices_E(part))
    real_T = torch.arange(12) < 7
    assert found.counted(real_T).tolist() == (acts_T & real_T).tolist()


def test_loads_of_gates_are_of_what_runs_and_in_soft_stages_of_scores():
    model, ids = tiny.llama(), torch.arange(3, 33).reshape(2, 15)
    sc.convert(model, sc.recipes.lte(num_experts=4), certify=False)
    layer = model.sparsecraft.layers[0]
    cases.randomize_new(model)
    layer.router.runs = "soft"
    routing = routing_of(model, input_ids=ids)
    scores_TE = routing.weights_TE()
    assert torch.allclose(routing.load_E(), scores_TE.sum(0) / scores_TE.sum())
    layer.router.runs = "every"
    assert routing_of(model, input_ids=ids).load_E().tolist() == [0.25] * 4


def test_evaluation_counts_no_padding_in_a_decoder():
    model = cases.dense("t5")
    sc.convert(model, sc.recipes.camelidae(4, adapter_dim=8, lora_rank=0), certify=False)
    cases.randomize_new(model)
    ids, labels = torch.arange(3, 27).reshape(2, 12), torch.arange(5, 15).reshape(2, 5)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    pad = torch.nn.functional.pad
    padded = {
        "input_ids": pad(ids, (0, 4)),
        "attention_mask": pad(batch["attention_mask"], (0, 4)),
        "labels": pad(labels, (0, 9), value=-100),
    }
    short, long = (sc.evaluate(model, [dict(b)])["routing"] for b in (batch, padded))
    assert long == pytest.approx(short, rel=1e-5)


def test_a_training_logs_the_load_of_a_soft_recipe(tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows(8))
    model = tiny.llama()
    sc.convert(model, sc.recipes.molora(4), certify=False)
    for name, parameter in model.named_parameters():
        if ".router." in name:
            torch.nn.init.normal_(parameter, std=1.0)
    options = {"steps": 1, "batch_size": 4, "max_length": 64, "progress": False}
    sc.train(model, path, tmp_path / "out", tokenizer=tiny.tokenizer(), **options)
    entry = model.sparsecraft.report["training"][0]["log"][0]
    loads = [value for key, value in entry.items() if key.startswith("max_load/")]
    assert loads and max(loads) > 1.1
    assert 0 < entry["load_entropy"] < 0.999
