"""The attentive scorer against the paper's loop, what it costs, and what it refuses. T tokens, D
width, E experts, O width of what experts give."""

from __future__ import annotations

import pytest
import torch

import sparsecraft as sc
from sparsecraft.errors import RecipeError, SparsecraftError
from sparsecraft.moe.routers.build import build_router
from sparsecraft.recipe import Attentive, Hidden, Linear, RouterSpec, Soft, Zeros
from sparsecraft.surgery.exchange import exchange_routers
from tests.cases import RECIPES, D, batch, dense, logits, randomize_new
from tests.reference.specialization import attention, probabilities

SPEC = RouterSpec(scorer=Attentive(dim=4), reads="experts", select=Soft())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_equals_the_papers_loop(dtype):
    router = build_router(SPEC, 6, 3, outputs=5, dtype=dtype)
    assert {n: tuple(p.shape) for n, p in router.scorer.named_parameters()} == {
        "query": (4, 6),
        "key": (4, 5),
    }
    x_TD, y_TEO = torch.randn(7, 6, dtype=dtype), torch.randn(7, 3, 5, dtype=dtype)
    found = router(x_TD, outputs_TEO=y_TEO)
    assert found.logits_TE.dtype == torch.promote_types(dtype, torch.float32)
    query, key = router.scorer.query.tolist(), router.scorer.key.tolist()
    for t in range(7):
        wanted = attention(x_TD[t].tolist(), y_TEO[t].tolist(), query, key)
        assert found.logits_TE[t].tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        shares = probabilities(wanted)
        assert found.weights_TK[t].tolist() == pytest.approx(shares, rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        again = router(x_TD, outputs_TEO=y_TEO)
    assert torch.equal(again.logits_TE, found.logits_TE)


def test_every_matrix_product_of_a_token_is_counted():
    model = dense("llama")
    before = sc.count(model)
    sc.convert(model, sc.recipes.attentive(3, 2, dim=8))
    after, layers = sc.count(model), model.sparsecraft.layers
    matrices = [p for la in layers for p in la.experts.parameters() if p.ndim == 3]
    networks = sum(p.numel() for p in matrices) * 2 // 3  # three where one was
    # W_q h, W_k^T of that, and one product with what each expert gives.
    gates = len(layers) * (8 * D + 8 * D + 3 * D)
    assert after.flops_per_token - before.flops_per_token == 2 * (networks + gates)


def test_queries_of_zero_weigh_all_experts_alike():
    spec = RouterSpec(scorer=Attentive(dim=4, query=Zeros()), reads="experts", select=Soft())
    router = build_router(spec, 6, 3, outputs=5)
    found = router(torch.randn(7, 6), outputs_TEO=torch.randn(7, 3, 5))
    assert torch.equal(found.weights_TK, torch.full((7, 3), 1 / 3))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Attentive(dim=0), "scorer.dim is 0"),
        (lambda: Attentive(start=Hidden()), "starts from domains"),
        (lambda: Attentive(query=Hidden()), "starts from domains"),
        (lambda: RouterSpec(scorer=Attentive()), "reads is 'input' with a attentive scorer"),
        (lambda: RouterSpec(scorer=Linear(), reads="experts"), "with a linear scorer"),
        (lambda: sc.recipes.attentive(4, top_k=5), "top_k is 5 with num_experts=4"),
        (lambda: sc.recipes.attentive(pairs=9), "pairs is 9"),
    ],
)
def test_what_makes_no_sense_is_refused(make, words):
    with pytest.raises(RecipeError, match=words):
        make()


def test_an_expert_may_go_and_none_can_be_calibrated():
    model = dense("llama")
    sc.convert(model, RECIPES["attentive"].make())
    randomize_new(model)
    router, x_TD, y_TEO = (
        model.sparsecraft.layers[0].router,
        torch.randn(7, D),
        torch.randn(7, 4, D),
    )
    before = router.scorer(x_TD, y_TEO)
    sc.remove(model, 1)
    kept = [0, 2, 3]
    assert torch.equal(router.scorer(x_TD, y_TEO[:, kept]), before[:, kept])
    assert logits(model, batch("llama")).isfinite().all()
    with pytest.raises(SparsecraftError, match="reset"):
        sc.extend(model, dense("llama"), [batch("llama")], [batch("llama")])


def ran(model: torch.nn.Module) -> list[set[int]]:
    """Which experts of each layer a forward pass runs, as their own code is called."""
    layers, seen = model.sparsecraft.layers, []
    for layer in layers:
        calls: set[int] = set()
        own = layer.experts.expert

        def expert(e, x, own=own, calls=calls, **kwargs):
            calls.add(e)
            return own(e, x, **kwargs)

        layer.experts.dispatch, layer.experts.expert = "loop", expert
        seen.append(calls)
    logits(model, batch("llama"))
    for layer in layers:
        del layer.experts.expert
    return seen


def test_once_distilled_no_expert_runs_that_was_not_chosen():
    model = dense("llama")
    sc.convert(model, sc.override(RECIPES["attentive"].make(), {"stages.1.router.select.k": 1}))
    assert ran(model) == [{0, 1, 2, 3}] * 2, "the attentive gate reads all of them"
    exchange_routers(model, model.sparsecraft.recipe.stages[1])
    for layer, wanted in zip(model.sparsecraft.layers, (1, 3), strict=True):
        # Of one sign of the product: every token goes to this expert, or to the next one.
        layer.router.scorer.weight.data.zero_()
        row_D = torch.randn(D)
        layer.router.scorer.weight.data[wanted] = row_D
        layer.router.scorer.weight.data[wanted - 1] = -row_D
    assert ran(model) == [{0, 1}, {2, 3}]
