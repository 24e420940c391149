"""The PEFT door: our recipes as PEFT adapters, alone and beside others, through every route."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers.integrations.peft import MIN_PEFT_VERSION, check_peft_version

import sparsecraft as sc
from sparsecraft.checkpoint.adapter_names import HELD, standing_paths, standings
from sparsecraft.errors import CheckpointError, ExportError, MergeError, RecipeError, SurgeryError
from sparsecraft.interop.peft import register
from sparsecraft.interop.peft.configs import why_no_adapter
from sparsecraft.interop.peft.layer import ExpertsTunerLayer
from tests import cases, tiny

WEIGHTS = "adapter_model.safetensors"
PESC = {"num_experts": 4, "top_k": 2, "adapter_dim": 16}
IDS = {"input_ids": torch.arange(3, 27).view(2, 12)}

pytestmark = pytest.mark.filterwarnings(
    "error",
    "ignore::ResourceWarning",
    "ignore:.*gradient_checkpointing",  # PEFT calls transformers by an old name
    "ignore:Already found a `peft_config`",  # a second adapter in a model of transformers
)


def randomize(model, adapter: str = "default", std: float = 0.1) -> None:
    """Move an adapter away from its start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{HELD}.{adapter}." in name:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))


def with_adapter(dense, config, adapter: str = "default"):
    model = get_peft_model(dense, config, adapter_name=adapter)
    randomize(model, adapter)
    return model.eval()


def pesc(**changes):
    return sc.PescConfig(**(PESC | {"lora_r": 4} | changes))


