"""Recipes as data: JSON, overrides, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest

import sparsecraft as sc
from sparsecraft.errors import RecipeError
from sparsecraft.recipe.edits import Edit
from sparsecraft.recipe.experts import AdapterSpec, FFNSpec, LoRASpec, SplitSpec
from sparsecraft.recipe.formats import from_json, to_json
from sparsecraft.recipe.overrides import override
from sparsecraft.recipe.routers import RouterSpec
from sparsecraft.recipe.stages import FitSpec, Stage
from sparsecraft.recipes import by_name
from tests.cases import RECIPES

EVERY = {**{n: case.make() for n, case in RECIPES.items()}}
EVERY |= {f"{name}()": by_name(name)() for name in sc.recipes.__all__}
EVERY |= {"camelidae(nf4)": sc.recipes.camelidae(quantize="nf4", variant="released")}


def refused(call, *words: str) -> str:
    with pytest.raises(RecipeError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


@pytest.mark.parametrize("name", EVERY)
def test_json_round_trip(name):
    recipe = EVERY[name]
    data = to_json(recipe)
    assert next(iter(data)) == "format_version"
    text = json.dumps(data)
    assert from_json(json.loads(text)) == recipe
    assert json.dumps(to_json(from_json(json.loads(text)))) == text


def test_recipes_are_frozen_and_torch_free():
    code = (
        "import sys, sparsecraft.recipes, sparsecraft.recipe.recipe; "
        "sparsecraft.recipes.camelidae(); "
        "print(sorted({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError):
        EVERY["camelidae"].name = "other"


def test_from_json_refuses_what_it_does_not_know():
    data = to_json(EVERY["camelidae"])

    def changed(path: str, value) -> dict:
        copy = json.loads(json.dumps(data))
        node = copy
        *parents, last = path.split(".")
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node[key]
        if value is KeyError:
            del node[last]
        else:
            node[last] = value
        return copy

    for path, value, words in (
        ("format_version", 99, ["format_version 99", "upgrade sparsecraft"]),
        ("format_version", KeyError, ["format_version None"]),
        ("titel", "x", ["no field 'titel'", "Did you mean 'title'"]),
        ("edits.0.router.topk", 2, ["recipe.edits.0.router", "Did you mean 'top_k'"]),
        ("edits.0.experts.kind", "adaptor", ["'adaptor'", "Did you mean 'adapter'"]),
        ("edits.0.experts.rank", 4, ["recipe.edits.0.experts has no field 'rank'"]),
        ("edits.0.place", "behind", ["recipe.edits.0.place is 'behind'", "'after'"]),
        ("edits.0.router.top_k", "2", ["recipe.edits.0.router.top_k is '2'", "int"]),
        ("edits.0.router.top_k", True, ["top_k is True"]),
        ("edits.0.router.top_k", 99, ["top_k is 99 with num_experts=4"]),
        ("edits.0.experts", KeyError, ["recipe.edits.0 is incomplete", "experts"]),
        ("name", KeyError, ["recipe is incomplete", "name"]),
        ("stages.0.losses", {"switch": "much"}, ["losses.switch is 'much'", "float"]),
        ("edits", "all", ["recipe.edits is 'all'"]),
    ):
        refused(lambda path=path, value=value: from_json(changed(path, value)), *words)
    assert from_json(changed("edits.0.experts.scale", 1)).edits[0].experts.scale == 1.0


# ----------------------------------------------------------------------------------------- override


@pytest.mark.parametrize(
    ("path", "value", "read"),
    [
        ("router.temperature", "0.5", lambda r: r.edits[0].router.temperature),
        ("edits.0.router.temperature", 0.5, lambda r: r.edits[0].router.temperature),
        ("temperature", 0.5, lambda r: r.edits[0].router.temperature),
    ],
)
def test_override_takes_a_whole_path_or_its_end(path, value, read):
    recipe = EVERY["camelidae"]
    changed = override(recipe, {path: value})
    assert read(changed) == 0.5 and read(recipe) == 1.0
    assert override(changed, {path: 1.0}) == recipe, "and nothing else has changed"


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("top_k", "3", 3),
        ("renormalize", "false", False),
        ("renormalize", "True", True),
        ("stages.0.learning_rate", "1e-3", 1e-3),
        ("router_learning_rate", "none", None),
        ("router_learning_rate", "0.5", 0.5),
        ("trains", "experts,router", ("experts", "router")),
        ("losses.switch", "0.5", 0.5),
        ("losses", "switch=0.5,z=0.001", {"switch": 0.5, "z": 0.001}),
        ("losses", "", {}),
        ("stages.0.name", "3", "3"),
        ("reads", "output", "output"),
        ("base_quantization", "nf4", "nf4"),
    ],
)
def test_text_is_parsed_by_the_fields_type(path, text, value):
    changed = override(EVERY["camelidae"], {path: text})
    leaf = path.rpartition(".")[2]
    places = [changed, changed.edits[0].router, changed.stages[0], changed.stages[0].losses]
    found = [p[leaf] if isinstance(p, dict) else getattr(p, leaf, ...) for p in places[:3]]
    if leaf == "switch":
        found = [places[3]["switch"]]
    if leaf == "name":
        found = [changed.stages[0].name]
    assert value in found and type(value) in {type(f) for f in found}


def test_changes_that_belong_together_are_checked_together():
    changed = override(EVERY["camelidae"], {"select": "soft", "top_k": None})
    assert changed.edits[0].router.top_k is None
    small = {"edits.0.experts.num_experts": 1, "top_k": 1}
    for changes in (small, dict(reversed(small.items()))):
        assert override(EVERY["camelidae"], changes).edits[0].router.top_k == 1


def test_override_refuses():
    recipe = EVERY["camelidae"]
    for changes, words in (
        ({"router.temprature": 1.0}, ["no field 'router.temprature'", "Did you mean", "Known"]),
        ({"dropout": 0.0}, ["ambiguous", "edits.0.experts.dropout", "edits.1.experts.dropout"]),
        ({"top_k": "two"}, ["top_k is 'two'", "int"]),
        ({"top_k": 0}, ["top_k is 0", "between 1"]),
        ({"top_k": 5}, ["top_k is 5 with num_experts=4"]),
        ({"renormalize": "maybe"}, ["renormalize is 'maybe'", "bool"]),
        ({"reads": "both"}, ["reads is 'both'", "'input' or 'output'"]),
        ({"select": "soft"}, ["'soft'", "top_k=None"]),
        ({"temperature": 0.0}, ["temperature is 0.0", "positive"]),
        ({"edits.0.experts.num_experts": 0}, ["num_experts is 0"]),
        ({"edits.7.place": "after"}, ["no field 'edits.7.place'"]),
    ):
        refused(lambda changes=changes: override(recipe, changes), *words)


# ---------------------------------------------------------------------------- what a recipe can say


def test_impossible_edits_are_refused_when_they_are_written():
    adapters = AdapterSpec(num_experts=4)
    for kwargs, words in (
        ({"experts": adapters}, ["4 adapter experts have no router"]),
        ({"experts": adapters, "router": RouterSpec(top_k=5)}, ["top_k is 5"]),
        ({"experts": adapters, "router": RouterSpec(top_k=None)}, ["top_k=None"]),
        ({"experts": adapters, "router": RouterSpec(select="soft")}, ["'soft'"]),
        ({"experts": FFNSpec(num_experts=-1)}, ["num_experts is -1"]),
    ):
        refused(lambda kwargs=kwargs: Edit(**kwargs), *words)
    assert Edit(experts=AdapterSpec(num_experts=1)).router is None
    refused(lambda: AdapterSpec(dim=0), "dim is 0")
    refused(lambda: LoRASpec(rank=0), "rank is 0")
    refused(lambda: LoRASpec(dropout=1.5), "dropout is 1.5")


def test_an_unknown_recipe_names_the_nearest():
    refused(lambda: by_name("camelid"), "'camelid'", "Did you mean 'camelidae'")


def test_published_defaults():
    paper, released = sc.recipes.camelidae(), sc.recipes.camelidae(variant="released")
    assert (paper.edits[0].experts.dim, released.edits[0].experts.dim) == (512, 64)
    assert paper.stages[0].losses == {"switch": 0.01} and released.stages[0].losses == {}
    assert (paper.stages[0].max_length, released.stages[0].max_length) == (2048, 512)
    assert (released.stages[0].warmup_steps, released.stages[0].max_grad_norm) == (200, 0.3)
    assert paper.edits[0].experts.num_experts == 8 and paper.edits[0].router.top_k == 2
    assert paper.edits[0].router.reads == "input" and paper.edits[0].place == "after"
    lora = paper.edits[1].experts
    assert (lora.rank, lora.alpha, lora.dropout) == (64, 16.0, 0.1)
    upcycled = sc.recipes.upcycling()
    assert upcycled.edits[0].router.init_std == 0.02 and upcycled.exact_at_start
    assert not sc.recipes.upcycling(renormalize=False).exact_at_start
    assert sc.recipes.upcycling(4, 4, renormalize=False).exact_at_start


def test_stages_default_to_experts_and_router():
    assert Stage().trains == ("experts", "router")


def test_values_that_make_no_sense_are_refused():
    for changes in (
        {"learning_rate": -1.0},
        {"batch_size": 0},
        {"warmup_ratio": 7.0},
        {"losses": {"switch": float("nan")}},
        {"router.temperature": float("inf")},
        {"num_experts": 2.5},
    ):
        with pytest.raises(RecipeError):
            sc.override(sc.recipes.upcycling(), changes)
    with pytest.raises(RecipeError, match="variant"):
        sc.recipes.camelidae(variant="Released")
    with pytest.raises(RecipeError, match="no stages"):
        dataclasses.replace(sc.recipes.upcycling(), stages=())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: sc.recipes.mov(4, top_k=2.0), "router.top_k is 2.0"),
        (lambda: sc.recipes.mov(4, top_k=2, renormalize="no"), "router.renormalize is 'no'"),
        (lambda: sc.recipes.mov(4, router="wat"), "router.decides is 'wat'"),
        (lambda: sc.recipes.mov(4, paths=None), "paths is None"),
        (lambda: sc.recipes.mov(4, noise=float("nan")), "init_std is nan"),
        (lambda: sc.recipes.molora(4, alpha=0), "alpha is 0"),
        (lambda: sc.recipes.molora(4, dropout=None), "dropout is None"),
        (lambda: sc.recipes.smola(4, mixing="tokens"), "router.select is 'tokens'"),
        (lambda: sc.recipes.mov(4, variant="released", router="sentence"), "no router by sentence"),
        (lambda: sc.Stage(trains=()), "trains nothing"),
        (lambda: sc.Stage(weight_decay=float("nan")), "weight_decay is nan"),
    ],
)
def test_a_recipe_of_nonsense_is_refused_in_one_sentence(make, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        make()


# ----------------------------------------------------------------------------------- split networks


def split_edit(num_experts: int = 8, **router) -> Edit:
    fields = {"weighting": "one", "top_k": 2} | router
    return Edit(experts=SplitSpec(num_experts=num_experts), router=RouterSpec(**fields))


NO_K = {"top_k": None}


@pytest.mark.parametrize(
    ("router", "words"),
    [
        ({"top_k": None}, ["'top_k' with top_k=None", "takes a number"]),
        ({"select": "sample", "top_k": 1}, ["'sample' with weighting='one'"]),
        ({"top_k": 0}, ["top_k is 0 with num_experts=8", "between 1 and num_experts"]),
        ({"top_k": 9}, ["top_k is 9 with num_experts=8"]),
        ({"top_k": 7, "shared": 2}, ["top_k is 7", "shared=2", "what they leave"]),
        ({"shared": 8}, ["router.shared is 8 with num_experts=8", "left to select"]),
        ({"shared": -1}, ["router.shared is -1"]),
        ({"threshold": 0.5}, ["'top_k' with threshold=0.5", "threshold=None"]),
        ({"select": "threshold", **NO_K}, ["'threshold' with threshold=None", "takes a number"]),
        ({"select": "share", **NO_K}, ["'share' with threshold=None"]),
        ({"select": "relative", "threshold": 0.1}, ["'relative' with top_k=2", "top_k=None"]),
        (
            {"select": "threshold", "threshold": 1.5, "squash": "sigmoid", **NO_K},
            ["threshold is 1.5", "0 and 1"],
        ),
        ({"select": "threshold", "threshold": -0.1, **NO_K}, ["threshold is -0.1"]),
        ({"select": "threshold", "threshold": float("nan"), **NO_K}, ["threshold is nan"]),
        ({"select": "share", "threshold": 0.9, **NO_K}, ["linear scorer", "may be negative"]),
        (
            {"select": "relative", "threshold": 0.9, "scorer": "mlp", **NO_K},
            ["mlp scorer", "squash='sigmoid'", "scorer='norm'"],
        ),
        ({"select": "soft", **NO_K}, ["'soft' with weighting='one'", "top_k, share, relative"]),
        ({"select": "slots", **NO_K}, ["'slots' with weighting='one'"]),
        ({"decides": "sequence"}, ["decides by token", "decides='sequence'"]),
        ({"reads": "output"}, ["reads the layer's input", "reads='output'"]),
        (
            {"select": "threshold", "threshold": 0.5, "weighting": "scaled", **NO_K},
            ["'scaled'", "counts on k experts", "select='top_k'"],
        ),
        (
            {"select": "threshold", "threshold": 0.5, "weighting": "straight_through", **NO_K},
            ["'straight_through'"],
        ),
        ({"weighting": "softmax"}, ["'softmax' with split experts", "summed as they are"]),
        ({"scorer": "mpl"}, ["router.scorer is 'mpl'"]),
        ({"target": "norm"}, ["router.target is 'norm'"]),
        ({"squash": "tanh"}, ["router.squash is 'tanh'"]),
        ({"temperature": 0.0}, ["router.temperature is 0.0"]),
    ],
)
def test_impossible_routers_of_split_networks_are_refused(router, words):
    refused(lambda: split_edit(**router), *words)


@pytest.mark.parametrize(
    ("router", "words"),
    [
        ({"scorer": "mlp"}, ["router.scorer is 'mlp'", "for split experts"]),
        ({"select": "share", "threshold": 0.5, **NO_K}, ["router.select is 'share'"]),
        ({"shared": 1}, ["router.shared is 1"]),
        ({"squash": "abs"}, ["router.squash is 'abs'"]),
        ({"bias": 0.0}, ["router.bias is 0.0"]),
        ({"weighting": "one"}, ["'one' with adapter experts", "mixed by the softmax"]),
    ],
)
def test_routers_of_whole_experts_have_no_field_of_split_ones(router, words):
    fields = {"top_k": 2} | router
    refused(lambda: Edit(experts=AdapterSpec(num_experts=4), router=RouterSpec(**fields)), *words)


def test_possible_routers_of_split_networks_are_taken():
    for router in (
        {"top_k": 8},
        {"top_k": 6, "shared": 2},
        {"select": "threshold", "threshold": 0.5, **NO_K},
        {"select": "threshold", "threshold": 0.0, "weighting": "score", **NO_K},
        {"select": "share", "threshold": 0.9, "scorer": "norm", **NO_K},
        {"select": "share", "threshold": 0.9, "scorer": "oracle", **NO_K},
        {"select": "relative", "threshold": 1.0, "scorer": "mlp", "squash": "sigmoid", **NO_K},
        {"weighting": "scaled"},
        {"weighting": "straight_through"},
        {"weighting": "gain", "scorer": "analytic"},
    ):
        assert split_edit(**router).router.splits
    refused(
        lambda: Edit(place="beside", experts=SplitSpec(num_experts=4), router=split_edit().router),
        "split experts cannot stand beside",
    )
    refused(lambda: Edit(experts=SplitSpec(num_experts=4)), "4 split experts have no router")
    assert Edit(experts=SplitSpec(num_experts=1)).router is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokens": 0}, ["tokens is 0", "whole number from 1"]),
        ({"tokens": 2.5}, ["tokens is 2.5"]),
        ({"epochs": True}, ["epochs is True"]),
        ({"batch_tokens": -1}, ["batch_tokens is -1"]),
        ({"holdout": 0.0}, ["holdout is 0.0", "between 0 and 1"]),
        ({"holdout": 1}, ["holdout is 1"]),
        ({"holdout": "some"}, ["holdout is 'some'"]),
        ({"learning_rate": 0}, ["learning_rate is 0", "positive"]),
        ({"learning_rate": float("nan")}, ["learning_rate is nan"]),
    ],
)
def test_impossible_fits_are_refused(fields, words):
    refused(lambda: FitSpec(**fields), *words)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SplitSpec(num_experts=4, markers=0), ["markers is 0"]),
        (lambda: RouterSpec(weighting="one", scorer="norm", hidden=0), ["hidden is 0"]),
        (lambda: sc.recipes.moefication(4, partition="kmean"), ["partition is 'kmean'"]),
        (lambda: RouterSpec(weighting="one", temperature=0.5), ["temperature is 0.5"]),
        (lambda: RouterSpec(weighting="one", bias=1.0, scorer="mlp"), ["bias is 1.0"]),
        (lambda: RouterSpec(weighting="one", normalize=True), ["normalize is True"]),
        (lambda: sc.recipes.d2dmoe(4, router_dim=-3), ["hidden is -3"]),
        (lambda: sc.recipes.cmoe(4, 2, shared=1, compensate="no"), ["compensate is 'no'"]),
    ],
)
def test_nonsense_in_split_specs_is_refused_when_it_is_written(make, words):
    def edit():
        made = make()
        if isinstance(made, SplitSpec):
            Edit(experts=made, router=split_edit().router)
        elif isinstance(made, RouterSpec):
            Edit(experts=SplitSpec(num_experts=4), router=made)

    refused(edit, *words)


def test_stages_of_split_networks_go_through_overrides():
    recipe = sc.recipes.d2dmoe(8)
    changed = override(
        recipe,
        {"fit.tokens": "100", "stages.0.losses.relu_hoyer": "0.5", "threshold": "0.25",
         "stages.0.loss_schedule": "linear", "stages.0.activation": "none"},
    )  # fmt: skip
    assert changed.stages[1].fit.tokens == 100
    assert changed.stages[0].losses == {"relu_hoyer": 0.5}
    assert changed.stages[0].loss_schedule == "linear" and changed.stages[0].activation is None
    assert changed.edits[0].router.threshold == 0.25
    for changes, words in (
        ({"fit.loss": "mae"}, ["fit.loss is 'mae'", "'bce'"]),
        ({"stages.0.runs": "half"}, ["runs is 'half'"]),
        ({"stages.0.activation": "gelu"}, ["activation is 'gelu'"]),
        ({"partition": "kmean"}, ["partition is 'kmean'", "'kmeans'"]),
        ({"loss_schedule": "linear"}, ["ambiguous", "stages.1.loss_schedule"]),
    ):
        refused(lambda changes=changes: override(recipe, changes), *words)


def test_published_defaults_of_split_networks():
    moe = sc.recipes.moefication()
    assert moe.edits[0].router.top_k == round(0.2 * moe.edits[0].experts.num_experts)
    assert [s.name for s in moe.stages] == ["sparsify", "router"]
    fit = moe.stages[1].fit
    assert (fit.loss, fit.epochs, fit.batch_tokens, fit.learning_rate) == ("bce", 30, 512, 0.01)
    assert fit.holdout == 0.1
    general = sc.recipes.gmoefication()
    assert general.edits[0].experts.compensate and general.edits[0].router.target == "deviation"
    squared = sc.recipes.gmoefication(variant="squared")
    assert squared.edits[0].router.target == "squared_deviation"
    first, final = sc.recipes.dsti(), sc.recipes.d2dmoe()
    assert first.edits[0].router.select == "share" and final.edits[0].router.select == "relative"
    for recipe in (first, final):
        assert recipe.edits[0].router.target == "output_norm"
        assert recipe.edits[0].router.hidden == 128
        assert recipe.stages[1].fit.learning_rate == 1e-3 and recipe.stages[1].fit.loss == "mse"
    bert = sc.recipes.d2dmoe(variant="bert").stages[0]
    assert (bert.losses, bert.learning_rate, bert.batch_size) == ({"relu_l1": 1e-4}, 2e-5, 64)
    assert sc.recipes.d2dmoe(variant="released").stages[0].losses == {"relu_l1": 1e-3}
    soft, hard = sc.recipes.lte().stages
    assert (soft.runs, hard.runs) == ("soft", "sparse") and hard.losses == {}
    assert soft.losses["lte_separability"] == 0.5 and soft.warmup_ratio == 0.06
    assert hard.trains == ("model",) and soft.weight_decay == 0.0
    analytic = sc.recipes.cmoe()
    router = analytic.edits[0].router
    assert (router.shared, router.top_k, analytic.edits[0].experts.num_experts) == (3, 3, 8)
    assert analytic.edits[0].experts.markers == 10 and analytic.stages[0].fit.loss == "none"
    tuned = sc.recipes.cmoe(variant="finetuned")
    assert tuned.stages[1].learning_rate == 5.95e-5
    assert tuned.stages[1].router_learning_rate == 1e-3
    lora = tuned.edits[1].experts
    assert (lora.rank, lora.alpha) == (8, 32.0)
    assert sc.recipes.cmoe(variant="released").edits[0].router.normalize
    for name in ("moefication", "gmoefication", "dsti", "d2dmoe", "lte", "cmoe"):
        refused(lambda name=name: by_name(name)(variant="papr"), "'papr'", "Did you mean 'paper'")


def test_gmoefication_names_what_its_routers_predict():
    made = {v: sc.recipes.gmoefication(8, variant=v) for v in ("paper", "squared", "output_norm")}
    assert {v: r.edits[0].router.target for v, r in made.items()} == {
        "paper": "deviation", "squared": "squared_deviation", "output_norm": "output_norm",
    }  # fmt: skip
    with pytest.raises(RecipeError, match="Unknown variant 'norm'"):
        sc.recipes.gmoefication(8, variant="norm")
