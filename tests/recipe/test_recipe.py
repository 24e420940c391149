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
from sparsecraft.recipe.formats import from_json, to_json, upgraded
from sparsecraft.recipe.kinds import FAMILIES
from sparsecraft.recipe.overrides import override
from sparsecraft.recipe.recipe import Quantize
from sparsecraft.recipe.routers import GateSpec, RouterSpec
from sparsecraft.recipe.scorers import (
    MLP,
    Analytic,
    Hidden,
    Linear,
    LinearParts,
    Norm,
    Normal,
    Oracle,
)
from sparsecraft.recipe.selections import Above, Relative, Sample, Share, Slots, Soft, TopK
from sparsecraft.recipe.stages import Deal, Fit, Stage
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
        ("format_version", KeyError, ["format_version None", "reads 1 to 2"]),
        ("format_version", "2", ["format_version '2'"]),
        ("titel", "x", ["no field 'titel'", "Did you mean 'title'"]),
        ("edits.0.router.tempreture", 2, ["edits.0.router", "Did you mean 'temperature'"]),
        (
            "edits.0.router.select.K",
            2,
            ["recipe.edits.0.router.select has no field 'K'", "capacity, k, kind"],
        ),
        ("edits.0.router.select", "soft", ["recipe.edits.0.router.select is 'soft'"]),
        ("edits.0.router.select.kind", "softly", ["'softly'", "Did you mean 'soft'"]),
        ("edits.0.router.scorer.kind", "norm", ["recipe.edits.0.router.scorer.kind is 'norm'"]),
        ("edits.0.router.kind", "gates", ["recipe.edits.0.router.kind is 'gates'", "'gate'"]),
        ("stages.0.fit", {}, ["recipe.stages.0 has no field 'fit'"]),
        ("backbone", {"kind": "int9"}, ["recipe.backbone.kind is 'int9'", "nf4"]),
        ("edits.0.experts.kind", "adaptor", ["'adaptor'", "Did you mean 'adapter'"]),
        ("edits.0.experts.rank", 4, ["recipe.edits.0.experts has no field 'rank'"]),
        ("edits.0.place", "behind", ["recipe.edits.0.place is 'behind'", "'after'"]),
        ("edits.0.router.select.k", "2", ["recipe.edits.0.router.select.k is '2'", "int"]),
        ("edits.0.router.select.k", True, ["select.k is True"]),
        ("edits.0.router.select.k", 99, ["top_k is 99 with num_experts=4"]),
        ("edits.0.experts", KeyError, ["recipe.edits.0 lacks experts."]),
        ("name", KeyError, ["recipe lacks name."]),
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
        ("edits.temperature", 0.5, lambda r: r.edits[0].router.temperature),
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
        ("base_quantization", "nf4", Quantize()),
        ("backbone", '{"kind": "nf4"}', Quantize()),
        ("router.select", "soft", Soft()),
        ("select", '{"kind": "top_k", "k": 3, "renormalize": false}', TopK(3, renormalize=False)),
        ("scorer.start", "normal", Normal(0.02)),
        ("router.init", "hidden", Hidden(0.02)),
    ],
)
def test_text_is_parsed_by_the_fields_type(path, text, value):
    changed = override(EVERY["camelidae"], {path: text})
    leaf = path.rpartition(".")[2]
    leaf = {"top_k": "k", "base_quantization": "backbone", "init": "start"}.get(leaf, leaf)
    router = changed.edits[0].router
    places = [changed, router, changed.stages[0], router.select, router.scorer]
    found = [getattr(place, leaf, ...) for place in places]
    if leaf == "switch":
        found = [changed.stages[0].losses["switch"]]
    if leaf == "name":
        found = [changed.stages[0].name]
    assert value in found and type(value) in {type(f) for f in found}


def test_changes_that_belong_together_are_checked_together():
    small = {"edits.0.experts.num_experts": 1, "top_k": 1}
    for changes in (small, dict(reversed(small.items()))):
        assert override(EVERY["camelidae"], changes).edits[0].router.select == TopK(1)
    for changes in (
        {"start": "normal", "start.std": 0.5},
        {"start.std": 0.5, "router.init": "normal"},
    ):
        changed = override(EVERY["camelidae"], changes)
        assert changed.edits[0].router.scorer == Linear(start=Normal(0.5))