# ---------------------------------------------------------------------------------- one adapter


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "bert", "t5", "vit"])
def test_camelidae_with_lora_in_every_kind_of_family(tmp_path, family):
    inputs, dense = cases.batch(family), cases.dense(family)
    start, names = cases.logits(dense, inputs), set(dense.state_dict())
    model = get_peft_model(dense, pesc())
    assert torch.equal(cases.logits(model, inputs), start)
    randomize(model)
    moved = cases.logits(model.eval(), inputs)
    assert not torch.allclose(moved, start, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(cases.logits(model, inputs), start)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(cases.dense(family), tmp_path)
    assert torch.equal(cases.logits(again, inputs), moved)
    plain = cases.dense(family)
    plain.load_adapter(tmp_path)  # transformers' own
    assert torch.equal(cases.logits(plain, inputs), moved)
    back = model.unload()
    assert torch.equal(cases.logits(back, inputs), start) and set(back.state_dict()) == names


ADAPTERS = [name for name, case in cases.RECIPES.items() if why_no_adapter(case.make()) is None]
FUSED = ["mov", "molora_released", "mixlora"]  # three edits on one Linear in GPT-2


@pytest.mark.parametrize(
    ("family", "name"), [("llama", n) for n in ADAPTERS] + [("gpt2", n) for n in FUSED]
)
def test_every_recipe_equals_its_conversion(tmp_path, family, name):
    """What `export` writes gives the converted model's logits in PEFT, and back in sc.load."""
    case, inputs = cases.RECIPES[name], cases.batch(family)
    model = cases.dense(family)
    sc.convert(model, case.make(), certify=False)
    cases.randomize_new(model)
    converted = cases.logits(model, inputs)
    record = sc.export(model, "peft", tmp_path / "out")
    assert record["difference"] == 0 and record["base"] is None
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert all(f".{HELD}." in name for name in tensors)
    assert sum(t.numel() for t in tensors.values()) == sc.count(model).new
    adapted = PeftModel.from_pretrained(cases.dense(family), tmp_path / "out")
    assert torch.equal(cases.logits(adapted, inputs), converted)
    adapted.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    cases.dense(family).save_pretrained(tmp_path / "dense")
    loaded = sc.load(tmp_path / "out", base=str(tmp_path / "dense"))
    assert torch.equal(cases.logits(loaded, inputs), converted)


def test_a_step_moves_the_adapter_only_and_routers_are_traced():
    model = get_peft_model(cases.dense("llama"), pesc()).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(2):  # what is zero at first lets no gradient through
        with sc.trace(model) as routing:
            loss = model(**cases.batch("llama", labels=True)).loss
            loss = loss + sc.losses.auxiliary_loss(routing, {"switch": 0.01})[0]
        loss.backward()
        optimizer.step()
    assert len(routing) == cases.LAYERS
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {name for name in before if f".{HELD}." in name}
    assert model.get_model_status().trainable_params == sum(before[n].numel() for n in moved)


def test_adapters_of_a_16_bit_model_train_in_float32(tmp_path):
    model = with_adapter(cases.dense("llama").to(torch.bfloat16), pesc())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    logits = cases.logits(model, cases.batch("llama"))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(cases.dense("llama").to(torch.bfloat16), tmp_path)
    assert torch.equal(cases.logits(again, cases.batch("llama")), logits)


def test_new_layers_are_in_the_mode_of_their_model():
    model = get_peft_model(cases.dense("llama").eval(), pesc())
    layers = [m for m in model.modules() if isinstance(m, (sc.MoELayer, ExpertsTunerLayer))]
    assert layers and not any(m.training for m in layers)


# -------------------------------------------------------------------------------- every route


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return tiny.save_dense(tmp_path_factory.mktemp("base") / "dense")


def test_a_folder_of_peft_is_read_by_everyone(tmp_path, base):
    auto = transformers.AutoModelForCausalLM
    model = with_adapter(auto.from_pretrained(base), pesc(task_type="CAUSAL_LM"))
    logits = cases.logits(model, IDS)
    model.save_pretrained(tmp_path / "peft")
    for load in (AutoPeftModelForCausalLM.from_pretrained, auto.from_pretrained, sc.load):
        assert torch.equal(cases.logits(load(tmp_path / "peft"), IDS), logits)
    converted = sc.load(tmp_path / "peft")
    assert converted.sparsecraft.recipe.name == "camelidae"
    sc.save(converted, tmp_path / "ours")
    assert (tmp_path / "ours" / "tokenizer.json").is_file()
    assert torch.equal(cases.logits(sc.load(tmp_path / "ours"), IDS), logits)
    dense = auto.from_pretrained(base)
    assert torch.equal(cases.logits(sc.revert(converted), IDS), cases.logits(dense, IDS))


def test_an_exported_folder_is_read_by_everyone(tmp_path, base):
    converted = transformers.AutoModelForCausalLM.from_pretrained(base)
    sc.convert(converted, sc.recipes.camelidae(**PESC, lora_rank=4))
    cases.randomize_new(converted)
    logits = cases.logits(converted, IDS)
    record = sc.export(converted, "peft", tmp_path / "out")
    assert record["base"]["name"] == base
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "PESC" and config["adapter_dim"] == 16 and config["lora_r"] == 4
    assert "KeyError: 'PESC'" in (tmp_path / "out" / "README.md").read_text()
    for load in (AutoPeftModelForCausalLM.from_pretrained, sc.load):
        assert torch.equal(cases.logits(load(tmp_path / "out"), IDS), logits)
    assert sc.load(tmp_path / "out", dtype="bfloat16").dtype == torch.bfloat16
    other = tiny.save_dense(tmp_path / "other", width=64)
    with pytest.raises(CheckpointError, match="holds other tensors"):
        sc.load(tmp_path / "out", base=other)


def test_transformers_adds_saves_and_reads_adapters_itself(tmp_path, base):
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:  # transformers 5.24 asks for a PEFT that is not released
        pytest.skip(str(error))
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(base)
    dense = cases.logits(model, IDS)
    model.add_adapter(pesc())
    randomize(model)
    logits = cases.logits(model.eval(), IDS)
    model.save_pretrained(tmp_path)
    wrapped = PeftModel.from_pretrained(auto.from_pretrained(base), tmp_path)
    for again in (auto.from_pretrained(tmp_path), wrapped, sc.load(tmp_path)):
        assert torch.equal(cases.logits(again, IDS), logits)
    model.disable_adapters()
    assert torch.equal(cases.logits(model, IDS), dense)


def test_a_head_that_is_trained_whole_travels_with_peft_only(tmp_path):
    model = with_adapter(cases.dense("llama"), pesc(modules_to_save=["lm_head"]))
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    head.data.add_(0.1)
    whole = [n for n, p in model.named_parameters() if p.requires_grad and HELD not in n]
    assert whole == ["base_model.model.lm_head.modules_to_save.default.weight"]
    logits = cases.logits(model, cases.batch("llama"))
    model.save_pretrained(tmp_path / "peft")
    again = PeftModel.from_pretrained(cases.dense("llama"), tmp_path / "peft")
    assert torch.equal(cases.logits(again, cases.batch("llama")), logits)
    cases.dense("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="modules_to_save"):
        sc.load(tmp_path / "peft", base=str(tmp_path / "dense"))


# ---------------------------------------------------------------------------- several adapters


def around():
    return sc.SparsecraftConfig(recipe=sc.recipes.camelidae(**PESC, lora_rank=4))


def inner():
    return sc.SparsecraftConfig(recipe=sc.recipes.molora(num_experts=3, rank=2))


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize(
    "names", [("0", "1"), ("my_adapter", "0"), ("experts", "mlp"), ("base_layer", HELD)]
)
def test_names_and_recipes_that_differ_round_trip(tmp_path, names, family):
    """One recipe wraps modules that lie around the other's; both orders, both names."""
    inputs, alone = cases.batch(family), {}
    dense = cases.logits(cases.dense(family), inputs)
    for name, config in zip(names, (around(), inner()), strict=True):
        model = with_adapter(cases.dense(family), config, name)
        alone[name] = cases.logits(model, inputs)
        model.save_pretrained(tmp_path)
    for first, second in (names, names[::-1]):
        meta = first == names[0]  # PEFT's other way of loading
        model = PeftModel.from_pretrained(
            cases.dense(family), tmp_path / first, adapter_name=first, low_cpu_mem_usage=meta
        )
        model.load_adapter(tmp_path / second, adapter_name=second, low_cpu_mem_usage=meta)
        for name in names:
            model.set_adapter(name)
            assert torch.equal(cases.logits(model, inputs), alone[name])
        with model.disable_adapter():
            assert torch.equal(cases.logits(model, inputs), dense)
        model.save_pretrained(tmp_path / "both")
        for name in names:
            before = load_file(tmp_path / name / WEIGHTS)
            after = load_file(tmp_path / "both" / name / WEIGHTS)
            assert before.keys() == after.keys()
            assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_second_adapter_leaves_the_first_as_it_is():
    model = get_peft_model(cases.dense("llama"), pesc(), adapter_name="1")
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    model.add_adapter("0", pesc(inference_mode=True))  # ".0." is part of every first layer's path
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    model.set_adapter("0")
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains and all(f".{HELD}.0." in name for name in trains)


def test_active_adapters_stand_on_each_other_and_can_be_deleted():
    inputs = cases.batch("llama")
    model = with_adapter(cases.dense("llama"), around(), "x")
    x = cases.logits(model, inputs)
    model.add_adapter("y", inner())
    randomize(model, "y")
    model.base_model.set_adapter(["x", "y"])
    both = cases.logits(model.eval(), inputs)
    assert not torch.allclose(both, x, atol=1e-2)
    model.delete_adapter("y")
    assert model.active_adapters == ["x"] and torch.equal(cases.logits(model, inputs), x)
    assert not any(f".{HELD}.y." in name for name in model.state_dict())


def test_what_several_adapters_cannot_do_is_refused(tmp_path):
    with_adapter(cases.dense("llama"), around(), "a1").save_pretrained(tmp_path)
    with_adapter(cases.dense("llama"), inner(), "b1").save_pretrained(tmp_path)
    plain = cases.dense("llama")
    plain.load_adapter(tmp_path / "a1", adapter_name="a1")
    with pytest.raises(SurgeryError, match="PeftModel"):  # transformers would only log it
        plain.load_adapter(tmp_path / "b1", adapter_name="b1")
    model = get_peft_model(cases.dense("llama"), around(), adapter_name="x1")
    with pytest.raises(sc.SparsecraftError, match="one batch"):
        model(**cases.batch("llama"), adapter_names=["x1"] * 3)
    mixlora = sc.recipes.mixlora(num_experts=2, rank=2)
    model.add_adapter("y1", sc.SparsecraftConfig(recipe=mixlora))
    model.base_model.set_adapter(["x1", "y1"])
    with pytest.raises(sc.SparsecraftError, match="make it the first"):
        model(**cases.batch("llama"))


# ------------------------------------------------------------------------------------- merging


def ia3_behind_the_activation():
    """Its vectors go into the columns of the down projection, in every family."""
    recipe = sc.recipes.ia3()
    *attention, network = recipe.edits
    return replace(recipe, edits=(*attention, replace(network, site="activation")))


LINEAR = {
    "ia3": sc.recipes.ia3,
    "ia3_behind": ia3_behind_the_activation,
    "lora": lambda: sc.recipes.lora(4, dropout=0.1),
    "lora_released": lambda: sc.recipes.lora(4, variant="released"),
    "camel": lambda: sc.recipes.camel(lora_rank=4),
}


def same_function(model, inputs, logits, family: str) -> bool:
    found, wanted = cases.logits(model, inputs), cases.logits(cases.dense(family), inputs)
    assert not torch.allclose(logits, wanted, atol=1e-2)
    return torch.allclose(found, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "bert", "t5"])
@pytest.mark.parametrize("name", LINEAR)
def test_what_is_linear_merges_into_the_dense_model(tmp_path, name, family):
    inputs, dense = cases.batch(family), cases.dense(family)
    model = with_adapter(dense, sc.SparsecraftConfig(recipe=LINEAR[name]()))
    logits = cases.logits(model, inputs)
    merged = model.merge_and_unload()
    assert type(merged) is type(cases.dense(family)) and not hasattr(merged, "peft_config")
    assert set(merged.state_dict()) == set(cases.dense(family).state_dict())
    assert same_function(merged, inputs, logits, family)
    merged.save_pretrained(tmp_path)
    assert same_function(type(merged).from_pretrained(tmp_path), inputs, logits, family)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("order", [("ia3_behind", "lora"), ("camel", "ia3", "lora_released")])
def test_adapters_that_stand_on_each_other_merge(order, family):
    """The columns that (IA)3 scales are also those of a LoRA that came later."""
    inputs = cases.batch(family)
    first, *others = [(name, sc.SparsecraftConfig(recipe=LINEAR[name]())) for name in order]
    model = with_adapter(cases.dense(family), first[1], first[0])
    for name, config in others:
        model.add_adapter(name, config)
        randomize(model, name)
    alone = cases.logits(model.eval(), inputs)
    twin = copy.deepcopy(model)
    assert same_function(twin.merge_and_unload(adapter_names=[order[0]]), inputs, alone, family)
    model.base_model.set_adapter(list(order))
    both = cases.logits(model.eval(), inputs)
    assert same_function(model.merge_and_unload(), inputs, both, family)


def test_a_merge_keeps_the_head_that_was_trained_whole():
    config = sc.SparsecraftConfig(recipe=sc.recipes.lora(4), modules_to_save=["lm_head"])
    model = with_adapter(cases.dense("llama"), config)
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.add_(0.1)
    logits = cases.logits(model, cases.batch("llama"))
    merged = model.merge_and_unload()
    assert set(merged.state_dict()) == set(cases.dense("llama").state_dict())
    assert same_function(merged, cases.batch("llama"), logits, "llama")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (sc.recipes.camelidae(**PESC, lora_rank=4), "depends on the token.*average.*partial=True"),
        (sc.recipes.mov(3), "weighs 3 experts, and how depends on the token.*how='fixed'"),
        (sc.recipes.mixlora(2, 1, rank=2), "given weights that name one expert"),
        (sc.recipes.smola(3, 2, mixing="slots"), "slots mix the tokens.*'average'"),
        (sc.recipes.adapter(adapter_dim=8), "an activation inside.*Keep the adapter"),
    ],
)
def test_what_does_not_merge_says_why_and_stays(recipe, message):
    model = with_adapter(cases.dense("llama"), sc.SparsecraftConfig(recipe=recipe))
    logits = cases.logits(model, cases.batch("llama"))
    with pytest.raises(MergeError, match=message):
        model.merge_and_unload()
    assert torch.equal(cases.logits(model, cases.batch("llama")), logits)


