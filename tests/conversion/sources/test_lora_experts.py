"""PEFT LoRAs kept as LoRA experts: each expert alone is PEFT's model, and nothing is lost."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsecraft as sc
from sparsecraft.cli.main import main
from sparsecraft.conversion.sources.lora_experts import largest_rank
from sparsecraft.conversion.stream import convert_files
from sparsecraft.errors import RecipeError, SourceError
from tests import tiny
from tests.cases import FAMILIES, batch, dense, layers, logits
from tests.conversion.sources.test_lora_folder import adapter

FFN = ["gate_proj", "up_proj", "down_proj"]

# Two adapters of each family: other Linears, ranks and scales.
TARGETS = {
    "llama": (["q_proj", "v_proj", "down_proj"], FFN),
    "qwen3": (["q_proj", "o_proj"], FFN),
    "phi3": (["qkv_proj", "down_proj"], ["qkv_proj", "gate_up_proj", "o_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["c_fc", "c_attn"]),
    "opt": (["q_proj", "fc1"], ["fc2", "out_proj"]),
    "bert": (["query", "value"], ["intermediate.dense", "output.dense"]),
    "t5": (["q", "v", "wi"], ["wo", "k"]),
    "vit": (["q_proj", "k_proj"], ["fc1", "fc2"]),
}
OPTIONS = ({"r": 4, "lora_alpha": 12}, {"r": 3, "lora_alpha": 5, "use_rslora": True})


def saved(model: torch.nn.Module, folder: Path, seed: int = 0, **options) -> str:
    """A random adapter on a copy of `model`, as PEFT writes it."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder)
    return str(folder)


def loras(family: str, folder: Path) -> list[str]:
    pairs = enumerate(zip(TARGETS[family], OPTIONS, strict=True))
    return [
        saved(dense(family), folder / str(n), n, target_modules=targets, **options)
        for n, (targets, options) in pairs
    ]


def wanted(model: torch.nn.Module, folder: str, inputs: dict) -> torch.Tensor:
    return logits(peft.PeftModel.from_pretrained(model, folder).eval(), inputs)


def weigh(model: torch.nn.Module, *weights: float) -> None:
    """Let every router give these weights."""

    def select(logits_TE):
        weights_TE = torch.tensor(weights).expand_as(logits_TE)
        return weights_TE, torch.arange(len(weights)).expand_as(logits_TE)

    for layer in layers(model):
        layer.router.select = select


