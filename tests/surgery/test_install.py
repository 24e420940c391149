"""Planning, installing and taking out: what is refused, and what is left untouched."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

import sparsecraft as sc
from sparsecraft.conversion.needs import needs
from sparsecraft.dense.donors import view
from sparsecraft.dense.sites import find_sites
from sparsecraft.errors import (
    CertificateError,
    DataError,
    DonorError,
    RecipeError,
    SparsecraftError,
    SurgeryError,
)
from sparsecraft.evaluation.certificate import compare
from sparsecraft.moe.experts.adapter import AdapterExperts
from sparsecraft.moe.experts.base import set_dispatch
from sparsecraft.moe.experts.ffn import FFNExperts
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.names import dense_name, unique_tensors
from sparsecraft.moe.traces import RECORDS, records_of
from sparsecraft.recipe.edits import Edit
from sparsecraft.recipe.experts import AdapterSpec, FFNLoRASpec, FFNSpec, LoRASpec, VectorSpec
from sparsecraft.recipe.recipe import Quantize, Recipe
from sparsecraft.recipe.routers import RouterSpec
from sparsecraft.recipe.selections import TopK
from sparsecraft.recipe.stages import Stage
from sparsecraft.surgery.plan import plan
from sparsecraft.surgery.record import conversion_of
from sparsecraft.surgery.trainable import matches, set_trainable
from tests.cases import (
    FAMILIES,
    LAYERS,
    RECIPES,
    D,
    E,
    F,
    batch,
    dense,
    logits,
    randomize_new,
)

ADAPTERS = AdapterSpec(num_experts=E, dim=16)
ROUTER = RouterSpec(select=TopK(2))


def recipe_of(*edits: Edit, **changes) -> Recipe:
    settings = {"name": "mine", "title": "", "paper": "", "exact_at_start": True}
    return Recipe(**settings | {"edits": edits, "stages": (Stage(),)} | changes)


def refused(error: type, model: nn.Module, recipe: Recipe, *words: str) -> None:
    """The conversion fails with one sentence that says `words`, and nothing has changed."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    wants = {n: p.requires_grad for n, p in model.named_parameters()}
    attributes = set(vars(model))
    with pytest.raises(error) as caught:
        sc.convert(model, recipe)
    message = str(caught.value)
    assert isinstance(caught.value, SparsecraftError) and "\n" not in message
    for word in words:
        assert word in message, message
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wants
    assert set(vars(model)) == attributes


# ---------------------------------------------------------------------------------- what is refused


def test_a_path_that_matches_nothing_names_examples():
    recipe = sc.recipes.camelidae(paths="model.layer.*", adapter_dim=16)
    refused(SurgeryError, dense("llama"), recipe, "'model.layer.*'", "model.layers.0.mlp", "2 ffn")


def test_a_family_without_a_known_network_is_refused():
    config = transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1)
    model = transformers.MambaForCausalLM(config)
    words = ("MambaForCausalLM", "known form", "down(activation(up(x)))", "molora")
    refused(DonorError, model, RECIPES["upcycling"].make(), *words)


def test_two_edits_on_one_site_are_named():
    recipe = recipe_of(
        Edit(experts=FFNSpec(num_experts=E), router=ROUTER),
        Edit(paths="*.1.mlp", place="after", experts=ADAPTERS, router=ROUTER),
    )
    words = ("'model.layers.1.mlp'", "ffn experts replace", "adapter experts after")
    refused(SurgeryError, dense("llama"), recipe, *words)


@pytest.mark.parametrize("family", ["llama", "opt", "bert", "t5"])
def test_an_edit_inside_a_replaced_module_names_both(family):
    recipe = recipe_of(
        Edit(experts=FFNSpec(num_experts=E), router=ROUTER),
        Edit(site="linear", place="beside", experts=LoRASpec(rank=4)),
    )
    outer = find_sites(dense(family), "ffn")[0].path
    refused(SurgeryError, dense(family), recipe, "lora", "inside", f"{outer!r}", "ffn experts")