def test_a_merge_that_fails_gives_the_adapter_back():
    model = with_adapter(cases.dense("llama"), sc.SparsecraftConfig(recipe=sc.recipes.lora(4)))
    logits = cases.logits(model, cases.batch("llama"))
    with pytest.raises(MergeError, match=r"no adapter 'defualt'.*Did you mean 'default'"):
        model.merge_and_unload(adapter_names=["defualt"])
    for method in (model.merge_adapter, model.unmerge_adapter):
        with pytest.raises(sc.SparsecraftError, match="merge_and_unload"):
            method()
    assert torch.equal(cases.logits(model, cases.batch("llama")), logits)
    last = [p for name, p in model.named_parameters() if f".{HELD}." in name][-1]
    last.data[0] = torch.inf
    dense = {n: p.clone() for n, p in model.named_parameters() if HELD not in n}
    with pytest.raises(MergeError, match="not finite"):
        model.merge_and_unload()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], dense[name]) for name in dense)


def test_standing_paths_name_what_lies_inside_what():
    from sparsecraft.surgery.plan import plan

    recipe = sc.recipes.camelidae(**PESC, lora_rank=2)
    sites = [item.site for item in plan(cases.dense("opt"), recipe)]
    paths = dict(zip([(s.path, s.kind) for s in sites], standing_paths(sites), strict=True))
    layer = "model.decoder.layers.0"
    assert paths[f"{layer}.fc1", "ffn"] == f"{layer}.fc1"
    assert paths[f"{layer}.fc1", "linear"] == f"{layer}.fc1.base_layer.first"
    assert paths[f"{layer}.fc2", "linear"] == f"{layer}.fc1.base_layer.second"
    assert paths[f"{layer}.self_attn.q_proj", "linear"] == f"{layer}.self_attn.q_proj"
    members = sites[0].members
    assert standings([sites[0]] * 3) == [(members, 0), (members, 1), (members, 2)]