def check(model: torch.nn.Module, base, folders: list[str], inputs: dict) -> None:
    """One expert is one adapter; half of each is half of each update, in every Linear."""
    plain = logits(base(), inputs)
    for e, folder in enumerate(folders):
        weigh(model, *(float(e == other) for other in range(len(folders))))
        found, expected = logits(model, inputs), wanted(base(), folder, inputs)
        assert (expected - plain).abs().max() > 1e-2
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    mixed = peft.PeftModel.from_pretrained(base(), folders[0], adapter_name="0")
    mixed.load_adapter(folders[1], adapter_name="1")
    mixed.base_model.set_adapter(["0", "1"])
    for module in mixed.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scaling = {name: 0.5 * scale for name, scale in module.scaling.items()}
    weigh(model, 0.5, 0.5)
    torch.testing.assert_close(
        logits(model, inputs), logits(mixed.eval(), inputs), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", TARGETS)
def test_each_expert_alone_is_what_peft_computes(family, tmp_path):
    folders = loras(family, tmp_path)
    model = dense(family)
    report = sc.convert(model, sc.recipes.molora(2, rank=4), sources=folders)
    assert report.sources == tuple(folders) and not report.certificate.exact
    check(model, lambda: dense(family), folders, batch(family))
    before = dense(family).state_dict()
    sc.revert(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("recipe", ["smola", "released", "top_k", "patterns", "wide"])
def test_other_recipes_and_patterns(recipe, tmp_path):
    family, options = "phi3" if recipe == "released" else "llama", [{}, {}]
    made = {
        "smola": sc.recipes.smola(2, rank=5),
        "released": sc.recipes.molora(2, rank=5, variant="released"),
        "top_k": sc.recipes.molora(2, rank=5, top_k=2),
        "patterns": sc.recipes.molora(2, rank=5),
        "wide": sc.recipes.molora(2, rank=16, alpha=3.0),
    }[recipe]
    if recipe == "patterns":
        options[0] = {
            "rank_pattern": {"down_proj": 5, r"layers\.1\.mlp\.up_proj": 1},
            "alpha_pattern": {r"layers\.0\.mlp\.down_proj": 7},
        }
    targets = (["qkv_proj"], ["qkv_proj", "down_proj"]) if recipe == "released" else (FFN, FFN)
    folders = [
        saved(dense(family), tmp_path / str(n), n, target_modules=target, r=3, **more)
        for n, (target, more) in enumerate(zip(targets, options, strict=True))
    ]
    assert largest_rank(folders) == (5 if recipe == "patterns" else 3)
    model = dense(family)
    sc.convert(model, made, sources=folders)
    check(model, lambda: dense(family), folders, batch(family))


@pytest.mark.parametrize("name", ["lora", "camel", "hydralora"])
def test_one_lora_is_the_dense_recipe(name, tmp_path):
    made = {
        "lora": sc.recipes.lora(rank=8),
        "camel": sc.recipes.camel(lora_rank=8),
        "hydralora": sc.recipes.hydralora(num_experts=1, rank=8),
    }[name]
    folder = saved(dense("llama"), tmp_path / "lora", target_modules=FFN, r=8)
    model = dense("llama")
    sc.convert(model, made, sources=[folder])
    inputs = batch("llama")
    expected = wanted(dense("llama"), folder, inputs)
    torch.testing.assert_close(logits(model.eval(), inputs), expected, rtol=1e-4, atol=1e-4)


def test_several_experts_of_each_lora_and_rows_that_can_learn(tmp_path):
    folders = loras("llama", tmp_path)
    model, drawn = dense("llama"), dense("llama")
    sc.convert(model, sc.recipes.molora(4, rank=6), sources=folders)
    sc.convert(drawn, sc.recipes.molora(4, rank=6))
    held = [peft.utils.load_peft_weights(folder) for folder in folders]
    path = "model.layers.0.mlp.down_proj"
    bank, fresh = (m.get_submodule(path).experts for m in (model, drawn))
    for e, source in enumerate((0, 0, 1, 1)):
        a_RI = held[source][f"base_model.model.{path}.lora_A.weight"]
        assert torch.equal(bank.lora_A[e, : len(a_RI)], a_RI)
        # What no adapter fills adds nothing and is not stuck: B is zero there, A is as drawn.
        assert torch.equal(bank.lora_A[e, len(a_RI) :], fresh.lora_A[e, len(a_RI) :])
        assert not bank.lora_B[e, :, len(a_RI) :].any()
    untouched = model.get_submodule("model.layers.0.self_attn.k_proj").experts
    assert not untouched.lora_B.any() and untouched.lora_A.any()


def test_saved_streamed_and_loaded_alike(tmp_path):
    base = tiny.save_dense(tmp_path / "base")
    folders = [
        adapter(base, tmp_path / str(n), n, target_modules="all-linear", **options)
        for n, options in enumerate(OPTIONS)
    ]
    recipe = sc.recipes.molora(2, rank=4)
    model = sc.hub.load_dense(base)
    sc.convert(model, recipe, sources=folders)
    sc.save(model, tmp_path / "out")
    report = convert_files(base, recipe, tmp_path / "streamed", sources=folders)
    assert report.sources == tuple(folders)
    for name in ("out", "streamed"):
        state = sc.load(tmp_path / name).state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_bfloat16_models_keep_their_dtype(tmp_path):
    folders = loras("llama", tmp_path)
    model = dense("llama").bfloat16()
    sc.convert(model, sc.recipes.molora(2), sources=folders)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    weigh(model, 1.0, 0.0)
    expected = wanted(dense("llama"), folders[0], batch("llama"))
    found = logits(model, batch("llama")).float()
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_the_command_takes_rank_and_number_from_the_loras(tmp_path, capsys):
    base = tiny.save_dense(tmp_path / "base")
    folders = [
        adapter(base, tmp_path / str(n), n, target_modules=FFN, r=rank)
        for n, rank in enumerate((2, 6))
    ]
    argv = ["convert", "molora", "--model", base, "--sources", *folders, "--out"]
    for out, more in (("out", []), ("streamed", ["--stream", "--no-progress"])):
        assert main([*argv, str(tmp_path / out), *more]) == 0, capsys.readouterr().err
        assert f"Experts from {', '.join(folders)}; other tensors: base." in capsys.readouterr().out
        model = sc.load(tmp_path / out)
        spec = model.sparsecraft.recipe.edits[0].experts
        assert (spec.num_experts, spec.rank) == (2, 6)
        weigh(model, 0.0, 1.0)
        inputs = {"input_ids": torch.arange(5, 15).view(1, -1)}
        expected = wanted(sc.hub.load_dense(base), folders[1], inputs)
        torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)
    assert main([*argv, str(tmp_path / "no"), "--rank", "4"]) == 1
    assert "has rank 6 and the experts of recipe 'molora' 4; set its rank to 6" in (
        capsys.readouterr().err
    )
    one = ["convert", "lora", "--model", base, "--sources", folders[1], "--out"]
    assert main([*one, str(tmp_path / "one")]) == 0, capsys.readouterr().err
    assert sc.load(tmp_path / "one").sparsecraft.recipe.edits[0].experts.rank == 6


# ----------------------------------------------------------------------------------------- refusals


def refused(match, folders, recipe=None, error=SourceError, model="llama", **options):
    model = dense(model) if isinstance(model, str) else model
    with pytest.raises(error, match=match):
        sc.convert(model, recipe or sc.recipes.molora(len(folders)), sources=folders, **options)
    assert not hasattr(model, "sparsecraft")


def test_recipes_that_are_not_peft_s_function_are_refused(tmp_path):
    folders = loras("llama", tmp_path)
    R, refuse = sc.recipes, RecipeError
    refused("3 experts of recipe 'molora' cannot come from 2", folders, R.molora(3), refuse)
    refused("1 experts of recipe 'lora' cannot come from 2", folders, R.lora(), refuse)
    refused("0 has rank 4 and .* 2; set its rank to 4", folders, R.molora(2, rank=2), refuse)
    refused("share one A", folders, R.hydralora(2), refuse)
    refused("Sets of experts by modality", folders, R.smola(2, modalities=True), refuse)
    slots = R.smola(1, mixing="slots")
    one = [saved(dense("vit"), tmp_path / "vit", target_modules=["fc1"])]
    refused("Experts of slots read means", one, slots, refuse, "vit")
    refused("others='mean'", folders, sc.override(R.molora(2), {"others": "mean"}), refuse)
    refused("vector experts, which come from one", folders, R.mov(2), refuse)
    refused("adapter experts, which come from one", folders, R.camelidae(2), refuse)
    beside = sc.override(R.molora(2), {"site": "ffn"})
    refused("beside the ffn at 'model.layers.0.mlp', which is no single", folders, beside, refuse)
    released = R.molora(2, variant="released")
    refused("up_proj.lora_A.weight', for which .* no place", folders, released)
    refused("q_proj.lora_A.weight', for which", folders, R.molora(2, paths="*.mlp.*"))
    fused = [saved(dense("phi3"), tmp_path / "fused", target_modules=["gate_up_proj"])]
    released = R.molora(1, variant="released", rank=8)
    released = sc.override(released, {"edits.0.router.select": "soft"})
    refused("changes output feature 48 of a projection", fused, released, model="phi3")


def test_what_has_no_place_is_refused_by_its_first_name(tmp_path):
    def lora(name, **options):
        return [saved(dense("llama"), tmp_path / name, **{"target_modules": FFN, "r": 4} | options)]

    refused("lora_magnitude_vector.*no place", lora("dora", use_dora=True))
    refused("norm.weight.*no place", lora("saved", modules_to_save=["norm"]))
    refused("embed_tokens.*no place", lora("e", target_modules=["embed_tokens"]))
    refused("lm_head.*no place", lora("head", target_modules=["lm_head"]))
    refused("base_layer.bias.*no place", lora("bias", bias="lora_only"))
    refused("lora_B.bias.*no place", lora("lora_bias", lora_bias=True))
    refused("init_lora_weights='pissa', which changes", lora("pissa", init_lora_weights="pissa"))
    folder = lora("wide", target_modules=["q_proj"])
    refused(r"\[4, 32\] and the Linear", folder, model=tiny.llama(width=64))
    path = Path(folder[0]) / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"layer_replication": [[0, 1], [0, 1]]}))
    refused("layer_replication=.*with other layers", folder)
    path.write_text(json.dumps(config | {"peft_type": "VERA"}))
    refused("of type 'VERA'", folder)
    path.write_text(json.dumps(config))
    weights = Path(folder[0]) / "adapter_model.safetensors"
    held = load_file(weights)
    half = next(name for name in held if name.endswith("lora_B.weight"))
    for changed in ({}, {half: held[half][:, :2].contiguous()}):
        save_file({n: t for n, t in held.items() if n != half} | changed, weights)
        refused(r"no pair of one rank", folder)
        refused(r"no pair of one rank", folder, sc.recipes.btx(1))
    save_file({}, weights)
    refused("holds no LoRA", folder)
    (Path(folder[0]) / "adapter_model.safetensors").unlink()
    refused("cannot be read", folder)
    model = dense("llama")
    model.save_pretrained(tmp_path / "dense")
    refused("is no folder with adapter_config.json", [tmp_path / "dense"])
    refused("'LlamaForCausalLM' is no folder", [model])


