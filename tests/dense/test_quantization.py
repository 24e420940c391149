"""A backbone in 4 bits (QLoRA), where `sparsecraft[quant]` is installed; it runs on a CPU too."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers

import sparsecraft as sc
from sparsecraft.conversion.needs import needs
from sparsecraft.dense import hub
from sparsecraft.errors import RecipeError
from tests import tiny

pytest.importorskip("bitsandbytes", reason="needs sparsecraft[quant]")

IDS = torch.arange(3, 43)[None]


def logits(model) -> torch.Tensor:
    """Without gradients: bitsandbytes takes another kernel with them."""
    with torch.no_grad():
        return model(IDS).logits


def recipe(quantize="nf4"):
    return sc.recipes.camelidae(num_experts=4, adapter_dim=16, lora_rank=4, quantize=quantize)


def test_nf4_converts_exactly_trains_and_comes_back(tmp_path):
    base = tiny.save_dense(tmp_path / "dense", width=128)
    model = hub.load_dense(base, quantize="nf4")
    dense = logits(model)
    report = sc.convert(model, recipe())
    assert report.certificate.exact and torch.equal(logits(model), dense)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows())
    sc.train(
        model, rows, tmp_path / "out", steps=4, batch_size=4, max_length=64, learning_rate=1e-2,
        progress=False,
    )  # fmt: skip
    trained = logits(model)
    assert not torch.allclose(trained, dense, atol=1e-4)
    loaded = sc.load(tmp_path / "out")
    assert loaded.is_loaded_in_4bit
    assert torch.equal(logits(loaded), trained)
    sc.revert(model)
    assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("packing", ["nf4", "int8"])
def test_packed_weights_need_what_they_take(tmp_path, packing):
    base = tmp_path / "dense"
    tiny.save_dense(base, width=256)
    model = hub.load_dense(str(base), quantize=packing)
    held = sum(p.nbytes for p in model.parameters())
    assert needs(base, recipe(packing)).base == pytest.approx(held, rel=0.03)
    assert needs(base, recipe(None)).base > 1.8 * held


def test_the_recipe_and_the_model_must_agree(tmp_path):
    base = tiny.save_dense(tmp_path / "dense", width=128)
    with pytest.raises(RecipeError, match="quantize='nf4'"):
        sc.convert(hub.load_dense(base), recipe())
    with pytest.raises(RecipeError, match="loaded with 'nf4'"):
        sc.convert(hub.load_dense(base, quantize="nf4"), recipe(None))


def test_full_experts_cannot_be_copied_from_four_bits(tmp_path):
    model = hub.load_dense(tiny.save_dense(tmp_path / "dense", width=128), quantize="nf4")
    upcycling = sc.override(sc.recipes.upcycling(num_experts=4), {"base_quantization": "nf4"})
    with pytest.raises(sc.SparsecraftError, match="quantized"):
        sc.convert(model, upcycling)
    assert not hasattr(model, "sparsecraft")


# --------------------------------------------- all that bitsandbytes packs comes back as it was

PACKINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, other settings": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_skip_modules": ["lm_head", "down_proj"],
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"},
    "int8": {"load_in_8bit": True},
    "int8, other settings": {"load_in_8bit": True, "llm_int8_skip_modules": ["q_proj", "lm_head"]},
}  # fmt: skip
RECIPES = {
    "camelidae": sc.recipes.camelidae(num_experts=2, adapter_dim=4, lora_rank=2),
    "molora": sc.recipes.molora(2, rank=2),
    "mov": sc.recipes.mov(2),
    "ia3": sc.recipes.ia3(),
    "smola": sc.recipes.smola(),
    "mixlora": sc.recipes.mixlora(),
}
PROGRAM = """
import sys, torch, sparsecraft as sc
with torch.no_grad():
    model = sc.load(sys.argv[1])
    found = model(torch.arange(3, 43)[None]).logits
    dense = sc.revert(model)(torch.arange(3, 43)[None]).logits
