"""Options of a router of whole experts. T tokens, K slots, E experts, D width."""

from __future__ import annotations

import pytest
import torch

import sparsecraft as sc
from sparsecraft.errors import ExportError, RecipeError
from sparsecraft.moe.routers.build import build_router
from sparsecraft.recipe.routers import GateSpec, RouterSpec
from sparsecraft.recipe.scorers import Linear, Zeros
from sparsecraft.recipe.selections import Head, TopK
from tests.cases import batch, dense
from tests.cases.families import randomize_new

T, E, D = 20, 6, 16


# ------------------------------------------------------------------ standardized logits
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_standardized_logits_are_skyworks(scale):
    router, x_TD = build_router(RouterSpec(standardize=scale), D, E), torch.randn(T, D)
    routing = router(x_TD)
    for x_D, found_E in zip(x_TD.double(), routing.logits_TE, strict=True):
        z_E = router.scorer.weight.double() @ x_D
        mean = sum(z_E) / E
        deviation = (sum((z - mean) ** 2 for z in z_E) / E) ** 0.5
        assert torch.allclose(found_E.double(), scale * (z_E - mean) / deviation, atol=1e-5)
    larger = build_router(RouterSpec(standardize=scale), D, E)
    with torch.no_grad():
        larger.scorer.weight.copy_(100 * router.scorer.weight)
    again = larger(x_TD)
    assert torch.allclose(again.logits_TE, routing.logits_TE, atol=1e-5), "no larger when grown"


def test_equal_logits_are_standardized_to_zeros_with_a_finite_gradient():
    router = build_router(RouterSpec(scorer=Linear(start=Zeros()), standardize=1.0), D, E)
    routing = router(torch.randn(T, D))
    assert (routing.logits_TE == 0).all()
    routing.weights_TK[:, 0].sum().backward()
    assert router.scorer.weight.grad.isfinite().all()


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), "one"])
def test_other_deviations_are_refused(value):
    with pytest.raises(RecipeError, match="standardize"):
        RouterSpec(standardize=value)


def test_one_logit_has_no_deviation():
    with pytest.raises(RecipeError, match="one logit"):
        sc.override(sc.recipes.upcycling(1, top_k=1), {"router.standardize": 1.0})


def test_what_knows_linear_routers_alone_refuses_standardized_ones(tmp_path):
    model = dense("llama")
    sc.convert(model, sc.override(sc.recipes.upcycling(4), {"router.standardize": 1.0}))
    with pytest.raises(ExportError, match="standardize"):
        sc.export(model, "mixtral", tmp_path / "out")
    with pytest.raises(RecipeError, match="standardize"):
        sc.extend(model, dense("llama"), data=["say red"], old_data=["say blue"])


# ------------------------------------------------------------------ a gradient through the choice
RECIPES = {
    "replace": lambda: sc.recipes.upcycling(E, top_k=2),
    "replace, not renormalized": lambda: sc.recipes.upcycling(E, top_k=2, renormalize=False),
    "after": lambda: sc.recipes.camelidae(E, top_k=2, adapter_dim=4, lora_rank=0, dropout=0.0),
    "beside": lambda: sc.recipes.molora(E, rank=2, top_k=2, dropout=0.0),
    "inside": lambda: sc.recipes.mixlora(E, rank=2, dropout=0.0),
}


def routed(name: str, through: bool):
    model = dense("llama").double()
    recipe = RECIPES[name]()
    changes = {
        f"edits.{n}.router.select.through": through for n, e in enumerate(recipe.edits) if e.router
    }
    changes |= {f"stages.{n}.losses": {} for n in range(len(recipe.stages))}
    sc.convert(model, sc.override(recipe, changes), certify=False)
    randomize_new(model, std=0.3)
    return model.double().train()


@pytest.mark.parametrize("name", RECIPES)
def test_the_router_learns_from_every_expert(name):
    """dL/dw_e = <dL/dy, E_e(x)> for the experts that were not chosen too; all else as before."""
    inputs = batch("llama")
    plain, through = routed(name, False), routed(name, True)
    through.load_state_dict(plain.state_dict())
    routed_layers = (
        p for p, m in through.named_modules() if isinstance(m, sc.MoELayer) and m.router
    )
    path = [*routed_layers][-1]
    layer = through.get_submodule(path)
    seen = {}

    def keep(module, args, kwargs, output):
        output.retain_grad()
        seen["x"], seen["y"] = args[0], output

    layer.register_forward_hook(keep, with_kwargs=True)
    with sc.trace(through) as routings:
        loss = through(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    wanted = plain(**inputs, labels=inputs["input_ids"]).loss
    assert torch.equal(loss, wanted), "the forward pass is that of top-k"
    wanted.backward()
    routing = routings[path]
    rows_TD = seen["x"].detach().reshape(-1, seen["x"].shape[-1])
    y_TD = seen["y"].grad.reshape(-1, seen["y"].shape[-1])
    if layer.place == "after":
        rows_TD = layer.base(rows_TD).detach()
    more = {"base": layer.base} if layer.place == "inside" else {}
    outputs_TEO = torch.stack([layer.experts.expert(e, rows_TD, **more) for e in range(E)], 1)
    by_expert_TE = torch.einsum("to,teo->te", y_TD, outputs_TEO.detach())
    read_TD = seen["x"].detach().reshape(-1, layer.router.scorer.width)
    logits_TE = (read_TD @ layer.router.scorer.weight.detach().T).requires_grad_()
    probs_TE = logits_TE.softmax(-1)
    if routing.sums_to_one:
        chosen_T1 = probs_TE.gather(-1, logits_TE.topk(2).indices).sum(-1, keepdim=True)
        probs_TE = probs_TE / chosen_T1
    (probs_TE * by_expert_TE).sum().backward()
    found = layer.router.scorer.weight.grad
    assert torch.allclose(found, logits_TE.grad.T @ read_TD, rtol=1e-5, atol=1e-9)
    theirs = dict(plain.get_submodule(path).experts.named_parameters())
    for key, parameter in layer.experts.named_parameters():
        assert torch.allclose(parameter.grad, theirs[key].grad, atol=1e-12), key


def test_all_experts_run_in_training_alone():
    model, called = routed("replace", True), []
    bank = next(m for m in model.modules() if isinstance(m, sc.MoELayer)).experts
    bank.register_forward_pre_hook(
        lambda *seen: called.append(seen[2].get("way")), with_kwargs=True
    )
    model(**batch("llama"))
    assert [way and way.__name__ for way in called] == [None, "each"]
    called.clear()
    model.eval()(**batch("llama"))
    assert called == [None]


@pytest.mark.parametrize(
    "spec", [{"reads": "experts"}, {"decides": Head(), "reads": "output"}], ids=["reads", "head"]
)
def test_it_is_for_a_choice_by_token(spec):
    with pytest.raises(RecipeError, match=r"through|reads"):
        RouterSpec(select=TopK(2, through=True), **spec)
    with pytest.raises(RecipeError, match="split network"):
        GateSpec(select=TopK(2, through=True))


def test_attention_experts_have_no_such_gradient():
    with pytest.raises(RecipeError, match="attention"):
        sc.override(sc.recipes.bam(2), {"edits.0.router.select": TopK(1, through=True)})