def test_an_adapter_of_another_base_is_refused_or_told(tmp_path, caplog):
    base = tiny.save_dense(tmp_path / "base")
    folder = adapter(base, tmp_path / "lora", target_modules=FFN, r=4)
    copied = tiny.save_dense(tmp_path / "copy")
    sc.convert(sc.hub.load_dense(copied), sc.recipes.lora(), sources=[folder])
    sc.convert(sc.hub.load_dense(copied, dtype=torch.bfloat16), sc.recipes.lora(), sources=[folder])
    assert not caplog.records
    moved = tiny.llama()
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.01)
    moved.save_pretrained(tmp_path / "moved")
    other = str(tmp_path / "moved")
    match = "was trained on .*, whose 'model.layers.0.mlp.down_proj.weight' is not the model's"
    refused(match, [folder], sc.recipes.lora(), model=sc.hub.load_dense(other))
    sc.convert(sc.hub.load_dense(other), sc.recipes.lora(), sources=[folder], unrelated=True)
    with pytest.raises(SourceError, match=match):
        convert_files(other, sc.recipes.lora(), tmp_path / "out", sources=[folder])
    deep = tiny.llama()  # only what comes last differs
    deep.model.layers[1].mlp.up_proj.weight.data.neg_()
    deep.save_pretrained(tmp_path / "deep")
    deep = sc.hub.load_dense(str(tmp_path / "deep"))
    refused("whose 'model.layers.1.mlp.up_proj.weight'", [folder], sc.recipes.lora(), model=deep)
    config = Path(folder) / "adapter_config.json"
    named = json.loads(config.read_text()) | {"base_model_name_or_path": "nobody/nothing"}
    config.write_text(json.dumps(named))
    with caplog.at_level(logging.WARNING):
        sc.convert(sc.hub.load_dense(other), sc.recipes.lora(), sources=[folder])
    assert "'nobody/nothing', which is not on this disk" in caplog.text


def test_all_families_that_peft_names_are_tried():
    assert TARGETS.keys() <= FAMILIES.keys()