# ------------------------------------------------------------------- configurations and errors


def test_configurations_make_the_recipe_and_come_back_from_it():
    config = pesc()
    assert config.checked_recipe().edits == sc.recipes.camelidae(**PESC, lora_rank=4).edits
    assert len(sc.PescConfig(**PESC).checked_recipe().edits) == 1  # LoRA is asked for by its rank
    for made in (config, sc.MovConfig(num_experts=3), sc.MoloraConfig(num_experts=3, r=2)):
        saved = json.loads(json.dumps(made.to_dict()))
        again = peft.get_peft_config(saved)
        assert type(again) is type(made) and again.to_dict() == made.to_dict()
    assert sc.MovConfig().num_experts == 10 and sc.MoloraConfig(r=2).r == 2
    assert sc.MoloraConfig(num_experts=3, r=2).checked_recipe().name == "molora"


def test_impossible_configurations_say_why(tmp_path):
    with pytest.raises(RecipeError, match="top_k is 9"):
        sc.PescConfig(num_experts=4, top_k=9)
    with pytest.raises(RecipeError, match="needs a recipe"):
        sc.SparsecraftConfig()
    with pytest.raises(RecipeError, match="base that stays"):
        sc.SparsecraftConfig(recipe=sc.recipes.upcycling())
    with pytest.raises(RecipeError, match="its recipe has 8"):
        sc.PescConfig(num_experts=4, recipe=sc.recipes.camelidae())
    for made, given in (("MovConfig", "molora"), ("MoloraConfig", "mov"), ("PescConfig", "lora")):
        with pytest.raises(RecipeError, match=f"{made} holds .* was given {given!r}; use "):
            getattr(sc, made)(recipe=getattr(sc.recipes, given)())
    without_lora = sc.recipes.camelidae(**PESC, lora_rank=0)
    for given in ({}, {"recipe": without_lora}, {"lora_r": 0}):
        with pytest.raises(RecipeError, match="lora_alpha needs lora_r"):
            sc.PescConfig(lora_alpha=32, **given)
    (edit,) = without_lora.edits
    by_hand = replace(edit, experts=replace(edit.experts, num_experts=1), router=None)
    with pytest.raises(RecipeError, match=r"no edits\.0\.router\.select\.k.*use SparsecraftConfig"):
        sc.PescConfig(recipe=replace(without_lora, edits=(by_hand,)))
    config = pesc()
    config.num_experts = 7
    dense = cases.dense("llama")
    with pytest.raises(RecipeError, match="make a new configuration"):
        get_peft_model(dense, config)
    with pytest.raises(SurgeryError, match="matches none"):
        get_peft_model(dense, pesc(paths="nothing"))
    assert not any(isinstance(m, ExpertsTunerLayer) for m in dense.modules())
    sc.convert(dense, sc.recipes.camel(lora_rank=2))
    with pytest.raises(SurgeryError, match="converted already"):
        get_peft_model(dense, pesc())