torch.save([found, dense, str(model.config.quantization_config.to_dict())], sys.argv[2])
"""


def packed(packing: str, folder: str, packs: str):
    """A model whose folder is packed, or that is packed at load; and how it was."""
    config = transformers.BitsAndBytesConfig(**PACKINGS[packing])
    model = hub.load_dense(folder, quantization_config=config)
    if packs == "folder":
        model.save_pretrained(f"{folder} packed")
        model = hub.load_dense(f"{folder} packed")
    return model


def said(recipe, packing: str):
    """A recipe that says nf4, where that is to be said."""
    return sc.override(recipe, {"backbone": "nf4"}) if packing.startswith("nf4") else recipe


@pytest.mark.parametrize(
    ("packing", "recipe"),
    [
        *((packing, "camelidae") for packing in PACKINGS),
        *((packing, recipe) for recipe in list(RECIPES)[1:] for packing in ("nf4", "int8")),
    ],
)
@pytest.mark.parametrize("packs", ["folder", "load"])
def test_a_packed_base_comes_back_as_it_was(packing, packs, recipe, tmp_path):
    model = packed(packing, tiny.save_dense(tmp_path / "dense", width=64), packs)
    dense = logits(model)
    report = sc.convert(model, said(RECIPES[recipe], packing))
    assert not report.exact_at_start or report.certificate.exact
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows(4))
    tokenizer = tiny.tokenizer()
    sc.train(
        model, rows, tmp_path / "out", tokenizer=tokenizer, steps=3, batch_size=4, max_length=64,
        learning_rate=1e-2, progress=False,
    )  # fmt: skip
    trained = logits(model)
    assert not torch.equal(trained, dense)
    kept = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert kept["recipe"]["backbone"] == {"kind": packing.split(",")[0]}
    if (packing, recipe) in {("nf4", "molora"), ("int8", "camelidae")}:
        places = [str(tmp_path / "out"), str(tmp_path / "found")]
        subprocess.run([sys.executable, "-c", PROGRAM, *places], check=True)
        again, reverted, config = torch.load(places[1])
    else:
        loaded = sc.load(tmp_path / "out")
        again, config = logits(loaded), str(loaded.config.quantization_config.to_dict())
        reverted = logits(sc.revert(loaded))
    assert torch.equal(again, trained)
    assert torch.equal(reverted, dense)
    assert config == str(model.config.quantization_config.to_dict())
    assert torch.equal(logits(sc.revert(model)), dense)


@pytest.mark.parametrize("packing", ["nf4", "nf4, other settings", "fp4"])
@pytest.mark.parametrize("by", ["us", "transformers"])
def test_weights_keep_their_layout_on_every_processor(by, packing, tmp_path, monkeypatch):
    """With AVX-512 BF16 bitsandbytes exchanges them in the first evaluation, also for training."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    folder = tiny.save_dense(tmp_path / "dense", width=64)
    if by == "us":
        model = packed(packing, folder, "load")
        logits(model)
    else:
        config = transformers.BitsAndBytesConfig(**PACKINGS[packing])
        model = transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=config)
    name = "model.layers.0.self_attn.q_proj"
    before = model.get_submodule(name).weight.detach().clone()
    sc.convert(model, said(RECIPES["molora"], packing))
    logits(model.eval())
    assert torch.equal(model.get_submodule(name).base.weight, before)
    model(IDS, labels=IDS).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if n.endswith("lora_B")]
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads)


def test_weights_that_were_laid_out_anew_are_refused(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    model = packed("nf4", tiny.save_dense(tmp_path / "dense", width=64), "load")
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(
        weight.data, weight.quant_state
    )  # what its first evaluation does
    with pytest.raises(sc.SparsecraftError, match=r"layers\.1\.mlp\.up_proj.*before it runs"):
        sc.convert(model, said(RECIPES["molora"], "nf4"))
    assert not hasattr(model, "sparsecraft")


def test_a_recipe_that_says_another_packing_is_refused(tmp_path):
    folder = tiny.save_dense(tmp_path / "dense", width=64)
    for packing in ("fp4", "int8"):
        model = packed(packing, folder, "load")
        with pytest.raises(RecipeError, match=f"'nf4' and the model was loaded with '{packing}'"):
            sc.convert(model, recipe())
        assert not hasattr(model, "sparsecraft")
    packed("int8", folder, "folder")
    with pytest.raises(sc.SparsecraftError, match="which is 'int8'"):
        hub.load_dense(f"{folder} packed", quantize="nf4")
    assert hub.load_dense(folder, quantize="int8").is_loaded_in_8bit


def test_a_checkpoint_cannot_hold_a_packed_base(tmp_path):
    model = packed("int8", tiny.save_dense(tmp_path / "dense", width=64), "load")
    sc.convert(model, RECIPES["molora"])
    with pytest.raises(sc.SparsecraftError, match="a checkpoint cannot hold it"):
        sc.save(model, tmp_path / "out", standalone=True)
    assert not (tmp_path / "out").exists()


def test_a_peft_folder_knows_how_its_base_was_packed(tmp_path):
    pytest.importorskip("peft")
    packing = "nf4, other settings"
    model = packed(packing, tiny.save_dense(tmp_path / "dense", width=64), "load")
    sc.convert(model, said(RECIPES["molora"], packing))
    sc.export(model, "peft", tmp_path / "out")
    assert torch.equal(logits(sc.load(tmp_path / "out")), logits(model))