def test_a_word_keeps_what_the_new_kind_has_too():
    recipe = sc.recipes.upcycling(router_std=0.05)
    changed = override(recipe, {"router.init": "hidden"})
    assert changed.edits[0].router.scorer.start == Hidden(0.05)
    changed = override(sc.recipes.dsti(8, threshold=0.7), {"select": "relative"})
    assert changed.edits[0].router.select == Relative(0.7)
    changed = override(recipe, {"router.select": Sample(first_soft=True)})
    assert changed.edits[0].router.select == Sample(first_soft=True)
    assert override(recipe, {"router.k": 3}).edits[0].router.select == TopK(3)


def test_override_refuses():
    recipe = EVERY["camelidae"]
    for changes, words in (
        ({"router.temprature": 1.0}, ["no field 'router.temprature'", "Did you mean", "Known"]),
        ({"dropout": 0.0}, ["ambiguous", "edits.0.experts.dropout", "edits.1.experts.dropout"]),
        ({"top_k": "two"}, ["select.k is 'two'", "int"]),
        ({"top_k": 0}, ["top_k is 0", "from 1"]),
        ({"top_k": 5}, ["top_k is 5 with num_experts=4"]),
        ({"router.select": "softly"}, ["router.select.kind is 'softly'", "'soft'"]),
        ({"router.select": "{soft}"}, ["'{soft}' is no JSON"]),
        ({"select": "soft", "top_k": 2}, ["no field 'top_k'"]),
        ({"edits.0.router": "none"}, ["4 adapter experts have no router"]),
        ({"renormalize": "maybe"}, ["renormalize is 'maybe'", "bool"]),
        ({"reads": "both"}, ["reads is 'both'", "'input' or 'output'"]),
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
        ({"experts": adapters, "router": RouterSpec(select=TopK(5))}, ["top_k is 5"]),
        (
            {"experts": adapters, "router": Soft()},
            ["Edit.router is Soft", "RouterSpec or GateSpec"],
        ),
        ({"experts": FFNSpec(num_experts=-1)}, ["num_experts is -1"]),
    ):
        refused(lambda kwargs=kwargs: Edit(**kwargs), *words)
    assert Edit(experts=AdapterSpec(num_experts=1)).router is None
    refused(lambda: TopK(None), "TopK.k is None", "int")
    refused(lambda: RouterSpec(select="soft"), "RouterSpec.select is 'soft'", "TopK or Sample")
    refused(lambda: RouterSpec(select=Share(0.5)), "RouterSpec.select is Share")
    refused(lambda: RouterSpec(scorer=MLP()), "RouterSpec.scorer is MLP", "Linear or Domain")
    refused(lambda: GateSpec(select=Slots()), "GateSpec.select is Slots")
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
    assert paper.edits[0].experts.num_experts == 8 and paper.edits[0].router.select == TopK(2)
    assert paper.edits[0].router.reads == "input" and paper.edits[0].place == "after"
    lora = paper.edits[1].experts
    assert (lora.rank, lora.alpha, lora.dropout) == (64, 16.0, 0.1)
    upcycled = sc.recipes.upcycling()
    assert upcycled.edits[0].router.scorer.start == Normal(0.02) and upcycled.exact_at_start
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
        (lambda: sc.recipes.mov(4, top_k=2.0), "TopK.k is 2.0"),
        (lambda: sc.recipes.mov(4, top_k=2, renormalize="no"), "TopK.renormalize is 'no'"),
        (lambda: sc.recipes.mov(4, router="wat"), "router is 'wat'"),
        (lambda: sc.recipes.mov(4, paths=None), "paths is None"),
        (lambda: sc.recipes.mov(4, noise=float("nan")), "init_std is nan"),
        (lambda: sc.recipes.molora(4, alpha=0), "alpha is 0"),
        (lambda: sc.recipes.molora(4, dropout=None), "dropout is None"),
        (lambda: sc.recipes.smola(4, mixing="tokens"), "mixing is 'tokens'"),
        (lambda: sc.recipes.mov(4, variant="released", router="sentence"), "no router by sentence"),
        (lambda: sc.Stage(trains=()), "trains nothing"),
        (lambda: sc.Stage(weight_decay=float("nan")), "weight_decay is nan"),
    ],
)
def test_a_recipe_of_nonsense_is_refused_in_one_sentence(make, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        make()


# ----------------------------------------------------------------------------------- split networks


def split_edit(num_experts: int = 8, **gate) -> Edit:
    return Edit(experts=SplitSpec(num_experts=num_experts), router=GateSpec(**gate))


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        (lambda: {"select": TopK(0)}, ["top_k is 0", "from 1"]),
        (lambda: {"select": TopK(9)}, ["top_k is 9 with num_experts=8", "1 and num_experts"]),
        (lambda: {"select": TopK(7), "shared": 2}, ["k is 7", "shared=2", "what they leave"]),
        (lambda: {"select": TopK(2, renormalize=False)}, ["renormalize is False", "softmax"]),
        (lambda: {"shared": 8}, ["router.shared is 8 with num_experts=8", "left to select"]),
        (lambda: {"shared": -1}, ["router.shared is -1"]),
        (lambda: {"select": Above(None)}, ["Above.threshold is None", "float"]),
        (lambda: {"select": Above(1.5), "squash": "sigmoid"}, ["threshold is 1.5", "0 and 1"]),
        (lambda: {"select": Above(-0.1)}, ["threshold is -0.1"]),
        (lambda: {"select": Above(float("nan"))}, ["threshold is nan"]),
        (lambda: {"select": Share(1.5)}, ["threshold is 1.5", "0 and 1"]),
        (lambda: {"select": Share(0.9)}, ["linear scorer", "may be negative"]),
        (
            lambda: {"select": Relative(0.9), "scorer": MLP()},
            ["mlp scorer", "squash='sigmoid'", "scorer='norm'"],
        ),
        (
            lambda: {"select": Above(0.5), "weighting": "scaled"},
            ["'scaled'", "counts on k experts", "select='top_k'"],
        ),
        (lambda: {"select": Above(0.5), "weighting": "straight_through"}, ["'straight_through'"]),
        (lambda: {"weighting": "softmax"}, ["weighting is 'softmax'"]),
        (lambda: {"scorer": "mpl"}, ["scorer is 'mpl'"]),
        (lambda: {"scorer": LinearParts(start=Hidden())}, ["start is 'hidden'", "fitted"]),
        (lambda: {"target": "norm"}, ["target is 'norm'"]),
        (lambda: {"squash": "tanh"}, ["squash is 'tanh'"]),
        (lambda: {"scorer": Norm(hidden=0)}, ["hidden is 0"]),
    ],
)
def test_impossible_routers_of_split_networks_are_refused(gate, words):
    refused(lambda: split_edit(**gate()), *words)


