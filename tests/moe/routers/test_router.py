"""Scorers, selectors and the trace. T tokens, K slots, E experts, D width."""

from __future__ import annotations

import pytest
import torch

import sparsecraft as sc
from sparsecraft.moe.routers.build import build_router
from sparsecraft.moe.routers.selectors import Sample, soft, top_k
from sparsecraft.moe.routing import Routing
from sparsecraft.moe.traces import records_of
from sparsecraft.recipe.routers import RouterSpec
from sparsecraft.recipe.scorers import KaimingUniform, Linear, Normal, Uniform, Zeros
from sparsecraft.recipe.selections import TopK
from tests.cases import RECIPES, RUNNING, batch, dense

T, E, D = 20, 6, 16


def router_of(**spec):
    return build_router(RouterSpec(**spec), D, E)


@pytest.mark.parametrize("k", range(1, E + 1))
def test_top_k_then_softmax_is_softmax_then_top_k_renormalized(k):
    logits_TE = 3 * torch.randn(T, E)
    weights_TK, indices_TK = top_k(logits_TE, k, renormalize=True)
    kept_TK, indices2_TK = logits_TE.softmax(-1).topk(k)
    assert torch.equal(indices_TK, indices2_TK)
    assert torch.allclose(weights_TK, kept_TK / kept_TK.sum(-1, keepdim=True), atol=1e-6)
    assert torch.allclose(weights_TK.sum(-1), torch.ones(T))


@pytest.mark.parametrize("k", range(1, E + 1))
def test_without_renormalization_the_weights_are_shares_of_all_experts(k):
    logits_TE = torch.randn(T, E)
    weights_TK, indices_TK = top_k(logits_TE, k, renormalize=False)
    assert torch.allclose(weights_TK, logits_TE.softmax(-1).gather(-1, indices_TK))
    assert (weights_TK.sum(-1) < 1).all() or k == E
    assert indices_TK.shape == (T, k) and len(set(indices_TK[0].tolist())) == k


def test_soft_uses_every_expert():
    logits_TE = torch.randn(T, E)
    weights_TE, indices_TE = soft(logits_TE)
    assert torch.equal(weights_TE, logits_TE.softmax(-1))
    assert torch.equal(indices_TE[3], torch.arange(E))


def test_sampling_draws_by_the_softmax_in_training_and_takes_the_best_at_inference():
    torch.manual_seed(0)
    sample, logits_E = Sample(), torch.tensor([1.0, 0.0, 2.0, -1.0])
    logits_TE = logits_E.expand(40_000, 4).clone().requires_grad_()
    assert sample.temperature == 1
    for step, tau in ((0, 1.0), (5000, 0.6065), (6931, 0.5001), (100_000, 0.5)):
        sample.step = step
        assert sample.temperature == pytest.approx(tau, abs=1e-4)
        weights_T1, indices_T1 = sample(logits_TE)
        drawn_E = torch.bincount(indices_T1[:, 0], minlength=4) / len(logits_TE)
        # Gumbel-max: the draws are by the softmax at any temperature.
        assert torch.allclose(drawn_E, logits_E.softmax(-1), atol=0.01)
        assert (weights_T1 > 1 / 4).all() and (weights_T1 < 1 + 1e-6).all()
    (gradient_TE,) = torch.autograd.grad(weights_T1.sum(), logits_TE)
    assert (gradient_TE.abs().sum(-1) > 0).float().mean() > 0.9
    sample.eval()
    weights_T1, indices_T1 = sample(logits_TE)
    assert (weights_T1 == 1).all() and (indices_T1 == 2).all()


def test_the_first_of_sampling_layers_is_soft_and_all_are_deterministic_at_inference():
    model, inputs = dense("llama"), batch("llama")
    sc.convert(model, sc.recipes.btx(4, routing="sample"))
    model.train().eval()
    with sc.trace(model) as routing:
        first, again = model(**inputs).logits, model(**inputs).logits
    assert torch.equal(first, again)
    soft_one, sampled = routing.values()
    assert soft_one.in_order and soft_one.weights_TK.shape[-1] == 4
    assert not sampled.in_order and sampled.weights_TK.shape[-1] == 1
    assert torch.equal(sampled.indices_TK[:, 0], sampled.logits_TE.argmax(-1))
    model.train()
    with sc.trace(model) as routing:
        model(**inputs)
    weights_T = list(routing.values())[1].weights_TK[:, 0]
    assert (weights_T < 1).any()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_temperature_divides_the_logits(temperature):
    router, x_TD = router_of(select=TopK(2), temperature=temperature), torch.randn(T, D)
    routing = router(x_TD)
    wanted_TE = x_TD @ router.scorer.weight.T / temperature
    assert torch.allclose(routing.logits_TE, wanted_TE, atol=1e-6)
    top_TK = wanted_TE.topk(2).values
    assert torch.allclose(routing.weights_TK, top_TK.softmax(-1), atol=1e-6)


def test_the_router_is_float32_under_bf16_and_autocast():
    router, x_TD = router_of(select=TopK(2)), torch.randn(T, D)
    wanted = router(x_TD)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x_TD)
    assert routing.logits_TE.dtype == routing.weights_TK.dtype == torch.float32
    assert torch.equal(routing.logits_TE, wanted.logits_TE), "autocast reached the router"
    router.to(torch.bfloat16)
    routing = router(x_TD.bfloat16())
    assert routing.logits_TE.dtype == routing.weights_TK.dtype == torch.float32