def test_an_edit_inside_attention_lives_beside_a_replaced_network():
    recipe = recipe_of(
        Edit(experts=FFNSpec(num_experts=E), router=ROUTER),
        Edit(site="linear", paths="*self_attn*", place="beside", experts=LoRASpec(rank=4)),
    )
    report = sc.convert(dense("llama"), recipe)
    assert len(report.layers) == 2 + 2 * 4 and report.certificate.exact


def test_what_else_is_refused():
    model, router = dense("llama"), Edit(experts=FFNSpec(num_experts=E), router=ROUTER)
    with pytest.raises(RecipeError, match="'mine' has no edits"):
        recipe_of()
    stage = Stage(losses={"swich": 1.0})
    refused(RecipeError, model, recipe_of(router, stages=(stage,)), "'swich'", "'switch'")
    stage = Stage(trains=("nothing.*",))
    refused(RecipeError, model, recipe_of(router, stages=(stage,)), "'nothing.*'", "no parameter")
    linear = Edit(site="linear", experts=FFNSpec(num_experts=E), router=ROUTER)
    refused(RecipeError, model, recipe_of(linear), "q_proj", "site='ffn'")
    refused(RecipeError, model, recipe_of(router, backbone=Quantize()), "'nf4'", "quantize=")


def test_a_donor_that_cannot_be_copied_leaves_the_model_whole():
    """The last layer fails after the first has been built."""
    model = dense("llama")
    packed = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    model.model.layers[1].mlp.down_proj.weight, model.is_quantized = packed, True
    modules = list(model.modules())
    with pytest.raises(SurgeryError, match=r"quantized.*layers\.1\.mlp\.down_proj"):
        sc.convert(model, RECIPES["upcycling"].make(), certify=False)
    assert list(model.modules()) == modules and not hasattr(model, "sparsecraft")


def test_converting_twice_is_refused_and_reverting_a_dense_model_too():
    model, inputs = dense("llama"), batch("llama")
    sc.convert(model, RECIPES["camelidae"].make())
    randomize_new(model)
    before = logits(model, inputs)
    with pytest.raises(SurgeryError, match=r"already converted by 'camelidae'.*sc\.revert"):
        sc.convert(model, RECIPES["upcycling"].make())
    assert torch.equal(logits(model, inputs), before)
    with pytest.raises(SurgeryError, match=r"LlamaForCausalLM is dense.*sc\.convert"):
        sc.revert(dense("llama"))
    sc.convert(sc.revert(model), RECIPES["upcycling"].make())
    assert conversion_of(model).recipe.name == "upcycling"


# -------------------------------------------------------------------------------------- certificate