def test_each_kind_of_experts_has_its_kind_of_router():
    experts = AdapterSpec(num_experts=4)
    for router, wanted in ((GateSpec(), experts), (RouterSpec(), SplitSpec(num_experts=4))):
        words = ("GateSpec", "RouterSpec", "mixed by the softmax")
        refused(lambda r=router, e=wanted: Edit(experts=e, router=r), *words)


def test_possible_routers_of_split_networks_are_taken():
    for gate in (
        {"select": TopK(8)},
        {"select": TopK(6), "shared": 2},
        {"select": Above(0.5)},
        {"select": Above(0.0), "weighting": "score"},
        {"select": Share(0.9), "scorer": Norm()},
        {"select": Share(0.9), "scorer": Oracle()},
        {"select": Relative(1.0), "scorer": MLP(), "squash": "sigmoid"},
        {"weighting": "scaled"},
        {"weighting": "straight_through"},
        {"weighting": "gain", "scorer": Analytic()},
    ):
        assert split_edit(**gate).router.splits
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
    refused(lambda: Fit(**fields), *words)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SplitSpec(num_experts=4, markers=0), ["markers is 0"]),
        (lambda: sc.recipes.moefication(4, partition="kmean"), ["partition is 'kmean'"]),
        (lambda: sc.recipes.d2dmoe(4, router_dim=-3), ["hidden is -3"]),
        (lambda: sc.recipes.moefication(4, router="mpl"), ["router is 'mpl'"]),
        (lambda: sc.recipes.cmoe(4, 2, shared=1, compensate="no"), ["compensate is 'no'"]),
    ],
)
def test_nonsense_in_split_specs_is_refused_when_it_is_written(make, words):
    def edit():
        made = make()
        if isinstance(made, SplitSpec):
            Edit(experts=made, router=split_edit().router)

    refused(edit, *words)