@pytest.mark.parametrize(
    ("start", "std"),
    [
        (KaimingUniform(), (3 * D) ** -0.5),
        (Normal(0.5), 0.5),
        (Uniform(0.5), 0.5),
        (Zeros(), 0.0),
    ],
)
def test_initialization(start, std):
    torch.manual_seed(0)
    weight = build_router(RouterSpec(scorer=Linear(start=start)), D, 512).scorer.weight
    assert abs(weight.std().item() - std) <= 0.02 * std


def test_a_router_has_one_bias_free_row_per_expert():
    assert {n: p.shape for n, p in router_of().named_parameters()} == {"scorer.weight": (E, D)}


@pytest.mark.parametrize("renormalize", [True, False])
def test_the_language_model_gradient_reaches_the_router(renormalize):
    router, x_TD = router_of(select=TopK(2, renormalize=renormalize)), torch.randn(T, D)
    routing = router(x_TD)
    (routing.weights_TK * torch.randn(T, 2)).sum().backward()
    assert router.scorer.weight.grad.abs().max() > 0


# --------------------------------------------------------------------------------------- the record


def test_routings_that_no_router_decides():
    x_TD = torch.randn(5, 7)
    one = Routing.of_one(x_TD)
    assert one.sums_to_one and torch.equal(one.weights_TE(), torch.ones(5, 1))
    assert not one.indices_TK.any() and not one.logits_TE.any()
    all_of_them = Routing.of_all(x_TD, 3)
    assert all_of_them.every and torch.equal(all_of_them.weights_TE(), torch.ones(5, 3))
    assert all_of_them.indices_TK.tolist() == [[0, 1, 2]] * 5
    assert torch.equal(all_of_them.logits_TE, torch.zeros(5, 3))
    weights_TE = torch.tensor([[0.0, 2.0, -1.0], [0.0, 0.0, 0.0]])
    some = Routing.of_weights(weights_TE)
    assert torch.equal(some.weights_TE(), weights_TE)
    assert some.indices_TK.tolist() == [[3, 1, 2], [3, 3, 3]] and not some.logits_TE.any()
    assert some.amounts_E().tolist() == [0, 1, 1]
    first = some.only(torch.tensor([False, True]))
    assert not first.weights_TE().any() and first.amounts_E().tolist() == [0, 0, 0]
    assert first.counted(torch.tensor([True, True])).tolist() == [False, True]
    assert some.counted() is None and not first.load_E().any()


def test_load_counts_filled_slots_of_real_tokens():
    indices_TK = torch.tensor([[0, 1], [0, 3], [3, 2]])  # 3: no expert
    routing = Routing(torch.ones(3, 2), indices_TK, torch.zeros(3, 3))
    assert torch.allclose(routing.load_E(), torch.tensor([2.0, 1.0, 1.0]) / 4)
    mask_T = torch.tensor([True, True, False])
    assert torch.allclose(routing.load_E(mask_T), torch.tensor([2.0, 1.0, 0.0]) / 3)
    assert torch.equal(routing.load_E(torch.zeros(3, dtype=torch.bool)), torch.zeros(3))


def test_a_trace_holds_the_latest_routing_of_every_routed_layer():
    model, inputs = dense("llama"), batch("llama")
    sc.convert(model, RECIPES["camelidae"].make())
    names = ["model.layers.0.mlp", "model.layers.1.mlp"]
    with sc.trace(model) as routing, torch.no_grad():
        assert len(routing) == 0
        model(**inputs)
        assert list(routing) == names, "LoRA has no router and no entry"
        first = routing[names[0]]
        assert first.indices_TK.shape == (inputs["input_ids"].numel(), 2)
        model(input_ids=inputs["input_ids"][:1])
        assert len(routing) == 2 and len(routing[names[0]].indices_TK) == 12, "overwritten"
        model(**inputs)
    assert torch.equal(routing[names[0]].logits_TE, first.logits_TE), "readable after the block"
    layers = [model.get_submodule(name) for name in names]
    assert not any(map(records_of, layers))
    before = dict(routing)
    with torch.no_grad():
        model(input_ids=inputs["input_ids"][:1])
    assert all(routing[name] is before[name] for name in names), "nothing is kept after the block"


def test_the_layers_input_and_not_the_dense_output_is_read_by_pesc():
    """And `reads="output"` reads F(x), as its field says."""
    for reads in ("input", "output"):
        model = dense("llama")
        sc.convert(model, sc.override(RECIPES["camelidae_no_lora"].make(), {"reads": reads}))
        layer = model.model.layers[0].mlp
        x = torch.randn(1, 5, 32)
        with sc.trace(layer) as routing:
            layer(x)
        read = layer.base(x) if reads == "output" else x
        wanted = read[0] @ layer.router.scorer.weight.T
        assert torch.allclose(routing[""].logits_TE, wanted, atol=1e-5), reads


def test_routers_of_split_networks_name_every_expert_in_its_place():
    """Top-k, threshold and the whole network fit one record: (T, E), and E where none runs."""
    for name in ("moefication", "lte", "d2dmoe", "cmoe"):
        model, inputs = dense("llama"), batch("llama")
        sc.convert(model, RECIPES[name].make(), certify=False)
        with sc.trace(model) as whole, torch.no_grad():
            model(**inputs)
        RUNNING[f"{name}_sparse"].ready(model)
        with sc.trace(model) as sparse, torch.no_grad():
            model(**inputs)
        for layer in whole:
            routing = whole[layer]
            assert routing.in_order and (routing.weights_TE() == 1).all()
            assert torch.equal(routing.indices_TK[0], torch.arange(4))
            routing = sparse[layer]
            assert routing.in_order and routing.indices_TK.shape == routing.logits_TE.shape
            runs = routing.indices_TK < 4
            assert torch.equal(runs, routing.weights_TE() > 0)
            assert routing.load_E().sum().item() == pytest.approx(1.0)