@pytest.mark.parametrize("recipe", ["camelidae", "upcycling"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_wrong_conversion_is_given_back(family, recipe, monkeypatch):
    def broken(bank, e, x):
        return 1.01 * original(bank, e, x)

    kind = FFNExperts if recipe == "upcycling" else AdapterExperts
    original = kind.expert
    monkeypatch.setattr(kind, "expert", broken)
    monkeypatch.setattr(kind, "dispatch", "loop")
    refused(
        CertificateError,
        dense(family),
        RECIPES[recipe].make(),
        f"{recipe!r} should start exactly",
        "max |output difference|",
        "was given back",
    )


def test_a_crash_in_the_converted_model_gives_the_dense_one_back(monkeypatch):
    def broken(bank, e, x):
        raise ZeroDivisionError

    monkeypatch.setattr(AdapterExperts, "expert", broken)
    monkeypatch.setattr(AdapterExperts, "dispatch", "loop")
    model, inputs = dense("opt"), batch("opt")
    before, modules = logits(model, inputs), list(model.modules())
    with pytest.raises(ZeroDivisionError):
        sc.convert(model, RECIPES["camelidae"].make())
    assert list(model.modules()) == modules and not hasattr(model, "sparsecraft")
    assert torch.equal(logits(model, inputs), before)


def test_a_wrong_claim_is_not_believed():
    recipe = sc.override(RECIPES["upcycling_raw"].make(), {"exact_at_start": True})
    refused(CertificateError, dense("gpt2"), recipe, "'upcycling' should start exactly")


def test_the_users_batches_are_certified_too():
    recipe, ids = RECIPES["upcycling"].make(), torch.randint(0, 96, (2, 9))
    assert sc.convert(dense("llama"), recipe).certificate.probes == 1
    report = sc.convert(dense("llama"), recipe, [ids, {"input_ids": ids, "labels": ids}])
    assert report.certificate.probes == 3
    assert sc.convert(dense("llama"), recipe, certify=False).certificate is None
    model = dense("llama")
    with pytest.raises(DataError):
        sc.convert(model, recipe, ["no tensor"])
    assert not hasattr(model, "sparsecraft")


# -------------------------------------------------------------------------------- what it leaves be


@pytest.mark.parametrize("recipe", ["camelidae", "upcycling"])
def test_the_random_state_is_left_alone(recipe):
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    sc.convert(dense("llama"), RECIPES[recipe].make(), seed=123)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("recipe", ["camelidae", "upcycling"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_new_modules_follow_the_donor(family, recipe):
    for dtype in (torch.float64, torch.bfloat16):
        model = dense(family).to(dtype)
        report = sc.convert(model, RECIPES[recipe].make(), certify=False)
        assert report.certificate is None
        assert {p.dtype for p in model.parameters()} == {dtype}
    model = dense(family)
    model.get_submodule(find_sites(model, "ffn")[1].owner).train()
    modes = {name: module.training for name, module in model.named_modules()}
    sc.convert(model, RECIPES[recipe].make())
    record = conversion_of(model)
    for item, layer in zip(record.plan, record.layers, strict=True):
        assert {m.training for m in (layer, *layer.experts.modules())} == {modes[item.site.path]}
    sc.revert(model)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_float64_is_certified_at_its_own_precision():
    report = sc.convert(dense("llama").double(), RECIPES["upcycling"].make())
    assert report.certificate.dtype == "float64"
    assert report.certificate.max_difference <= 1e-10


@pytest.mark.parametrize("recipe", RECIPES)
def test_torchs_default_type_changes_nothing(recipe, tmp_path):
    """Users set it while they load a model."""
    case = RECIPES[recipe]
    family = next(iter(sorted(case.families, key=lambda name: name != "llama")))
    found, usual = [], torch.get_default_dtype()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = dense(family)
        try:
            torch.set_default_dtype(dtype)
            sc.convert(model, case.make())
            found.append(unique_tensors(model))
            if recipe in ("camelidae", "moefication") and dtype != usual:
                sc.save(model, tmp_path / str(dtype))
                found.append(unique_tensors(sc.load(tmp_path / str(dtype))))
        finally:
            torch.set_default_dtype(usual)
    for name, wanted in found[0].items():
        assert all(state[name].dtype == wanted.dtype for state in found), name
        assert all(torch.equal(state[name], wanted) for state in found), name


@pytest.mark.parametrize("family", FAMILIES)
def test_torchs_default_device_does_not_matter_to_a_plan(family):
    model = dense(family)
    for recipe in (sc.recipes.upcycling(2), sc.recipes.mov(2), sc.recipes.bam(2)):
        found = []
        for device in ("cpu", "meta"):
            with torch.device(device):
                try:
                    found.append([item.site for item in plan(model, recipe)])
                except SparsecraftError as error:
                    found.append(str(error))
        assert found[0] == found[1]


@pytest.mark.parametrize("recipe", ["camelidae", "upcycling", "moefication"])
def test_what_is_made_in_inference_mode_trains_afterwards(recipe, tmp_path):
    model = dense("llama")
    with torch.inference_mode():
        sc.convert(model, RECIPES[recipe].make())
        sc.save(model, tmp_path / "out")
        loaded = sc.load(tmp_path / "out")
    for found in (model, loaded):
        assert not any(tensor.is_inference() for tensor in unique_tensors(found).values())
        found.train()
        found(**batch("llama"), labels=batch("llama")["input_ids"]).loss.backward()
        assert any(parameter.grad is not None for parameter in found.parameters())


def test_a_model_that_was_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = transformers.LlamaForCausalLM(dense("llama").config)
        refused(SurgeryError, model, sc.recipes.molora(2), "made inside of torch.inference_mode")
    refused(SurgeryError, model, sc.recipes.molora(2), "'model.embed_tokens.weight'", "outside")


@pytest.mark.parametrize("recipe", ["camelidae", "lora", "ia3", "upcycling", "bam"])
@pytest.mark.parametrize("part", ["mlp", "self_attn"])
def test_a_part_that_was_compiled_is_converted_as_any(part, recipe):
    """torch.nn.Module.compile keeps a graph of what was there, and asks at the call."""
    models = [dense("llama"), dense("llama")]
    getattr(models[0].model.layers[0], part).compile(backend="eager")
    for model in models:
        report = sc.convert(model, RECIPES[recipe].make())
        randomize_new(model)
    assert report.certificate.exact == RECIPES[recipe].exact
    assert torch.allclose(*(logits(model, batch("llama")) for model in models), atol=1e-6)


def test_layers_in_several_modes_keep_them_through_the_probe():
    model = dense("llama")
    model.model.layers[0].train()
    modes = [module.training for module in model.modules()]
    sc.convert(model, RECIPES["camel"].make())
    sc.revert(model)
    assert [module.training for module in model.modules()] == modes


def test_t5_still_sees_the_weight_of_wo():
    model = dense("t5")
    original = model.encoder.block[0].layer[1].DenseReluDense.wo
    sc.convert(model, RECIPES["camel"].make())
    layer = model.encoder.block[0].layer[1].DenseReluDense.wo
    assert isinstance(layer, MoELayer) and layer.weight is original.weight
    assert not hasattr(dense_layer(), "weight")


def dense_layer() -> MoELayer:
    model = dense("llama")
    sc.convert(model, RECIPES["upcycling"].make())
    return model.model.layers[0].mlp


@pytest.mark.parametrize("family", ["t5", "t5_gated"])
@pytest.mark.parametrize("recipe", ["camelidae", "upcycling"])
def test_t5_with_a_float32_wo_comes_back_in_its_mixed_types(family, recipe):
    """As transformers loads it in float16: `wo` stays float32."""
    model = dense(family).to(torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sc.convert(model, RECIPES[recipe].make())
    sc.revert(model)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name


# ------------------------------------------------------------------------------------------ nesting


@pytest.mark.parametrize("family", FAMILIES)
def test_inner_edits_are_made_first_and_run_inside_the_outer_ones(family):
    model, inputs = dense(family), batch(family)
    sc.convert(model, RECIPES["camelidae"].make())
    items = conversion_of(model).plan
    kinds = [item.edit.experts.kind for item in items]
    for i, outer in enumerate(items):
        assert not any(outer.site.contains(inner.site) for inner in items[i:])
    assert set(kinds) == {"lora", "adapter"}
    # A change of the LoRA inside the network is seen through the adapters.
    before = logits(model, inputs)
    names = [n for n, _ in model.named_parameters() if ".base." in n and n.endswith("lora_B")]
    inside = [n for n in names if any(i in n for i in (".first.", ".second.", ".mlp.", "Dense"))]
    assert inside
    with torch.no_grad():
        for name in inside:
            model.get_parameter(name).normal_()
    assert (logits(model, inputs) - before).abs().max() > 1e-3


@pytest.mark.parametrize("place", ["beside", "after", "before"])
@pytest.mark.parametrize("family", ["llama", "opt", "bert", "gpt2"])
def test_every_placement_of_adapters_is_its_equation(family, place):
    model = dense(family)
    site = find_sites(model, "ffn")[0]
    donor = view(model, site)
    if site.spans_siblings:
        up, down = copy.deepcopy((donor.up.module, donor.down.module))

        def network(x):
            return down(donor.activation(up(x)))
    else:
        network = copy.deepcopy(model.get_submodule(site.path))
    edit = Edit(place=place, experts=ADAPTERS, router=ROUTER)
    sc.convert(model, recipe_of(edit, exact_at_start=place != "beside"))
    randomize_new(model)
    layer = model.get_submodule(site.path)
    x = torch.randn(2, 3, D)

    def mixture(inputs, read):
        routing = layer.router(read.flatten(0, 1))
        rows = []
        for t, u in enumerate(inputs.flatten(0, 1)):
            pairs = zip(routing.weights_TK[t], routing.indices_TK[t].tolist(), strict=True)
            rows.append(sum(w * layer.experts.expert(e, u[None])[0] for w, e in pairs))
        return torch.stack(rows).view_as(inputs)

    wanted = {
        "beside": lambda: network(x) + mixture(x, x),
        "after": lambda: mixture(network(x), x),
        "before": lambda: network(mixture(x, x)),
    }[place]()
    assert torch.allclose(layer(x), wanted, atol=1e-5)
    # The state keeps the dense names below `base`, so that it can be told from what is new.
    shared = {dense_name(model, name) for name in model.state_dict()} - {None}
    assert shared == set(dense(family).state_dict())


def test_a_glob_selects_layers():
    model = dense("llama")
    report = sc.convert(model, sc.recipes.camelidae(4, 2, 16, lora_rank=0, paths="*.1.mlp"))
    assert report.layers == {"model.layers.1.mlp": "adapter"}
    assert not isinstance(model.model.layers[0].mlp, MoELayer)
    assert report.cost.new == E * (2 * D * 16 + D)


# --------------------------------------------------------------------------------------- the donors


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_all_networks_and_all_their_linears(family):
    case, model = FAMILIES[family], dense(family)
    sites = find_sites(model, "ffn")
    assert len(sites) == case.ffns
    for site in sites:
        donor = view(model, site)
        assert (donor.width, donor.hidden_width, donor.gated) == (D, F, case.gated)
        assert donor.first_weight().shape == ((2 if case.gated else 1) * F, D)
        assert donor.down_weight().shape == (D, F)
        assert (donor.down_bias() is not None) == case.biased
    linears = [view(model, site) for site in find_sites(model, "linear")]
    shapes = sorted((linear.in_features, linear.out_features) for linear in linears)
    assert shapes == sorted(2 * case.linears), "two blocks"
    assert all(
        linear.weight().shape == (linear.out_features, linear.in_features) for linear in linears
    )


# ---------------------------------------------------------------------------------- copies as views


def storage(model: nn.Module) -> int:
    """Bytes of distinct memory below the parameters."""
    sizes = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()
    }
    return sum(sizes.values())


def test_upcycled_copies_cost_their_memory_and_no_more():
    model, inputs = dense("llama"), batch("llama")
    before = storage(model)
    sc.convert(model, RECIPES["upcycling"].make())
    layer = model.model.layers[0].mlp
    routers = sum(p.numel() * 4 for n, p in model.named_parameters() if ".router." in n)
    copies = LAYERS * (E - 1) * (3 * D * F + 2 * F + D) * 4
    assert storage(model) == before + copies + routers  # the dense networks are out of sight
    start = logits(model, inputs)
    assert torch.equal(logits(model.train().eval(), inputs), start)
    with torch.no_grad():
        layer.experts.down[0] += 1
    assert not torch.equal(layer.experts.down[0], layer.experts.down[1])
    sc.revert(model)
    assert all(
        torch.equal(t, dense("llama").state_dict()[n]) for n, t in model.state_dict().items()
    )


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_training_a_single_copy_does_not_write_through_to_the_dense_model(family):
    model, inputs = dense(family), batch(family, labels=True)
    start = logits(model, batch(family))
    sc.convert(model, sc.recipes.upcycling(num_experts=1, top_k=1))
    model.train()
    set_trainable(model, ("experts",))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**inputs).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(model.eval(), batch(family)), start)
    assert torch.equal(logits(sc.revert(model), batch(family)), start)


# ---------------------------------------------------------------------------------------- reverting


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """Family -> a folder with its dense model."""
    folders = {}

    def folder(family: str):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            dense(family).save_pretrained(folders[family])
        return folders[family]

    return folder


def load_dense(family: str, folder, **kwargs) -> nn.Module:
    return getattr(transformers, FAMILIES[family].model).from_pretrained(folder, **kwargs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "t5", "vit"])
def test_a_trained_base_is_restored_from_its_folder(family, on_disk):
    model, inputs = load_dense(family, on_disk(family)), batch(family)
    start = logits(model, inputs)
    sc.convert(model, RECIPES["upcycling"].make())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter + 0.01
    assert (logits(model, inputs) - start).abs().max() > 1e-3
    sc.revert(model)
    assert torch.equal(logits(model, inputs), start)
    wanted = dense(family).state_dict()
    assert all(torch.equal(t, wanted[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "opt", "bert"])
def test_a_cast_model_is_given_back_in_the_type_it_was_cast_to(family, on_disk):
    model = load_dense(family, on_disk(family))
    sc.convert(model, RECIPES["upcycling"].make())
    sc.revert(model.double())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    wanted = dense(family).double().state_dict()
    assert all(torch.equal(t, wanted[n]) for n, t in model.state_dict().items())


def test_a_trained_base_without_a_folder_is_not_reverted():
    model, inputs = dense("llama"), batch("llama")
    sc.convert(model, RECIPES["upcycling"].make())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter + 0.01
    after, modules = logits(model, inputs), list(model.modules())
    with pytest.raises(
        SurgeryError, match=r"tensors of the dense model .*no base folder"
    ) as caught:
        sc.revert(model)
    assert "embed_tokens" in str(caught.value)
    assert list(model.modules()) == modules
    assert torch.equal(logits(model, inputs), after)


def test_a_folder_that_has_changed_is_not_trusted(on_disk, tmp_path):
    dense("llama").save_pretrained(tmp_path)
    model = load_dense("llama", tmp_path)
    sc.convert(model, RECIPES["upcycling"].make())
    other = dense("llama")
    with torch.no_grad():
        for tensor in (model.model.embed_tokens.weight, other.model.embed_tokens.weight):
            tensor += 1
    other.save_pretrained(tmp_path)
    with pytest.raises(SurgeryError, match=r"embed_tokens.*no longer holds the original"):
        sc.revert(model)
    assert conversion_of(model)


# ------------------------------------------------------------------------------ what may be trained


def test_words_of_a_stage():
    assert matches("model.layers.0.mlp.experts.down", "experts")
    assert matches("model.layers.0.mlp.router.scorer.weight", "router")
    assert not matches("model.layers.0.mlp.my_experts.down", "experts")
    assert matches("model.norm.weight", "*norm*") and not matches("model.norm.weight", "norm")
    model = dense("llama")
    sc.convert(model, RECIPES["camelidae"].make())
    names = set_trainable(model, ("router", "*lm_head*"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(names)
    assert {n.split(".")[-3] for n in names if "router" in n} == {"router"}
    assert "lm_head.weight" in names and len(names) == 3
    assert len(set_trainable(model, ("all",))) == len(list(model.parameters()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5"])
def test_the_announced_bytes_are_the_bytes(family, on_disk):
    """Known from the configuration alone, before any weight is read."""
    for case in (c for c in RECIPES.values() if family in c.families):
        announced = needs(on_disk(family), case.make())
        model = dense(family)
        assert announced.base == 4 * sum(p.numel() for p in model.parameters())
        sc.convert(model, case.make(), certify=False)
    made = [p for n, p in model.named_parameters() if dense_name(model, n) is None]
    assert announced.new == 4 * sum(p.numel() for p in made)


def test_dispatch_is_one_string():
    model = dense("llama")
    sc.convert(model, RECIPES["camelidae"].make())
    set_dispatch(model, "loop")
    banks = [layer.experts for layer in model.modules() if isinstance(layer, MoELayer)]
    assert {bank.dispatch for bank in banks} == {"loop"}
    with pytest.raises(SparsecraftError, match=r"'fast'.*auto, loop, by_expert, grouped, dense"):
        set_dispatch(model, "fast")


@pytest.mark.parametrize("recipe", ["camelidae", "upcycling"])
def test_a_deep_copy_is_a_model_of_its_own(recipe):
    model, inputs = dense("llama"), batch("llama")
    sc.convert(model, RECIPES[recipe].make())
    randomize_new(model)
    before, twin = logits(model, inputs), copy.deepcopy(model)
    assert torch.equal(logits(twin, inputs), before)
    sc.revert(twin)
    assert torch.equal(logits(twin, inputs), logits(dense("llama"), inputs))
    assert torch.equal(logits(model, inputs), before)


def test_a_nested_trace_leaves_the_outer_one_alone():
    model, inputs = dense("llama"), batch("llama")
    sc.convert(model, RECIPES["camelidae"].make())
    with sc.trace(model) as outer:
        model(**inputs)
        with sc.trace(model) as inner:
            model(**inputs)
        assert len(outer) == len(inner) == 2
        model(**inputs)
        assert len(outer) == 2
    assert not RECORDS.now()


def test_a_trace_that_sees_no_pass_leaves_the_outer_one_its_record():
    model, inputs = dense("llama"), batch("llama")
    sc.convert(model, RECIPES["camelidae"].make())
    with sc.trace(model) as outer:
        model(**inputs)
        before = dict(outer)
        with sc.trace(model) as inner:
            assert not inner
        assert len(before) == 2 and dict(outer) == before


@pytest.mark.parametrize("first", [0, 1])
def test_traces_that_overlap_close_in_any_order(first):
    model, inputs = dense("llama"), batch("llama")
    sc.convert(model, RECIPES["camelidae"].make())
    layers = [layer for layer in model.modules() if isinstance(layer, MoELayer) and layer.router]
    opened = [sc.trace(model), sc.trace(model)]
    records = [each.__enter__() for each in opened]
    opened[first].__exit__(None, None, None)
    model(**inputs)
    assert [len(record) for record in records] == ([0, 2] if first == 0 else [2, 0])
    opened[1 - first].__exit__(None, None, None)
    assert not any(map(records_of, layers))


def test_a_nan_in_any_probe_is_no_equality():
    zeros = torch.zeros(2, 3)
    certificate = compare([zeros, zeros], [zeros, torch.full((2, 3), float("nan"))])
    assert not certificate.exact and certificate.max_difference != 0


def test_what_is_no_model_or_no_recipe_is_refused():
    for model, recipe in (
        (dense("llama"), "camelidae"),
        (dense("llama"), sc.recipes.camelidae),
        (torch.nn.Linear(2, 2), sc.recipes.camelidae()),
        (None, sc.recipes.camelidae()),
    ):
        with pytest.raises(SurgeryError, match="a transformers model and a recipe"):
            sc.convert(model, recipe)


@pytest.mark.parametrize("family", ["gpt2", "opt", "t5"])
def test_an_edit_inside_needs_the_first_linear_and_the_activation_apart(family):
    vectors = Edit(site="intermediate", place="after", experts=VectorSpec(num_experts=1))
    inside = Edit(site="ffn", place="inside", experts=FFNLoRASpec(num_experts=1))
    words = ("need apart", "site='activation'")
    refused(SurgeryError, dense(family), recipe_of(vectors, inside), *words)


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_nothing_stands_before_a_part_of_a_fused_projection(family):
    edit = Edit(site="key", place="before", experts=VectorSpec(num_experts=1))
    refused(SurgeryError, dense(family), recipe_of(edit), "not the key alone")