def test_a_wrong_file_or_base_is_an_error_and_no_warning(tmp_path, base):
    model = with_adapter(cases.dense("llama"), pesc())
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="lacks"):
        PeftModel.from_pretrained(cases.dense("gpt2"), tmp_path)
    with pytest.raises(CheckpointError, match=r"base=NAME .*folder or hub id"):
        sc.load(tmp_path)
    with pytest.raises(CheckpointError, match="with shape"):
        sc.load(tmp_path, base=base)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"PESC"', '"LORA"'))
    with pytest.raises(CheckpointError, match="'LORA'"):
        sc.load(tmp_path)


def test_an_adapter_file_that_lacks_something_or_has_another_type_is_one_sentence(tmp_path, base):
    with_adapter(cases.dense("llama"), pesc()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())

    def refused(changed: dict, words: str) -> None:
        path.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=words):
            sc.load(tmp_path, base=base if "base_model_name_or_path" not in words else None)

    refused({k: v for k, v in config.items() if k != "recipe"}, "lacks 'recipe'")
    for recipe in (None, [], "camelidae"):
        refused(config | {"recipe": recipe}, "recipe=.*it must be")
    for kind in ([], {}, ["PESC"], None, 1):
        refused(config | {"peft_type": kind}, "holds an adapter of type")
    for name in (1, [], {}):
        refused(config | {"base_model_name_or_path": name}, "base_model_name_or_path=.*must be")
    refused(config | {"revision": 1}, "revision=.*must be")
    path.write_text(json.dumps(config))
    for saved in (1, {}, {"name": "x"}, {"name": "x", "fingerprint": "y", "dtype": "cat"}):
        (tmp_path / "sparsecraft_export.json").write_text(json.dumps({"base": saved}))
        with pytest.raises(CheckpointError, match=r"sparsecraft_export.json has base="):
            sc.load(tmp_path)