def test_stages_of_split_networks_go_through_overrides():
    recipe = sc.recipes.d2dmoe(8)
    changed = override(
        recipe,
        {"fit.tokens": "100", "stages.0.losses.relu_hoyer": "0.5", "threshold": "0.25",
         "stages.0.loss_schedule": "linear", "stages.0.activation": "none"},
    )  # fmt: skip
    assert changed.stages[1].tokens == 100
    assert changed.stages[0].losses == {"relu_hoyer": 0.5}
    assert changed.stages[0].loss_schedule == "linear" and changed.stages[0].activation is None
    assert changed.edits[0].router.select == Relative(0.25)
    for changes, words in (
        ({"fit.loss": "mae"}, ["stages.1.loss is 'mae'", "'bce'"]),
        ({"stages.0.runs": "half"}, ["runs is 'half'"]),
        ({"stages.0.activation": "gelu"}, ["activation is 'gelu'"]),
        ({"partition": "kmean"}, ["partition is 'kmean'", "'kmeans'"]),
        ({"max_length": "5"}, ["ambiguous", "stages.1.max_length"]),
    ):
        refused(lambda changes=changes: override(recipe, changes), *words)


def test_published_defaults_of_split_networks():
    moe = sc.recipes.moefication()
    assert moe.edits[0].router.k == round(0.2 * moe.edits[0].experts.num_experts)
    assert [s.name for s in moe.stages] == ["sparsify", "router"]
    fit = moe.stages[1]
    assert (fit.loss, fit.epochs, fit.batch_tokens, fit.learning_rate) == ("bce", 30, 512, 0.01)
    assert fit.holdout == 0.1
    general = sc.recipes.gmoefication()
    assert general.edits[0].experts.compensate and general.edits[0].router.target == "deviation"
    squared = sc.recipes.gmoefication(variant="squared")
    assert squared.edits[0].router.target == "squared_deviation"
    first, final = sc.recipes.dsti(), sc.recipes.d2dmoe()
    assert first.edits[0].router.select == Share(0.9)
    assert final.edits[0].router.select == Relative(0.1)
    for recipe in (first, final):
        assert recipe.edits[0].router.target == "output_norm"
        assert recipe.edits[0].router.scorer.hidden == 128
        assert recipe.stages[1].learning_rate == 1e-3 and recipe.stages[1].loss == "mse"
    bert = sc.recipes.d2dmoe(variant="bert").stages[0]
    assert (bert.losses, bert.learning_rate, bert.batch_size) == ({"relu_l1": 1e-4}, 2e-5, 64)
    assert sc.recipes.d2dmoe(variant="released").stages[0].losses == {"relu_l1": 1e-3}
    soft, hard = sc.recipes.lte().stages
    assert (soft.runs, hard.runs) == ("soft", "sparse") and hard.losses == {}
    assert soft.losses["lte_separability"] == 0.5 and soft.warmup_ratio == 0.06
    assert hard.trains == ("model",) and soft.weight_decay == 0.0
    analytic = sc.recipes.cmoe()
    router = analytic.edits[0].router
    assert (router.shared, router.k, analytic.edits[0].experts.num_experts) == (3, 3, 8)
    assert analytic.edits[0].experts.markers == 10 and analytic.stages[0].loss == "none"
    tuned = sc.recipes.cmoe(variant="finetuned")
    assert tuned.stages[1].learning_rate == 5.95e-5
    assert tuned.stages[1].router_learning_rate == 1e-3
    lora = tuned.edits[1].experts
    assert (lora.rank, lora.alpha) == (8, 32.0)
    assert sc.recipes.cmoe(variant="released").edits[0].router.scorer.normalize
    for name in ("moefication", "gmoefication", "dsti", "d2dmoe", "lte", "cmoe"):
        refused(lambda name=name: by_name(name)(variant="papr"), "'papr'", "Did you mean 'paper'")


