"""Parts of routers that are named from outside, by one line each, and a router that reads what the
experts give. T tokens, D width, E experts, O width of what experts give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import sparsecraft as sc
from sparsecraft.errors import RecipeError, SparsecraftError
from sparsecraft.moe import cost
from sparsecraft.moe.experts.base import set_dispatch
from sparsecraft.moe.routers.build import register
from sparsecraft.moe.routers.scorer import Scorer
from sparsecraft.moe.routers.starts import draw
from sparsecraft.recipe.formats import from_json, to_json
from sparsecraft.recipe.overrides import override
from sparsecraft.recipe.routers import RouterSpec
from sparsecraft.recipe.scorers import Linear, Normal, ScorerSpec, Start
from sparsecraft.recipe.selections import Selection, Slots, TopK
from tests.cases import RECIPES, batch, dense, logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder(Start):
    """Row e is e times a number."""

    kind: Literal["ladder"] = "ladder"
    step: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement(ScorerSpec):
    """How far what an expert gives points where a projected token points."""

    kind: Literal["agreement"] = "agreement"
    start: Start = Normal(0.1)
    reads_experts = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Worst(Selection):
    """The expert of the least score alone."""

    kind: Literal["worst"] = "worst"
    in_order = False


class AgreementScorer(Scorer):
    def __init__(self, spec, width, num_experts, *, outputs, device=None, dtype=None):
        super().__init__()
        self.width = width
        weight = torch.empty(outputs, width, device=device, dtype=dtype)
        self.weight = nn.Parameter(draw(spec.start, weight))

    def forward(self, x_TD: Tensor, y_TEO: Tensor) -> Tensor:
        query_TO = x_TD.float() @ self.weight.float().t()
        return torch.einsum("to,teo->te", query_TO, y_TEO.float())


def ladder(start: Ladder, weight_ED: Tensor) -> None:
    rows = torch.arange(len(weight_ED), dtype=weight_ED.dtype, device=weight_ED.device)
    weight_ED.copy_(start.step * rows[:, None].expand_as(weight_ED))


def worst(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    indices_T1 = logits_TE.argmin(-1, keepdim=True)
    return torch.ones_like(indices_T1, dtype=logits_TE.dtype), indices_T1


register(Ladder, ladder)
register(Agreement, AgreementScorer)
register(Worst, lambda spec: worst)

READS = {"router.scorer": Agreement(), "router.reads": "experts"}


def test_registered_parts_are_named_by_recipes_and_built():
    changes = {"router.select": "worst", "router.init": '{"kind": "ladder", "step": 2.0}'}
    recipe = override(sc.recipes.upcycling(num_experts=4), changes)
    assert from_json(to_json(recipe)) == recipe
    assert recipe.edits[0].router.scorer.start == Ladder(step=2.0)
    model = dense("llama")
    sc.convert(model, recipe)
    router = model.model.layers[0].mlp.router
    assert router.scorer.weight[:, 0].tolist() == [0.0, 2.0, 4.0, 6.0]
    x_TD = torch.randn(9, 32)
    found = router(x_TD)
    assert torch.equal(found.indices_TK, found.logits_TE.argmin(-1, keepdim=True))


@pytest.mark.parametrize("recipe", ["upcycling", "camelidae_no_lora", "molora"])
def test_a_router_reads_what_every_expert_gives(recipe):
    model, inputs = dense("llama"), batch("llama")
    made = override(RECIPES[recipe].make(), READS)
    sc.convert(model, made, certify=False)
    for layer in model.sparsecraft.layers:
        for parameter in layer.experts.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.eval()
    with sc.trace(model) as routing, torch.no_grad():
        found = logits(model, inputs)
    for name, decided in routing.items():
        layer = model.get_submodule(name)
        assert decided.outputs_TEO.shape[1] == layer.experts.num_experts
        assert decided.logits_TE.shape == decided.outputs_TEO.shape[:2]
    layer = model.sparsecraft.layers[0]
    x = torch.randn(2, 5, layer.router.scorer.width)
    with torch.no_grad():
        read = layer.base(x) if layer.place == "after" else x
        each_TEO = layer.experts.each(read.reshape(-1, read.shape[-1]))
        weights_TE = layer.router(x, outputs_TEO=each_TEO).weights_TE()
        mixed_TO = (weights_TE[..., None] * each_TEO).sum(1)
        wanted = layer.base(x) + mixed_TO.view(2, 5, -1) if layer.place == "beside" else mixed_TO
        assert torch.allclose(layer(x), wanted.view(2, 5, -1), atol=1e-5)
    set_dispatch(model, "loop")
    assert torch.allclose(logits(model, inputs), found, atol=1e-5)


def test_a_router_that_reads_experts_trains_costs_all_of_them_and_is_saved(tmp_path):
    model, inputs = dense("llama"), batch("llama", labels=True)
    sc.convert(model, override(sc.recipes.upcycling(num_experts=4), READS), certify=False)
    model.train()
    model(**inputs).loss.backward()
    layer = model.model.layers[0].mlp
    assert layer.router.scorer.weight.grad is not None
    assert all(p.grad.abs().max() > 0 for p in layer.experts.parameters())
    all_run = cost.count(model)
    assert all_run.active == all_run.total
    model.eval()
    sc.save(model, tmp_path / "out")
    again = sc.load(tmp_path / "out")
    assert torch.equal(logits(again, batch("llama")), logits(model, batch("llama")))
    before = logits(dense("llama"), batch("llama"))
    sc.revert(model)
    assert torch.equal(logits(model, batch("llama")), before)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: RouterSpec(reads="experts"), "reads is 'experts' with a linear scorer"),
        (lambda: RouterSpec(scorer=Agreement()), "reads is 'input' with a agreement scorer"),
        (lambda: RouterSpec(scorer=Agreement(), reads="experts", select=Slots()), "not by slots"),
        (lambda: override(RECIPES["mixlora"].make(), READS), "place='inside'"),
        (lambda: override(sc.recipes.bam(4), {f"edits.0.{n}": v for n, v in READS.items()}),
         "at site 'attention'"),
        (lambda: register(int, worst), "int is no part of a router"),
        (lambda: register(TopK, worst), "TopK is named already"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make, match):
    with pytest.raises(RecipeError, match=match):
        make()


def test_what_a_scorer_does_not_say_it_refuses():
    scorer = AgreementScorer(Agreement(), 8, 3, outputs=8)
    for change, words in (
        (lambda: scorer.begin(torch.ones(3, 8)), "does not start from data"),
        (lambda: scorer.append(torch.ones(8)), "takes no further expert"),
        (lambda: scorer.remove(0), "keeps all of its experts"),
    ):
        with pytest.raises(SparsecraftError, match=f"AgreementScorer {words}"):
            change()


def test_a_word_that_is_taken_is_refused():
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Other(Linear):
        kind: Literal["domain"] = "domain"

    with pytest.raises(RecipeError, match="'domain' of Other is that of Domain"):
        register(Other, AgreementScorer)