def test_what_no_adapter_can_hold_is_not_exported(tmp_path, base):
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    sc.convert(model, sc.recipes.upcycling(num_experts=2, top_k=1))
    with pytest.raises(ExportError, match="base that stays"):
        sc.export(model, "peft", tmp_path / "out")
    for made in (transformers.AutoModelForCausalLM.from_pretrained(base), cases.dense("llama")):
        sc.convert(made, sc.recipes.camel(lora_rank=2))
        with torch.no_grad():
            made.get_input_embeddings().weight.add_(1)
        with pytest.raises(ExportError, match="1 dense tensors are not as the base has them"):
            sc.export(made, "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------- registration


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (sc.recipes.moefication(4), "splits the ffn"),
        (sc.recipes.cmoe(4, 1, shared=1, variant="finetuned"), "splits the ffn"),
        (sc.recipes.d2dmoe(4, attention_experts=2), "imitates the attention_linear"),
    ],
    ids=lambda value: getattr(value, "name", "message"),
)
def test_split_networks_are_no_adapter(recipe, message):
    imitations_first = replace(recipe, edits=recipe.edits[::-1])
    found = imitations_first if "imitates" in message else recipe
    with pytest.raises(RecipeError, match=f"cannot be a PEFT adapter: it {message}"):
        sc.SparsecraftConfig(recipe=found)


def test_registration_is_idempotent():
    before = dict(peft.PEFT_TYPE_TO_CONFIG_MAPPING)
    register()
    assert before == peft.PEFT_TYPE_TO_CONFIG_MAPPING
    assert peft.PeftType("MOV") is peft.PeftType["MOV"] is peft.PeftType.MOV
    assert list(peft.PeftType).count("MOV") == 1


def test_either_import_comes_first(tmp_path):
    with_adapter(cases.dense("llama"), pesc()).save_pretrained(tmp_path)
    script = (
        "import os, sys, warnings\n"
        "import torch, transformers\n"
        "if os.fork():\n"  # torch is imported once for both
        "    import peft\n"
        "    try:\n        peft.PeftConfig.from_pretrained(sys.argv[1])\n"
        "    except KeyError as error:\n        assert str(error) == \"'PESC'\"\n"
        "    else:\n        raise AssertionError\n"
        "    import sparsecraft\n"
        "    assert peft.PeftConfig.from_pretrained(sys.argv[1]).num_experts == 4\n"
        "    assert os.wait()[1] == 0\n"
        "else:\n"
        "    import sparsecraft as sc\n"
        "    assert 'peft' not in sys.modules\n"
        "    assert sc.PescConfig(num_experts=4).peft_type == 'PESC'\n"
        "    import peft\n"
        "    assert type(peft.PeftConfig.from_pretrained(sys.argv[1])) is sc.PescConfig\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=os.environ)