def test_gmoefication_names_what_its_routers_predict():
    made = {v: sc.recipes.gmoefication(8, variant=v) for v in ("paper", "squared", "output_norm")}
    assert {v: r.edits[0].router.target for v, r in made.items()} == {
        "paper": "deviation", "squared": "squared_deviation", "output_norm": "output_norm",
    }  # fmt: skip
    with pytest.raises(RecipeError, match="Unknown variant 'norm'"):
        sc.recipes.gmoefication(8, variant="norm")


# ------------------------------------------------------------------------------------------- stages


def test_a_stage_names_what_took_the_place_of_its_old_fields():
    refused(lambda: sc.Stage(fit=Fit()), "no fit", "Fit(...)")
    refused(lambda: sc.Stage(buckets=Deal()), "no buckets", "deal=Deal(...)")
    refused(lambda: Stage(deal="some"), "Stage.deal is 'some'", "Deal")
    assert not hasattr(Stage(), "fit") and dataclasses.replace(Stage(deal=Deal())).deal == Deal()


def test_no_option_of_a_part_has_more_than_nine_fields():
    """Recipes and stages may have more."""
    for kinds in FAMILIES.values():
        for option in {RouterSpec, GateSpec, *kinds.values()} - {Stage, Fit}:
            assert len(dataclasses.fields(option)) <= 9, option


# ------------------------------------------------------------------------------------ older formats


FLAT = {
    "name": "old", "title": "old", "paper": "none", "exact_at_start": False, "variant": "paper",
    "edits": [{"experts": {"kind": "ffn", "num_experts": 4}, "router": {"top_k": 1}}],
    "stages": [{"name": "train"}],
}  # fmt: skip


def flat(path: str = "variant", value="paper") -> dict:
    """A recipe of format 1 with one value changed."""
    data = json.loads(json.dumps({"format_version": 1, **FLAT}))
    node = data
    *parents, last = path.split(".")
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[last] = value
    return data


def test_a_recipe_of_format_1_is_upgraded_and_left_alone():
    data = flat("edits.0.router", {"select": "sample", "top_k": 1, "soft_first": True})
    before = json.dumps(data)
    assert from_json(data).edits[0].router.select == Sample(first_soft=True)
    assert json.dumps(data) == before
    again = upgraded(data)
    assert again["format_version"] == 2 and from_json(again) == from_json(data)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("titel", "x", ["recipe has no field 'titel'", "'title'"]),
        ("backbone", None, ["recipe has no field 'backbone'"]),
        ("edits.0.router", {"topk": 2}, ["recipe.edits.0.router has no field 'topk'", "'top_k'"]),
        ("edits.0.router", {"scorer": "mpl"}, ["recipe.edits.0.router.scorer is 'mpl'"]),
        ("edits.0.router", {"top_k": "2"}, ["recipe.edits.0.router.top_k is '2'", "int"]),
        ("edits.0.router", {"select": "soft", "top_k": 3}, ["router.top_k is 3"]),
        ("edits.0.router", {"bias": 0.5}, ["recipe.edits.0.router.bias is 0.5", "leave it out"]),
        ("edits.0.router", 3, ["recipe.edits.0.router is 3"]),
        ("edits", "all", ["recipe.edits is 'all'"]),
        ("stages.0.fits", {}, ["recipe.stages.0 has no field 'fits'", "'fit'"]),
        ("stages.0.fit", {"tokns": 5}, ["recipe.stages.0.fit has no field 'tokns'", "'tokens'"]),
        ("stages.0.fit", {"tokens": "5"}, ["recipe.stages.0.tokens is '5'"]),
        ("stages.0.fit", 5, ["recipe.stages.0.fit is 5"]),
        ("stages.0.deal", {}, ["recipe.stages.0 has no field 'deal'"]),
    ],
)
def test_what_format_1_did_not_have_is_refused(path, value, words):
    refused(lambda: from_json(flat(path, value)), *words)


def test_a_recipe_that_is_none_is_refused():
    refused(lambda: from_json(["recipe"]), "The recipe is ['recipe']", "to_json")
